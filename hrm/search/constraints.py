"""Limits on waiting times in a search: what cannot meet them, and what does when simulated.

The closed form is a bound: what is slower than the limit even so need not be simulated. What is not
may still miss the limit by its bubbles; the search is then repeated under a limit that is tighter
by as much.
"""

from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hrm.closed_form import Point, batch_seconds, phases_of_batches
from hrm.policy import Policy
from hrm.search.grid import Grid
from hrm.search.solver import Found
from hrm.search.space import Space

ATTEMPTS: Final = 6
_CLOSER: Final = 1.002  # a limit is tightened by a little more than it was missed by,
_MUCH_CLOSER: Final = 1.1  # and by more and more as long as nothing was found that meets it


def allowed_s(space: Space) -> tuple[float, float]:
    """The most that prefill and decode of one batch may take in closed form; infinite without limits."""
    limits, stages, (ttft_slack, tpot_slack) = space.limits, space.profile.num_stages, space.slack
    prefill_s = inf if limits.max_ttft_s is None else limits.max_ttft_s / (stages * ttft_slack)
    if limits.max_tpot_s is None or not space.workload.decode_steps:
        return prefill_s, inf
    return prefill_s, limits.max_tpot_s * space.workload.decode_steps / (stages * tpot_slack)


def meets(space: Space, grid: Grid) -> NDArray[np.bool_]:
    """Whether candidates may meet the space's limits on waiting times, by their closed form."""
    most_prefill_s, most_decode_s = allowed_s(space)
    if not len(grid) or most_prefill_s == most_decode_s == inf:
        return np.ones(len(grid), bool)
    prefill_s, decode_s = phases_of_batches(space.costs, grid.point(space), space.schedule, space.workload)
    return np.broadcast_to((prefill_s <= most_prefill_s) & (decode_s <= most_decode_s), len(grid))


def may_meet(space: Space, policy: Policy) -> bool:
    """The same of one policy."""
    if allowed_s(space) == (inf, inf):
        return True
    point = Point.of_policy(policy, space.spec)
    prefill_s, decode_s = batch_seconds(space.costs, point, space.schedule, space.workload)
    most_prefill_s, most_decode_s = allowed_s(space)
    return prefill_s <= space.costs.prefills_in_turn * most_prefill_s and decode_s <= most_decode_s


def within_limits(space: Space, find: Callable[[Space], Found]) -> Found:
    """What `find` finds, repeated under tighter limits while what seemed good missed the limits.

    It meets the limits when simulated, whatever the limits under which it was found.
    """
    tried = [find(space)]
    while len(tried) < ATTEMPTS and tried[-1].overshoot != (1.0, 1.0) and not tried[-1].interrupted:
        closer = _CLOSER if any(found.ranked for found in tried) else _MUCH_CLOSER ** len(tried)
        ttft, tpot = (factor * closer if factor > 1 else 1.0 for factor in tried[-1].overshoot)
        space = replace(space, slack=(space.slack[0] * ttft, space.slack[1] * tpot))
        tried.append(find(space))
    return Found.best_of(tried)
