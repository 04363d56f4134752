"""Where which kind of policy is best: a map over two axes.

MoE-Lightning, arXiv 2411.11217, Fig. 10: a faster link and a faster host, and what then pays.
"""

from typing import TYPE_CHECKING, Any, Final

from hrm.analysis.axis import Axis
from hrm.analysis.rows import OnPoint, search_row, searched, table
from hrm.estimate import Estimate
from hrm.search import Space
from hrm.tasks import Device

if TYPE_CHECKING:
    import pandas as pd

ALL: Final = 0.999


def policy_map(space: Space, *, x: Axis, y: Axis, on_point: OnPoint = None) -> "pd.DataFrame":
    """Search every cell of the map: `x.column`, `y.column`, `region` and `search_row`'s columns.

    `region` says in words where attention and experts run and where weights and KV cache lie; it is
    missing where no policy fits. `weights_offloaded` and `kv_offloaded` are shares.
    """
    cells = [(x_value, y_value) for y_value in y.points for x_value in x.points]
    spaces = (x.at(y.at(space, y_value), x_value) for x_value, y_value in cells)
    rows: list[dict[str, Any]] = []
    for (x_value, y_value), (one, result) in zip(cells, searched(spaces, on_point), strict=True):
        row, best = search_row(result, one.profile), result.best
        rows.append(
            {
                x.column: x_value,
                y.column: y_value,
                "region": None if best is None else region_of(best),
                "weights_offloaded": None if best is None else 1 - row["weight_share_on_gpu"],
                "kv_offloaded": None if best is None else 1 - row["kv_share_on_gpu"],
                **row,
            }
        )
    return table(rows, (x.column, y.column, "region", "weights_offloaded", "kv_offloaded"))


def region_of(best: Estimate) -> str:
    """The kind of a policy in words."""
    policy = best.policy
    if best.weight_share_on_gpu > ALL:
        weights = "weights on the GPU"
    else:
        weights = "weights streamed" if policy.ffn is Device.GPU else "experts on the CPU"
    if policy.kv_share_on_gpu == 1:
        return f"{weights}, KV on the GPU"
    split = " part of" if policy.kv_share_on_gpu > 0 else ""
    if policy.attention is Device.CPU:
        return f"{weights},{split} attention on the CPU"
    return f"{weights},{split} KV streamed"
