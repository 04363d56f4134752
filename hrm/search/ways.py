"""Several GPUs: the best policy in tensor parallel, the best in a pipeline, and which is better."""

import time
from collections.abc import Callable
from dataclasses import replace
from math import ceil

from hrm.estimate import Estimate, estimate
from hrm.latency import NO_LIMITS
from hrm.parallel import obstacle_to, part_of
from hrm.policy import Parallelism
from hrm.search.bound import upper_bound
from hrm.search.constraints import within_limits
from hrm.search.pinning import pinned_or_staged, spaces_of_pinning
from hrm.search.result import Outcome, SearchResult, Way
from hrm.search.space import Space


def search_ways(space: Space, solve: Callable[[Space], SearchResult]) -> SearchResult:
    """The better of both ways, `solve` finding the best policy of each; the result names both.

    A machine with one GPU is searched once. If neither way is possible or fits, the result says so.
    """
    solve = pinned_or_staged(within_limits(solve))
    gpus = space.profile.num_gpus
    if gpus == 1:
        return _with_advice(_bounded(solve(space), [space]), space)
    found: dict[Parallelism, SearchResult] = {}
    ways: list[Way] = []
    for parallelism in Parallelism:
        obstacle = obstacle_to(parallelism, space.spec, gpus)
        if not obstacle:
            found[parallelism] = _search_way(space, parallelism, solve)
        best = found[parallelism].best if parallelism in found else None
        ways.append(Way(parallelism=parallelism, best=best, obstacle=obstacle))
    if not found:
        obstacles = "; ".join(f"{way.parallelism.value} parallel: {way.obstacle}" for way in ways)
        return SearchResult.impossible(f"must be shared by {gpus} GPUs, and {obstacles}", tuple(ways))
    result = max(found.values(), key=lambda result: result.tokens_per_s)
    result = replace(
        result,
        ways=tuple(ways),
        evaluations=sum(result.evaluations for result in found.values()),
        seconds=sum(result.seconds for result in found.values()),
        simulated=sum(result.simulated for result in found.values()),
        greatest_tokens_per_s=max(result.greatest_tokens_per_s for result in found.values()),
    )
    parts = [space_of_part(space, parallelism) for parallelism in found]
    result = _bounded(result, [part for part in parts if part is not None])
    return _with_advice(result, space)


def _bounded(result: SearchResult, spaces: list[Space]) -> SearchResult:
    """The result with a bound on every policy of the spaces; limits on waiting times have none."""
    if spaces[0].limits != NO_LIMITS:
        return result
    started_s = time.perf_counter()
    bounds = [upper_bound(one, result.greatest_tokens_per_s) for space in spaces for one in spaces_of_pinning(space)]
    return result.bounded(
        max(bound.tokens_per_s for bound in bounds),
        sum(bound.regions for bound in bounds),
        time.perf_counter() - started_s,
    )


def _with_advice(result: SearchResult, space: Space) -> SearchResult:
    """The result with what to change, which is worked out if it is asked for."""
    if result.best is not None:
        return result
    from hrm.search.remedy import advice, fits_somehow

    too_slow = space.limits != NO_LIMITS and fits_somehow(space)
    outcome = Outcome.TOO_SLOW if too_slow else result.outcome
    return replace(result, outcome=outcome, advice=lambda: advice(space))


def _search_way(space: Space, parallelism: Parallelism, solve: Callable[[Space], SearchResult]) -> SearchResult:
    part = space_of_part(space, parallelism)
    assert part is not None
    result = solve(part)
    if parallelism is Parallelism.TENSOR:
        return result

    def whole(of_part: Estimate) -> Estimate:
        policy = replace(of_part.policy, parallelism=parallelism)
        if space.workload.num_requests is None:  # one batch, which takes the whole as long
            return replace(of_part, policy=policy)
        return estimate(space.spec, policy, space.profile, space.workload)

    return replace(
        result,
        best=None if result.best is None else whole(result.best),
        runner_ups=tuple(whole(runner_up) for runner_up in result.runner_ups),
    )


def space_of_part(space: Space, parallelism: Parallelism) -> Space | None:
    """What one part of the machine has to do: its layers, for its share of the requests.

    None if the model cannot be divided like that; all of it on a machine with one GPU.
    """
    if obstacle_to(parallelism, space.spec, space.profile.num_gpus):
        return None
    spec, profile = part_of(space.spec, space.profile, parallelism)
    workload = space.workload
    if profile.num_gpus < space.profile.num_gpus and workload.num_requests is not None:
        share = ceil(workload.num_requests / space.profile.num_gpus)
        workload = replace(workload, num_requests=share)
    return replace(space, spec=spec, profile=profile, workload=workload)
