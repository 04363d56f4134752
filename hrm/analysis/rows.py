"""What the questions share: one search as one row, and many rows as a table."""

import signal
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import replace
from multiprocessing import get_context, resource_tracker
from typing import TYPE_CHECKING, Any, Final

from hrm.hardware import HardwareProfile
from hrm.parallel import used_of
from hrm.search import SearchResult, Space, search
from hrm.search.result import no_advice

if TYPE_CHECKING:
    import pandas as pd

OnPoint = Callable[[], object] | None
PLAN_COLUMNS = (
    "tokens_per_s",
    "bound_tokens_per_s",
    "batch_s",
    "ttft_s",
    "time_per_output_token_s",
    "batch_size",
    "micro_batch_size",
    "num_micro_batches",
    "attention",
    "ffn",
    "weight_share_on_gpu",
    "kv_share_on_gpu",
    "bottleneck",
    "prefill_bottleneck",
    "decode_bottleneck",
    "gpu_planned_bytes",
    "cpu_planned_bytes",
    "reason",
)
COLUMNS = ("parallelism", "expert_division", "gpus_used", "policy", *PLAN_COLUMNS)


_PROCESSES: ContextVar[int] = ContextVar("processes", default=1)
_WORTH_S: Final = 3.0  # of searching before others are started, which take half a second


@contextmanager
def in_processes(count: int) -> Generator[None]:
    """Long series of searches are divided among so many processes meanwhile.

    They import the main module anew, so a script must guard what it does with `if __name__ == "__main__":`.
    """
    before = _PROCESSES.set(count)
    try:
        yield
    finally:
        _PROCESSES.reset(before)


def searched(
    spaces: Iterable[Space], on_point: OnPoint, *, each_s: float = 0.0
) -> Iterator[tuple[Space, SearchResult]]:
    """Every space with the best that was found in it, unbounded; `on_point` is called when its row has been made.

    A search is expected to take `each_s`; if that is not known, the first one tells.
    """
    spaces = list(spaces)
    with ExitStack() as stack:
        for space, result in zip(spaces, _results(spaces, each_s, stack), strict=True):
            yield space, result
            if on_point is not None:
                on_point()


def _results(spaces: Sequence[Space], each_s: float, stack: ExitStack) -> Iterator[SearchResult]:
    if spaces and not each_s:
        started_s = time.perf_counter()
        yield _best(spaces[0])
        each_s, spaces = time.perf_counter() - started_s, spaces[1:]
    divide = _PROCESSES.get() > 1 and each_s * len(spaces) > _WORTH_S
    yield from _divided(spaces, stack) if divide else map(_best, spaces)


def _best(space: Space) -> SearchResult:
    return replace(search(space, bounded=False), advice=no_advice)


def _divided(spaces: Sequence[Space], stack: ExitStack) -> Iterator[SearchResult]:
    """The same, in order, by several processes, which are ended with the stack."""
    count = min(_PROCESSES.get(), len(spaces))
    # An interrupt is this process's, which ends the others: they begin with it held back, and none is cut short while
    # it starts. The tracker that they need is there before, for its start lets signals through.
    resource_tracker.ensure_running()
    held = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        pool = stack.enter_context(get_context("spawn").Pool(count))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
    return pool.imap(_best, spaces)


def plan_row(result: SearchResult) -> dict[str, Any]:
    """A search's best policy as one row of a table: exactly `PLAN_COLUMNS`.

    `batch_s` are seconds of one batch, prefill and decode, `ttft_s` those to the last of its first
    tokens, and `time_per_output_token_s` those of a decode step. A bottleneck is what limits (a
    `hrm.causes.Cause`). What is of decode is None where prefill generates all there is; without a
    policy, so is everything but `reason`. None is missing in a table.
    """
    row: dict[str, Any] = dict.fromkeys(PLAN_COLUMNS)
    if result.best is None:
        return {**row, "reason": result.outcome.value}
    best, policy = result.best, result.best.policy
    return {
        **row,
        "tokens_per_s": best.tokens_per_s,
        "bound_tokens_per_s": best.bound_tokens_per_s,
        "batch_s": best.seconds / best.num_batches,
        "ttft_s": best.latency.last_ttft_s,
        "time_per_output_token_s": best.latency.tpot_s,
        "batch_size": policy.batch_size,
        "micro_batch_size": policy.micro_batch_size,
        "num_micro_batches": policy.num_micro_batches,
        "attention": policy.attention.value,
        "ffn": policy.ffn.value,
        "weight_share_on_gpu": best.weight_share_on_gpu,
        "kv_share_on_gpu": policy.kv_share_on_gpu,
        "bottleneck": best.limits.job.cause.value,
        "prefill_bottleneck": best.limits.prefill.cause.value,
        "decode_bottleneck": best.limits.decode.cause.value if best.decode.seconds else None,
        "gpu_planned_bytes": best.memory.gpu.planned_bytes,
        "cpu_planned_bytes": best.memory.cpu.planned_bytes,
        "reason": "",
    }


def search_row(result: SearchResult, profile: HardwareProfile) -> dict[str, Any]:
    """A search as a row: `PLAN_COLUMNS`, the policy's six numbers, and how and how many GPUs share the work."""
    best = result.best
    used = 0 if best is None else used_of(profile, best.policy).num_gpus
    return {
        "parallelism": best.policy.parallelism.value if best is not None and used > 1 else None,
        "expert_division": best.policy.expert_division.value if best is not None and used > 1 else None,
        "gpus_used": used if 0 < used < profile.num_gpus else None,
        "policy": None if best is None else str(best.paper_tuple),
        **plan_row(result),
    }


def table(rows: list[dict[str, Any]], first: Sequence[str]) -> "pd.DataFrame":
    """Rows as a table whose first columns are given; counts stay whole where some are missing."""
    import pandas as pd

    counts = dict.fromkeys(("gpus_used", "batch_size", "micro_batch_size", "num_micro_batches"), "Int64")
    return pd.DataFrame(rows, columns=[*first, *COLUMNS]).astype(counts)
