"""The best policy at every point of a line: throughput against one resource, or one length.

What comes back is a tidy table, one row a point, whose columns name their units.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from hrm.errors import HrmError
from hrm.hardware import HardwareProfile
from hrm.policy import ScheduleName
from hrm.scaling import Resource, with_resource
from hrm.search import SearchResult, Space, search
from hrm.units import parse_bandwidth, parse_bytes, parse_flops, parse_seconds
from hrm.workload import Workload

if TYPE_CHECKING:
    import pandas as pd


class Length(StrEnum):
    """Numbers of a workload, in tokens."""

    PROMPT_LEN = "prompt-len"
    GEN_LEN = "gen-len"

    @property
    def column(self) -> str:
        """Its name in a table."""
        return self.value.replace("-", "_")


Swept = Resource | Length


def swept(name: str) -> Swept:
    """The resource or length of that name; HrmError listing the names if there is none."""
    for kind in (Resource, Length):
        if name in kind.__members__.values():
            return kind(name)
    raise HrmError("--vary", name, f"must be one of {', '.join([*Resource, *Length])}", "choose one of them")


def parse_swept(vary: Swept, text: str, where: str) -> float:
    """A value of what is swept as people write it: `64GB`, `12GB/s`, `65TFLOP/s`, `5us`, `512`.

    Raises UnitError naming `where`, or HrmError for what is no number of tokens.
    """
    match vary:
        case Resource():
            if vary.is_memory:
                return float(parse_bytes(text, where))
            if vary.is_latency:
                return parse_seconds(text, where, zero=True)
            return parse_bandwidth(text, where) if vary.is_bandwidth else parse_flops(text, where)
        case Length():
            # Its digits are counted first: of thousands of them Python makes no number.
            if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < 1:
                raise HrmError(where, text, "must be a positive number of tokens, below 10^9", "write it like 512")
            return float(text)


def between(vary: Swept, low: float, high: float, count: int, *, logarithmic: bool = False) -> list[float]:
    """`count` values from `low` to `high`, evenly spaced, or evenly in the logarithm.

    Lengths and bytes are whole numbers; those that rounding makes equal are given once. Raises
    HrmError if the range is empty.
    """
    if not 0 < low < high < math.inf or count < 2:
        raise HrmError(
            "--from, --to and --points",
            f"<{low:g}, {high:g}, {count}>",
            "must be two or more points from a positive value to a greater one",
            "correct them",
        )
    shares = [index / (count - 1) for index in range(count)]
    if logarithmic:
        values = [low * (high / low) ** share for share in shares]
    else:
        values = [low + (high - low) * share for share in shares]
    whole = isinstance(vary, Length) or vary.is_memory
    return list(dict.fromkeys(float(round(value)) for value in values)) if whole else values


def sweep(
    space: Space,
    *,
    vary: Swept,
    values: Iterable[float],
    schedules: Sequence[ScheduleName] = (ScheduleName.CGOPIPE,),
    on_point: Callable[[], object] | None = None,
) -> "pd.DataFrame":
    """Search the best policy at every value, for every schedule.

    One row a schedule and value, with what is varied in the column `vary.column` and the columns
    of `plan_row`; where nothing fits, numbers are missing and `reason` says why. Longer prompts
    keep the ratio of their longest to their mean. `on_point` is called after each search. Raises
    HrmError for values that no machine or workload can have.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    points = list(values)
    for schedule in schedules:
        for value in points:
            machine, asked = at_value(space.profile, space.workload, vary, value, dtype=space.dtype)
            result = search(replace(space, profile=machine, workload=asked, schedule=schedule))
            rows.append({"schedule": schedule.value, vary.column: value, **plan_row(result)})
            if on_point is not None:
                on_point()
    counts = dict.fromkeys(("batch_size", "micro_batch_size", "num_micro_batches"), "Int64")
    columns = ["schedule", vary.column, *PLAN_COLUMNS]
    return pd.DataFrame(rows, columns=columns).astype(counts)


def at_value(
    profile: HardwareProfile, workload: Workload, vary: Swept, value: float, *, dtype: str
) -> tuple[HardwareProfile, Workload]:
    """The machine and the workload with what is varied at a value."""
    match vary:
        case Resource():
            return with_resource(profile, vary, value, dtype=dtype), workload
        case Length.PROMPT_LEN:
            longest = math.ceil(workload.max_prompt_len * value / workload.prompt_len)
            longest = max(longest, math.ceil(value))
            return profile, replace(workload, prompt_len=value, max_prompt_len=longest)
        case Length.GEN_LEN:
            return profile, replace(workload, gen_len=round(value))


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
