"""The choice of the next token.

R requests, V vocab.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from executor.errors import JobError
from executor.native import kernels

NO_TOKEN: Final = -1  # chosen where the logits are not finite numbers
SAMPLED_BYTES: Final = 72  # of a logit, while its request is sampled: float64, and sorted


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a request is continued; temperature 0 takes the most probable token.

    `top_k` keeps so many of the most probable tokens, all if it is 0 or -1; `top_p` the fewest of
    these that together reach that share of their probability; `min_p` of these such as are at least
    that many times as probable as the first (the order of transformers). Equal seeds give equal
    choices. `stop` are texts, and `stop_token_ids` tokens, that end the request. With
    `logprobs` the log probabilities of the chosen tokens are told, by the model's own distribution,
    whatever the temperature. `forced` are tokens that it goes on with, whatever is probable.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    forced: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Reject impossible values (JobError)."""
        rules = (
            ("max_tokens", _is_integer(self.max_tokens) and self.max_tokens >= 1, "be an integer of at least 1"),
            ("temperature", _is_number(self.temperature) and 0 <= self.temperature <= 2, "be a number from 0 to 2"),
            ("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "be a number greater than 0 and at most 1"),
            ("top_k", _is_integer(self.top_k) and self.top_k >= -1, "be an integer of at least -1"),
            ("min_p", _is_number(self.min_p) and 0 <= self.min_p <= 1, "be a number from 0 to 1"),
            ("seed", _is_integer(self.seed), "be an integer"),
            ("stop", _all(self.stop, str) and all(self.stop), "be texts that are not empty"),
            ("stop_token_ids", _all(self.stop_token_ids, int), "be token ids"),
            ("ignore_eos", isinstance(self.ignore_eos, bool), "be true or false"),
            ("logprobs", isinstance(self.logprobs, bool), "be true or false"),
            ("forced", _all(self.forced, int), "be token ids"),
        )
        for field, holds, rule in rules:
            if not holds:
                raise JobError(f"body: {field}", getattr(self, field), f"must {rule}", "correct the request")


def choose(
    logits_RV: Tensor, params: Sequence[SamplingParams], steps: Sequence[int], *, spare_bytes: int | None = None
) -> list[int]:
    """The next token of each request, of which it is the `steps[r]`-th generated.

    A choice depends on the request's logits, parameters and step alone, never on its neighbours:
    where a request's greatest logit is no finite number its choice is NO_TOKEN, and the others are
    not touched by it. With `spare_bytes` on a device, no more requests are sampled at once than
    fit.
    """
    assert len(logits_RV) == len(params) == len(steps), (logits_RV.shape, params, steps)
    tokens = _forced(_most_probable(logits_RV), params, steps)
    rows = [row for row in range(len(params)) if _is_sampled(params[row], steps[row]) and tokens[row] != NO_TOKEN]
    for some in _that_fit(rows, logits_RV, spare_bytes):
        sampled = _sample(logits_RV[some], [params[r] for r in some], [steps[r] for r in some])
        for row, token in zip(some, sampled, strict=True):
            tokens[row] = token
    return tokens


def needs_all_logits(one: SamplingParams, step: int) -> bool:
    """Whether what is told of a choice takes more than the greatest of the logits."""
    return one.logprobs or _is_sampled(one, step)


def greatest_of_part(logits_RC: Tensor, first_token: int) -> Tensor:
    """Of each request the greatest of C logits, those of the tokens from the first on, and its token: [2, R], exact."""
    greatest_R, tokens_R = logits_RC.max(dim=-1)
    return torch.stack([greatest_R.double(), tokens_R.double() + first_token])


def choose_of_parts(greatest_P2R: Tensor, params: Sequence[SamplingParams], steps: Sequence[int]) -> list[int]:
    """What `choose` takes where no request `needs_all_logits`, of the greatest in each of P parts of the vocabulary."""
    # Plain numbers: torch would take longer for so few.
    greatest, tokens = (list(zip(*of_parts, strict=True)) for of_parts in zip(*greatest_P2R.tolist(), strict=True))
    return _forced(list(map(_token_of_greatest, greatest, tokens)), params, steps)


def _token_of_greatest(logits: Sequence[float], tokens: Sequence[float]) -> int:
    """The token of the greatest logit, the first of equals; NO_TOKEN if that is no finite number."""
    if any(map(math.isnan, logits)) or math.isinf(greatest := max(logits)):
        return NO_TOKEN
    return int(tokens[logits.index(greatest)])


def _forced(tokens: list[int], params: Sequence[SamplingParams], steps: Sequence[int]) -> list[int]:
    """The tokens, or those that requests go on with anyway."""
    for row, (one, step) in enumerate(zip(params, steps, strict=True)):
        if step < len(one.forced) and tokens[row] != NO_TOKEN:
            tokens[row] = one.forced[step]
    return tokens


def _most_probable(logits_RV: Tensor) -> list[int]:
    native = kernels()
    if native is not None and native.takes_greatest(logits_RV):
        return native.greatest(logits_RV)
    greatest_R, tokens_R = logits_RV.max(dim=-1)
    # A NaN anywhere in a row is its greatest. Marked on the device: the host waits once.
    is_number_R = greatest_R.abs() < math.inf
    return tokens_R.masked_fill_(is_number_R.logical_not_(), NO_TOKEN).tolist()


def _is_sampled(params: SamplingParams, step: int) -> bool:
    return params.temperature > 0 and step >= len(params.forced)


def log_probabilities(
    logits_RV: Tensor, tokens: Sequence[int], rows: Sequence[int], *, spare_bytes: int | None = None
) -> list[float]:
    """The log probability of the token of each of the rows, by the model's own distribution.

    With `spare_bytes` on a device, no more rows are computed at once than fit.
    """
    found: list[float] = []
    for some in _that_fit(rows, logits_RV, spare_bytes):
        some_RV = logits_RV[some].float()
        chosen_R1 = torch.tensor([[tokens[row]] for row in some], device=logits_RV.device)
        chosen_R = some_RV.gather(1, chosen_R1)[:, 0] - some_RV.logsumexp(dim=-1)
        found += chosen_R.tolist()
    return found


def _that_fit(rows: Sequence[int], logits_RV: Tensor, spare_bytes: int | None) -> Iterator[Sequence[int]]:
    """The rows in pieces, on a device as many at once as there is memory for."""
    at_once = len(rows) or 1
    if spare_bytes is not None and not logits_RV.is_cpu:
        at_once = max(1, spare_bytes // (SAMPLED_BYTES * logits_RV.shape[1]))
    for first in range(0, len(rows), at_once):
        yield rows[first : first + at_once]


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that depends on nothing else, the same on every machine."""
    digest = hashlib.blake2b(f"{seed} {step}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def _sample(logits_RV: Tensor, params: Sequence[SamplingParams], steps: Sequence[int]) -> list[int]:
    """Invert the distribution function of the tokens kept, which are the first ones by probability."""
    column = {"dtype": torch.float64, "device": logits_RV.device}
    temperature_R1 = torch.tensor([[one.temperature] for one in params], **column)
    top_p_R1 = torch.tensor([[one.top_p] for one in params], **column)
    min_p_R1 = torch.tensor([[one.min_p] for one in params], **column)
    vocab = logits_RV.shape[1]
    most = [min(one.top_k, vocab) if one.top_k > 0 else vocab for one in params]
    most_R1 = torch.tensor([[count] for count in most], device=logits_RV.device)
    uniform_R1 = torch.tensor([[uniform(one.seed, step)] for one, step in zip(params, steps, strict=True)], **column)
    sorted_RV, tokens_RV = logits_RV.double().sort(dim=-1, descending=True, stable=True)
    probabilities_RV = ((sorted_RV - sorted_RV[:, :1]) / temperature_R1).softmax(dim=-1)
    reached_RV = probabilities_RV.cumsum(dim=-1)
    mass_R1 = reached_RV.gather(1, most_R1 - 1).masked_fill(most_R1 >= vocab, 1.0)
    last_R1 = (reached_RV < top_p_R1 * mass_R1).sum(dim=-1, keepdim=True)
    likely_R1 = (probabilities_RV >= min_p_R1 * probabilities_RV[:, :1]).sum(dim=-1, keepdim=True)
    last_R1 = torch.minimum(torch.minimum(last_R1, most_R1 - 1), likely_R1 - 1)
    target_R1 = uniform_R1 * reached_RV.gather(1, last_R1)
    chosen_R1 = torch.searchsorted(reached_RV, target_R1, right=True)
    return tokens_RV.gather(1, torch.minimum(chosen_R1, last_R1)).flatten().tolist()


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_integer(value) or isinstance(value, float)


def _all(values: object, kind: type) -> bool:
    return isinstance(values, tuple) and all(isinstance(value, kind) for value in values)
