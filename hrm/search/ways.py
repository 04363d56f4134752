"""The entrance of the search; it compares tensor parallelism, in two ways, and a pipeline, of all GPUs and of fewer."""

import time
from dataclasses import replace
from itertools import groupby
from math import inf
from typing import Final

from hrm.gpus import only_gpus, smaller_sets
from hrm.latency import NO_LIMITS
from hrm.search.at_once import bound_at_once
from hrm.search.bound import BUDGET, CLOSE, FEW_REGIONS, LARGEST_BUDGET, NO_BOUND, Bound, greatest
from hrm.search.exhaustive import Exhaustive
from hrm.search.result import OPTIMAL_GAP, Outcome, SearchResult
from hrm.search.solver import Found, Solver
from hrm.search.space import Space
from hrm.search.way import WaySearch, searched, ways_of, with_lengths, without_hope

RUNNER_UPS: Final = 2
_EXHAUSTIVE: Final = Exhaustive()


def search(
    space: Space, solver: Solver = _EXHAUSTIVE, *, runner_ups: int = RUNNER_UPS, bounded: bool = True
) -> SearchResult:
    """The policy with the highest job throughput that fits and meets the limits on waiting times.

    Of those that are as fast to a thousandth, the one with the smallest batch is chosen. With several GPUs, tensor
    parallelism, with experts divided or whole, and a pipeline are searched one after the other unless one of them is
    asked for: the most promising first, and none that a bound shows to be no better than another. Then fewer of the
    GPUs are, see `hrm.gpus.smaller_sets`, which must be faster by more than a thousandth, and whole experts by more
    than a hundredth, as tokens may go to them less evenly than plans are told. The result names all ways of all GPUs,
    and those of fewer that were searched. If nothing is possible or fits, or is better than what is known, the result
    says so; what is only the best that is found, if it need not be `bounded`, takes less time.
    """
    started_s = time.perf_counter()
    ways: list[WaySearch] = []
    for gpus in ((), *([] if space.all_gpus else smaller_sets(space.profile))):
        if len(gpus) == 1 and (space.parallelism, space.expert_division) != (None, None):
            continue  # which is asked of several
        ways += _search(space, gpus, solver, max(ways, key=WaySearch.worth, default=None))
        if any(way.found.interrupted for way in ways):
            break
    fastest = max(ways, key=WaySearch.worth)
    chosen = fastest.with_runner_ups(runner_ups)
    ways[ways.index(fastest)] = chosen
    found = Found.best_of(way.found for way in ways)
    bound = _bound(ways, chosen, found) if bounded else NO_BOUND
    several = [way for way in ways if not way.gpus or way.is_searched] if space.profile.num_gpus > 1 else []
    result = SearchResult(
        solver=solver.name,
        evaluates=solver.evaluates,
        outcome=Outcome.BEST_FOUND if chosen.found.ranked else Outcome.INFEASIBLE,
        best=chosen.best,
        runner_ups=tuple(map(chosen.of_whole, chosen.found.ranked[1 : runner_ups + 1])),
        greatest_tokens_per_s=found.greatest_tokens_per_s,
        bound_tokens_per_s=bound.tokens_per_s,
        evaluations=found.evaluations,
        regions=bound.regions,
        seconds=time.perf_counter() - started_s,
        simulated=found.simulated,
        ways=tuple(map(WaySearch.told, several)),
    )
    if result.best is None:
        might_fit = any(way.hopeless and way.before.tokens_per_s > 0 for way in ways)
        return _not_better(result, space.known_tokens_per_s) if might_fit else _with_advice(result, space)
    if found.interrupted:
        return replace(result, outcome=Outcome.INTERRUPTED)
    return replace(result, outcome=Outcome.OPTIMAL) if result.gap <= OPTIMAL_GAP else result


def _search(space: Space, gpus: tuple[int, ...], solver: Solver, best: WaySearch | None) -> list[WaySearch]:
    """All ways with these GPUs alone, or with all; `best` is the best of others."""
    alone = replace(space, profile=only_gpus(space.profile, gpus)) if gpus else space
    asked = [without_hope(WaySearch.nothing_of(alone, *way, gpus=gpus), best) for way in ways_of(alone)]
    ways = [way.unless_far_behind(best) for way in asked]
    order = sorted(range(len(ways)), key=lambda index: -ways[index].promise()) if len(ways) > 1 else [0]
    for index in order:
        ways[index] = searched(ways[index], solver, best)
        best = max(filter(None, (best, ways[index])), key=WaySearch.worth)
        if ways[index].found.interrupted:
            return ways
    return [with_lengths(way, solver, best) if best and way.lengths and way.is_searched else way for way in ways]


def _bound(ways: list[WaySearch], chosen: WaySearch, found: Found) -> Bound:
    """One on all ways, where what is below that on some is not looked into in others."""
    # No bound is below the greatest closed form, so that of more regions may not show what was found to be optimal.
    may_be_optimal = found.greatest_tokens_per_s * (1 - OPTIMAL_GAP) <= chosen.tokens_per_s
    budget = LARGEST_BUDGET if may_be_optimal else BUDGET
    most_regions = budget if chosen.found.ranked else FEW_REGIONS
    bound = Bound(found.greatest_tokens_per_s, 0)
    for _, alike in groupby(ways, key=lambda way: way.gpus):
        of_gpus = list(alike)
        above = bound
        for way in of_gpus:
            if above.tokens_per_s < inf:
                above = greatest([above, way.bound(above.tokens_per_s, most_regions)])
        if of_gpus[0].gpus and above.tokens_per_s > bound.tokens_per_s * (1 + CLOSE):
            at_once = bound_at_once(of_gpus[0].whole, chosen.best, bound.tokens_per_s)
            above = replace(above, tokens_per_s=min(above.tokens_per_s, max(bound.tokens_per_s, at_once.tokens_per_s)))
        if above.tokens_per_s == inf:
            return NO_BOUND
        bound = above
    return bound


def _not_better(result: SearchResult, known_tokens_per_s: float) -> SearchResult:
    """The result where a bound has shown that nothing is faster than what is known."""
    told = f"must be faster than the {known_tokens_per_s:.4g} tokens/s that are known", "keep the policy that has them"
    return replace(result, outcome=Outcome.NO_BETTER, advice=lambda: told)


def _with_advice(result: SearchResult, space: Space) -> SearchResult:
    """The result where nothing was found, with what to change, which is worked out if it is asked for."""
    all_used = [way for way in result.ways if not way.gpus]
    if all_used and all(way.obstacle for way in all_used):
        obstacles = "; ".join(f"{way.words}: {way.obstacle}" for way in all_used)
        told = f"must be shared by {space.profile.num_gpus} GPUs, and {obstacles}"
        return replace(result, advice=lambda: (told, "ask for another number of GPUs"))
    from hrm.search.remedy import advice, fits_somehow

    too_slow = space.limits != NO_LIMITS and fits_somehow(space)
    outcome = Outcome.TOO_SLOW if too_slow else result.outcome
    return replace(result, outcome=outcome, advice=lambda: advice(space))
