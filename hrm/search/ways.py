"""Several GPUs: the best policy in tensor parallel, the best in a pipeline, and which is better."""

from collections.abc import Callable
from dataclasses import replace
from math import ceil

from hrm.estimate import Estimate, estimate
from hrm.parallel import part_of, pipeline_obstacle, tensor_parallel_obstacle
from hrm.policy import Parallelism
from hrm.search.pinning import pinned_or_staged
from hrm.search.result import SearchResult, Way
from hrm.search.space import Space

_OBSTACLES = {
    Parallelism.TENSOR: tensor_parallel_obstacle,
    Parallelism.PIPELINE: pipeline_obstacle,
}


def search_ways(space: Space, solve: Callable[[Space], SearchResult]) -> SearchResult:
    """The better of both ways, `solve` finding the best policy of each; the result names both.

    A machine with one GPU is searched once. If neither way is possible or fits, the result says so.
    """
    gpus, solve = space.profile.num_gpus, pinned_or_staged(solve)
    if gpus == 1:
        return solve(space)
    found: dict[Parallelism, SearchResult] = {}
    ways: list[Way] = []
    for parallelism in Parallelism:
        obstacle = _OBSTACLES[parallelism](space.spec, gpus)
        if not obstacle:
            found[parallelism] = _search_way(space, parallelism, solve)
        best = found[parallelism].best if parallelism in found else None
        ways.append(Way(parallelism=parallelism, best=best, obstacle=obstacle))
    if not found:
        obstacles = "; ".join(f"{way.parallelism.value} parallel: {way.obstacle}" for way in ways)
        return SearchResult.impossible(f"{obstacles}; ask for another number of GPUs", tuple(ways))
    result = max(found.values(), key=_tokens_per_s)
    return replace(
        result,
        ways=tuple(ways),
        evaluations=sum(result.evaluations for result in found.values()),
        seconds=sum(result.seconds for result in found.values()),
        simulated=sum(result.simulated for result in found.values()),
    )


def _tokens_per_s(result: SearchResult) -> float:
    return result.best.tokens_per_s if result.best is not None else 0.0


def _search_way(
    space: Space, parallelism: Parallelism, solve: Callable[[Space], SearchResult]
) -> SearchResult:
    result = solve(_part(space, parallelism))
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


def _part(space: Space, parallelism: Parallelism) -> Space:
    """What one part of the machine has to do: its layers, for its share of the requests."""
    spec, profile = part_of(space.spec, space.profile, parallelism)
    workload = space.workload
    if profile.num_gpus < space.profile.num_gpus and workload.num_requests is not None:
        share = ceil(workload.num_requests / space.profile.num_gpus)
        workload = replace(workload, num_requests=share)
    return replace(space, spec=spec, profile=profile, workload=workload)
