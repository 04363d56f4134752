"""What the questions share: one search as one row, and many rows as a table."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hrm.hardware import HardwareProfile
from hrm.search import SearchResult, Space, search
from hrm.sweep import PLAN_COLUMNS, plan_row

if TYPE_CHECKING:
    import pandas as pd

OnPoint = Callable[[], object] | None
COLUMNS = ("parallelism", "policy", *PLAN_COLUMNS)


def searched(spaces: Iterable[Space], on_point: OnPoint) -> Iterator[tuple[Space, SearchResult]]:
    """Every space with what was found in it; `on_point` is called when its row has been made."""
    for space in spaces:
        yield space, search(space)
        if on_point is not None:
            on_point()


def search_row(result: SearchResult, profile: HardwareProfile) -> dict[str, Any]:
    """A search as a row: `PLAN_COLUMNS`, the policy's six numbers and how GPUs share the work."""
    best = result.best
    several = best is not None and profile.num_gpus > 1
    return {
        "parallelism": best.policy.parallelism.value if best is not None and several else None,
        "policy": None if best is None else str(best.paper_tuple),
        **plan_row(result),
    }


def table(rows: list[dict[str, Any]], first: Sequence[str]) -> "pd.DataFrame":
    """Rows as a table whose first columns are given; counts stay whole where some are missing."""
    import pandas as pd

    counts = dict.fromkeys(("batch_size", "micro_batch_size", "num_micro_batches"), "Int64")
    return pd.DataFrame(rows, columns=[*first, *COLUMNS]).astype(counts)
