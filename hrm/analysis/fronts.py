"""What throughput costs: in host memory, in time to the last answer, in GPUs.

MoE-Lightning, arXiv 2411.11217, Fig. 1: how much host memory the bound takes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from hrm.analysis.rows import OnPoint, search_row, table
from hrm.formats import FORMATS
from hrm.hardware import HardwareProfile
from hrm.model_spec import ModelSpec
from hrm.scaling import Resource, resource_value, with_resource
from hrm.search.exhaustive import search
from hrm.workload import Workload

if TYPE_CHECKING:
    import pandas as pd

POINTS: Final = 12
LEAST_SHARE: Final = 0.25  # of what is planned at the host's level, where its front begins
LARGEST_BATCH: Final = 4096  # where a batch has no end of its own, the latency front ends here


def front_of_cpu_memory(
    spec: ModelSpec,
    profile: HardwareProfile,
    workload: Workload,
    *,
    dtype: str = "bfloat16",
    values: Iterable[float] | None = None,
    on_point: OnPoint = None,
    **options: Any,
) -> "pd.DataFrame":
    """The best policy for less and more host memory; `cpu_memory_bytes` and `search_row`'s columns.

    Without `values`, twelve from the least in which the weights could lie up to what there is.
    """
    if values is None:
        most = resource_value(profile, Resource.CPU_MEMORY)
        weights = spec.total_layer_bytes(FORMATS[dtype]) - profile.top.usable_bytes
        least = min(max(weights, LEAST_SHARE * most), 0.9 * most)
        values = [least + (most - least) * i / (POINTS - 1) for i in range(POINTS)]
    rows: list[dict[str, Any]] = []
    for value in values:
        machine = with_resource(profile, Resource.CPU_MEMORY, round(value))
        result = search(spec, machine, workload, dtype=dtype, **options)
        rows.append({"cpu_memory_bytes": round(value), **search_row(result, machine)})
        if on_point is not None:
            on_point()
    return table(rows, ("cpu_memory_bytes",))


def front_of_latency(
    spec: ModelSpec,
    profile: HardwareProfile,
    workload: Workload,
    *,
    dtype: str = "bfloat16",
    requests: Sequence[int] | None = None,
    on_point: OnPoint = None,
    **options: Any,
) -> "pd.DataFrame":
    """The best policy for jobs of few and of many requests: seconds until all are answered.

    Columns `num_requests`, `latency_s` and those of `search_row`. Without `requests`, powers of two
    up to the batch that is best for a job without end.
    """
    if requests is None:
        endless = search(spec, profile, replace(workload, num_requests=None), dtype=dtype, **options)
        most = endless.best.policy.batch_size if endless.best is not None else 1
        requests = [2**i for i in range(most.bit_length())]
        requests = [*requests, most] if requests[-1] < most else requests
    rows: list[dict[str, Any]] = []
    for count in requests:
        result = search(spec, profile, replace(workload, num_requests=count), dtype=dtype, **options)
        latency_s = None if result.best is None else result.best.seconds
        row = search_row(result, profile)
        rows.append({"num_requests": count, "latency_s": latency_s, **row})
        if on_point is not None:
            on_point()
    return table(rows, ("num_requests", "latency_s"))


def front_of_gpus(
    spec: ModelSpec,
    machines: Iterable[HardwareProfile],
    workload: Workload,
    *,
    dtype: str = "bfloat16",
    on_point: OnPoint = None,
    **options: Any,
) -> "pd.DataFrame":
    """The best policy with few and many GPUs: `num_gpus`, `tokens_per_s_a_gpu` and the rest."""
    rows: list[dict[str, Any]] = []
    for machine in machines:
        result = search(spec, machine, workload, dtype=dtype, **options)
        row = search_row(result, machine)
        rate = row["tokens_per_s"]
        each = None if rate is None else rate / machine.num_gpus
        rows.append({"num_gpus": machine.num_gpus, "tokens_per_s_a_gpu": each, **row})
        if on_point is not None:
            on_point()
    return table(rows, ("num_gpus", "tokens_per_s_a_gpu"))
