"""What is asked of a model: prompt lengths, generation length, number of requests."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from hrm.errors import WorkloadError, meant
from hrm.numeric import Number, maximum, minimum
from hrm.units import format_number

# Beyond these, bytes of a whole batch would overflow 64-bit integers.
MAX_LEN: Final = 10**7
MAX_REQUESTS: Final = 10**15


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A batch job: mean and maximum prompt length and the tokens generated a request.

    Memory is planned for `gen_len` tokens a request; if requests end early, `mean_gen_len` is what
    they generate on average. `num_requests` of None means prompts without end: the batch size is
    then limited by memory only.
    """

    name: str
    prompt_len: float
    max_prompt_len: int
    gen_len: int
    mean_gen_len: float | None = None
    num_requests: int | None = None

    def __post_init__(self) -> None:
        """Reject impossible lengths (WorkloadError)."""
        mean, requests, at_most = self.mean_gen_len, self.num_requests, f"must be at most {MAX_LEN:,}"
        rules = (
            ("prompt_len", self.prompt_len >= 1, "must be at least 1"),
            ("prompt_len", self.prompt_len <= MAX_LEN, at_most),
            ("gen_len", self.gen_len >= 1, "must be at least 1"),
            (
                "max_prompt_len",
                self.max_prompt_len >= self.prompt_len,
                f"must be at least the mean prompt_len {format_number(self.prompt_len)}",
            ),
            (
                "mean_gen_len",
                mean is None or 1 <= mean <= self.gen_len,
                f"must lie between 1 and gen_len {self.gen_len}",
            ),
            ("max_prompt_len", self.max_prompt_len <= MAX_LEN, at_most),
            ("gen_len", self.gen_len <= MAX_LEN, at_most),
            (
                "num_requests",
                requests is None or 1 <= requests <= MAX_REQUESTS,
                f"must lie between 1 and {MAX_REQUESTS:,}",
            ),
        )
        for field, holds, rule in rules:
            if not holds:
                raise WorkloadError(f"workload: {field}", getattr(self, field), rule, "correct it", field=field)

    @property
    def max_context_len(self) -> int:
        """Longest context a request reaches: its prompt and all that is generated."""
        return self.max_prompt_len + self.gen_len

    @property
    def mean_context_len(self) -> float:
        """Mean final context of a request."""
        return self.prompt_len + self.gen_len

    def prompt_lengths(self, count: int) -> list[int]:
        """So many prompt lengths of this mean and maximum, ascending.

        They are the quantiles of the distribution of greatest entropy up to the maximum that has
        this mean: an exponential one, cut off, which for MTBench has a median of 55.
        """
        shape = _shape(self.prompt_len / self.max_prompt_len)
        quantiles = ((index + 0.5) / count for index in range(count))
        return [max(1, round(self.max_prompt_len * shape(share))) for share in quantiles]

    def chunks(self, prompts: Number, most_tokens: Number) -> Number:
        """How many chunks of at most so many tokens so many prompts are prefilled in.

        A prompt is divided only if it is longer than a chunk. Where all are alike, each chunk has whole ones; else
        some are short enough to fill it.
        """
        tokens = prompts * self.prompt_len
        room = minimum(most_tokens, tokens)
        if self.max_prompt_len == self.prompt_len:
            room = maximum(room // self.prompt_len * self.prompt_len, minimum(room, self.prompt_len))
        return -(-tokens // room)

    def requests_or(self, batch_size: int) -> int:
        """Requests of the whole job, or of one batch where the job has no end."""
        return batch_size if self.num_requests is None else self.num_requests

    @property
    def generated_tokens(self) -> float:
        """Tokens that a request generates on average."""
        return self.gen_len if self.mean_gen_len is None else self.mean_gen_len

    @property
    def active_share(self) -> float:
        """Share of a batch's requests that still generate, as a mean over its decode steps."""
        return (self.generated_tokens - 1) / self.decode_steps if self.decode_steps else 1.0

    @property
    def decode_steps(self) -> int:
        """Decode steps a request needs: prefill already yields its first token."""
        return self.gen_len - 1


def _shape(mean: float) -> Callable[[float], float]:
    """Quantiles of the density on [0, 1] in proportion to exp(-rate·x) that has this mean."""
    if mean >= 1:
        return lambda _: 1.0

    def mean_of(rate: float) -> float:
        return 0.5 if abs(rate) < 1e-6 else 1 / rate - math.exp(-rate) / -math.expm1(-rate)

    low, high = -700.0, 700.0  # the mean falls as the rate rises
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_of(middle) > mean else (low, middle)
    rate = low
    if abs(rate) < 1e-6:
        return lambda share: share
    return lambda share: min(1.0, -math.log1p(share * math.expm1(-rate)) / rate)


# MoE-Lightning, arXiv 2411.11217, §5.1: MTBench and two HELM tasks.
WORKLOADS: Final = {
    "mtbench": Workload(name="mtbench", prompt_len=77, max_prompt_len=418, gen_len=128),
    "synthetic-reasoning": Workload(name="synthetic-reasoning", prompt_len=242, max_prompt_len=256, gen_len=50),
    "summarization": Workload(name="summarization", prompt_len=1693, max_prompt_len=1984, gen_len=64),
}


def named_workload(name: str) -> Workload:
    """A built-in workload; WorkloadError listing the names if there is none called that."""
    if name not in WORKLOADS:
        raise WorkloadError(
            "--workload",
            name,
            f"must be one of {', '.join(WORKLOADS)}",
            meant(name, WORKLOADS, "or give --prompt-len, --max-prompt-len and --gen-len"),
        )
    return WORKLOADS[name]
