"""Limits on waiting times in a search: what cannot meet them, and what does when simulated.

The closed form is a bound: what is slower than the limit even so need not be simulated. What is not
may still miss the limit by its bubbles; the search is then repeated under a limit that is tighter
by as much.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hrm.closed_form import phases_of_batches
from hrm.costs import Costs
from hrm.search.grid import Grid
from hrm.search.result import SearchResult
from hrm.search.space import Space

ATTEMPTS: Final = 6
_CLOSER: Final = 1.002  # a limit is tightened by a little more than it was missed by


def meets(space: Space, costs: Costs, grid: Grid) -> NDArray[np.bool_]:
    """Whether candidates may meet the space's limits on waiting times, by their closed form."""
    limits, met = space.limits, np.ones(len(grid), bool)
    if not len(grid) or (limits.max_ttft_s is None and limits.max_tpot_s is None):
        return met
    prefill_s, decode_s = phases_of_batches(costs, grid.point(space), space.schedule, space.workload)
    stages, (ttft_slack, tpot_slack) = space.profile.num_stages, space.slack
    if limits.max_ttft_s is not None:
        met &= np.broadcast_to(stages * ttft_slack * prefill_s <= limits.max_ttft_s, met.shape)
    if limits.max_tpot_s is not None and (steps := space.workload.decode_steps):
        tpot_s = stages * tpot_slack * decode_s / steps
        met &= np.broadcast_to(tpot_s <= limits.max_tpot_s, met.shape)
    return met


def within_limits(solve: Callable[[Space], SearchResult]) -> Callable[[Space], SearchResult]:
    """`solve`, repeated under tighter limits while policies that seemed good missed the limits.

    What it finds meets the limits when simulated, whatever the limits under which it was found.
    """

    def solve_within(space: Space) -> SearchResult:
        best = result = solve(space)
        for _ in range(ATTEMPTS - 1):
            if result.overshoot == (1.0, 1.0):
                break
            ttft, tpot = result.overshoot
            ttft_slack, tpot_slack = space.slack
            slack = (ttft_slack * ttft * (_CLOSER if ttft > 1 else 1), tpot_slack * tpot * (_CLOSER if tpot > 1 else 1))
            space = replace(space, slack=slack)
            result = solve(space)
            best = _better(best, result)
        return best

    return solve_within


def _better(first: SearchResult, second: SearchResult) -> SearchResult:
    """The result with the higher throughput, and the work that both took."""
    better = max(first, second, key=lambda result: result.tokens_per_s)
    return replace(
        better,
        evaluations=first.evaluations + second.evaluations,
        seconds=first.seconds + second.seconds,
        simulated=first.simulated + second.simulated,
    )
