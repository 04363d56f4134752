"""Which machine: the best policy on each of several."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from hrm.analysis.rows import OnPoint, search_row, table
from hrm.hardware import HardwareProfile
from hrm.model_spec import ModelSpec
from hrm.search.exhaustive import search
from hrm.workload import Workload

if TYPE_CHECKING:
    import pandas as pd


def compare_machines(
    spec: ModelSpec,
    machines: Iterable[HardwareProfile],
    workload: Workload,
    *,
    dtype: str | None = None,
    on_point: OnPoint = None,
    **options: Any,
) -> "pd.DataFrame":
    """Search the best policy on every machine; the fastest machine comes first.

    One row a machine with the columns `machine`, `num_gpus`, `dtype`, `tokens_per_s_a_gpu` and
    those of `search_row`; where nothing fits, numbers are missing and `reason` says why. Without a
    `dtype`, each machine takes the 16-bit one that its GPU has. `options` go to the search.
    """
    rows: list[dict[str, Any]] = []
    for machine in machines:
        chosen = dtype or machine.default_dtype
        result = search(spec, machine, workload, dtype=chosen, **options)
        row = search_row(result, machine)
        rate = row["tokens_per_s"]
        rows.append(
            {
                "machine": machine.name,
                "num_gpus": machine.num_gpus,
                "dtype": chosen,
                "tokens_per_s_a_gpu": None if rate is None else rate / machine.num_gpus,
                **row,
            }
        )
        if on_point is not None:
            on_point()
    rows.sort(key=lambda row: -(row["tokens_per_s"] or 0.0))
    return table(rows, ("machine", "num_gpus", "dtype", "tokens_per_s_a_gpu"))
