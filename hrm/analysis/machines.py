"""Which machine: the best policy on each of several."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from hrm.analysis.rows import OnPoint, search_row, searched, table
from hrm.search import SearchResult, Space

if TYPE_CHECKING:
    import pandas as pd


def compare_machines(spaces: Iterable[Space], *, on_point: OnPoint = None) -> "pd.DataFrame":
    """Search the best policy in every space, one a machine; the fastest machine comes first.

    One row a machine with the columns `machine`, `num_gpus`, `dtype`, `tokens_per_s_a_gpu` and
    those of `search_row`; where nothing fits, numbers are missing and `reason` says why.
    """
    rows: list[dict[str, Any]] = [
        {"machine": space.profile.name, "dtype": space.dtype, **row_by_gpus(space, result)}
        for space, result in searched(spaces, on_point)
    ]
    rows.sort(key=lambda row: -(row["tokens_per_s"] or 0.0))
    return table(rows, ("machine", "num_gpus", "dtype", "tokens_per_s_a_gpu"))


def row_by_gpus(space: Space, result: SearchResult) -> dict[str, Any]:
    """`search_row` with `num_gpus` and `tokens_per_s_a_gpu`."""
    row, num_gpus = search_row(result, space.profile), space.profile.num_gpus
    rate = row["tokens_per_s"]
    return {"num_gpus": num_gpus, "tokens_per_s_a_gpu": None if rate is None else rate / num_gpus, **row}
