"""Which upgrade pays: some more of every resource, one at a time."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hrm.analysis.rows import OnPoint, search_row, table
from hrm.errors import HrmError
from hrm.estimate import estimate
from hrm.hardware import HardwareProfile
from hrm.model_spec import ModelSpec
from hrm.scaling import resources, scale
from hrm.search.exhaustive import search
from hrm.workload import Workload

if TYPE_CHECKING:
    import pandas as pd


def what_if(
    spec: ModelSpec, profile: HardwareProfile, workload: Workload, *, factor: float = 1.1,
    dtype: str = "bfloat16", on_point: OnPoint = None, **options: Any,
) -> "pd.DataFrame":  # fmt: skip
    """Search again with `factor` times as much of each resource; what brings most comes first.

    One row a resource with the columns `resource`, `factor`, `change` (share by which tokens/s grow
    with the policy that is then best), `same_policy_change` (with today's policy), `elasticity`
    (relative change of throughput per relative change of the resource), `same_policy`, and those of
    `search_row` for the new policy. `options` go to the search. Raises PolicyError if nothing fits
    the machine as it is, and HrmError for an impossible factor.
    """
    if not 0 < factor < math.inf or factor == 1:
        raise HrmError(
            "factor", factor, "must be positive and other than 1", "give 1.1 for 10 % more"
        )
    today = search(spec, profile, workload, dtype=dtype, **options).require()
    rows: list[dict[str, Any]] = []
    for resource in resources(profile):
        machine = scale(profile, resource, factor)
        result = search(spec, machine, workload, dtype=dtype, **options)
        kept = estimate(spec, today.policy, machine, workload)
        if kept.memory.fits and (
            result.best is None or kept.tokens_per_s > result.best.tokens_per_s
        ):  # a search is no oracle: what was best before may still be
            result = replace(result, best=kept)
        best = result.best
        assert best is not None or factor < 1, "more of a resource never takes what fitted away"
        change = math.nan if best is None else best.tokens_per_s / today.tokens_per_s - 1
        kept_change = kept.tokens_per_s / today.tokens_per_s - 1
        rows.append(
            {
                "resource": resource.value,
                "factor": factor,
                "change": change,
                "same_policy_change": kept_change if kept.memory.fits else math.nan,
                "elasticity": change / (factor - 1),
                "same_policy": best is not None and best.policy == today.policy,
                **search_row(result, spec, machine),
            }
        )
        if on_point is not None:
            on_point()
    rows.sort(key=lambda row: -row["change"] if row["change"] == row["change"] else math.inf)
    columns = (
        "resource", "factor", "change", "same_policy_change", "elasticity", "same_policy",
    )  # fmt: skip
    return table(rows, columns)
