"""What throughput costs: in host memory, in time to the last answer, in GPUs.

MoE-Lightning, arXiv 2411.11217, Fig. 1: how much host memory the bound takes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from hrm.analysis.machines import row_by_gpus
from hrm.analysis.rows import OnPoint, search_row, searched, table
from hrm.scaling import Resource, resource_value, with_resource
from hrm.search import Space, search

if TYPE_CHECKING:
    import pandas as pd

POINTS: Final = 12
LEAST_SHARE: Final = 0.25  # of what is planned at the host's level, where its front begins


def front_of_cpu_memory(space: Space, *, on_point: OnPoint = None) -> "pd.DataFrame":
    """The best policy for less and more host memory; `cpu_memory_bytes` and `search_row`'s columns.

    Twelve sizes from the least in which the weights could lie up to what there is.
    """
    profile = space.profile
    most = resource_value(profile, Resource.CPU_MEMORY)
    weights = space.spec.total_layer_bytes(space.formats.weights) - profile.top.usable_bytes
    least = min(max(weights, LEAST_SHARE * most), 0.9 * most)
    sizes = [round(least + (most - least) * i / (POINTS - 1)) for i in range(POINTS)]
    spaces = [replace(space, profile=with_resource(profile, Resource.CPU_MEMORY, size)) for size in sizes]
    rows = [
        {"cpu_memory_bytes": size, **search_row(result, one.profile)}
        for size, (one, result) in zip(sizes, searched(spaces, on_point), strict=True)
    ]
    return table(rows, ("cpu_memory_bytes",))


def front_of_latency(
    space: Space, *, requests: Sequence[int] | None = None, on_point: OnPoint = None
) -> "pd.DataFrame":
    """The best policy for jobs of few and of many requests: seconds until all are answered.

    Columns `num_requests`, `latency_s` and those of `search_row`. Without `requests`, powers of two
    up to the batch that is best for a job without end.
    """

    def of(count: int | None) -> Space:
        return replace(space, workload=replace(space.workload, num_requests=count))

    if requests is None:
        endless = search(of(None)).best
        most = 1 if endless is None else endless.policy.batch_size
        requests = [2**i for i in range(most.bit_length())]
        requests = [*requests, most] if requests[-1] < most else requests
    rows = [
        {
            "num_requests": count,
            "latency_s": None if result.best is None else result.best.seconds,
            **search_row(result, space.profile),
        }
        for count, (_, result) in zip(requests, searched(map(of, requests), on_point), strict=True)
    ]
    return table(rows, ("num_requests", "latency_s"))


def front_of_gpus(spaces: Iterable[Space], *, on_point: OnPoint = None) -> "pd.DataFrame":
    """The best policy with few and many GPUs: `num_gpus`, `tokens_per_s_a_gpu` and the rest."""
    rows = [row_by_gpus(space, result) for space, result in searched(spaces, on_point)]
    return table(rows, ("num_gpus", "tokens_per_s_a_gpu"))
