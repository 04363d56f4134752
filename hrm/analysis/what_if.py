"""Which upgrade pays: some more of every resource, one at a time."""

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hrm.analysis.rows import OnPoint, search_row, searched, table
from hrm.causes import Cause
from hrm.errors import HrmError
from hrm.estimate import Estimate
from hrm.hardware import HardwareProfile
from hrm.policy import Policy
from hrm.scaling import at_cost, resources
from hrm.search import SearchResult, Space, search

if TYPE_CHECKING:
    import pandas as pd


def what_if(space: Space, *, factor: float = 1.1, on_point: OnPoint = None) -> "pd.DataFrame":
    """Search again with `factor` times as much of each resource; what brings most comes first.

    Of a latency it is that much less. The row `waiting` is of the time in which no lane is busy all
    the time, with today's policy. One row a resource with the columns `resource`, `factor` (how
    much there is then of what there was), `change` (share by which tokens/s grow with the policy
    that is then best), `same_policy_change` (with today's policy), `elasticity` (relative change of
    throughput per relative change of the resource), `same_policy`, and those of `search_row` for
    the new policy. Nothing is looked for that is better than today's policy by less than two thousandths. Raises
    PolicyError if nothing fits the machine as it is, and HrmError for an impossible factor.
    """
    if not 0 < factor < math.inf or factor == 1:
        raise HrmError("factor", factor, "must be positive and other than 1", "give 1.1 for 10 % more")
    found = search(space, bounded=False)
    today = found.require()
    rows = [_waiting_row(found, today, space.profile, factor)]
    varied = resources(space.profile)
    machines = [replace(space, profile=at_cost(space.profile, resource, 1 / factor)) for resource in varied]
    keeping = [_allowed(machine, today.policy) for machine in machines]
    spaces = [
        replace(machine, known_tokens_per_s=0.0 if kept is None else kept.tokens_per_s)
        for machine, kept in zip(machines, keeping, strict=True)
    ]
    changed_searches = searched(spaces, on_point, each_s=found.seconds)
    for resource, kept, (changed, result) in zip(varied, keeping, changed_searches, strict=True):
        # Nothing is found where today's policy is still as good as any.
        known = [one for one in (kept, result.best) if one is not None]
        best = max(known, key=lambda one: one.tokens_per_s, default=None)
        assert best is not None or factor < 1, "more of a resource never takes what fitted away"
        change = math.nan if best is None else best.tokens_per_s / today.tokens_per_s - 1
        kept_change = math.nan if kept is None else kept.tokens_per_s / today.tokens_per_s - 1
        times = 1 / factor if resource.is_latency else factor
        rows.append(
            {
                "resource": resource.value,
                "factor": times,
                "change": change,
                "same_policy_change": kept_change,
                "elasticity": change / (times - 1),
                "same_policy": best is not None and best.policy == today.policy,
                **search_row(replace(result, best=best), changed.profile),
            }
        )
    rows.sort(key=lambda row: -row["change"] if row["change"] == row["change"] else math.inf)
    columns = ("resource", "factor", "change", "same_policy_change", "elasticity", "same_policy")
    return table(rows, columns)


def _allowed(space: Space, policy: Policy) -> Estimate | None:
    """What a policy does, if it fits and meets the limits on waiting times."""
    predicted = space.predicted(policy)
    return predicted if predicted.memory.fits and space.limits.are_met(predicted.latency) else None


def _waiting_row(found: SearchResult, today: Estimate, profile: HardwareProfile, factor: float) -> dict[str, Any]:
    """What less waiting for one another would bring; it has no price, but it is a limit."""
    less = 1 / factor
    seconds = today.seconds - (1 - less) * today.limits.job.waiting_s
    change = today.seconds / seconds - 1
    return {
        "resource": Cause.WAITING.value,
        "factor": less,
        "change": change,
        "same_policy_change": change,
        "elasticity": change / (less - 1),
        "same_policy": True,
        **search_row(found, profile),
        "tokens_per_s": today.generated_tokens / seconds,
    }
