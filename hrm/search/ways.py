"""The entrance of the search; of several GPUs it compares tensor parallelism, in two ways, and a pipeline."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from math import ceil, inf
from typing import Final

from hrm.errors import PolicyError
from hrm.estimate import Estimate
from hrm.gpus import only_gpus, sets_of_kinds
from hrm.latency import NO_LIMITS
from hrm.layers import ExpertDivision
from hrm.parallel import obstacle_to, part_of
from hrm.policy import Parallelism
from hrm.search.bound import CLOSE, Bound, upper_bound
from hrm.search.choose import TIE, ranked
from hrm.search.constraints import within_limits
from hrm.search.exhaustive import Exhaustive
from hrm.search.polish import polished
from hrm.search.result import OPTIMAL_GAP, Outcome, SearchResult, Way
from hrm.search.solver import Found, Solver
from hrm.search.space import Space
from hrm.search.stages import Lengths, first_lengths, least_stage, search_stages
from hrm.search.ties import smallest_first

RUNNER_UPS: Final = 2
_EXHAUSTIVE: Final = Exhaustive()
_EVENLY: Final = 0.01  # by more than this whole experts must be faster, as tokens may go to them less evenly
_LENGTHS_GAIN: Final = (
    1.5  # more than lengths of their own have brought beside even ones: 1.26 at most of what was tried
)
_WORK: Final = ("evaluations", "regions", "seconds", "simulated")  # that searches took


def search(space: Space, solver: Solver = _EXHAUSTIVE, *, runner_ups: int = RUNNER_UPS) -> SearchResult:
    """The policy with the highest job throughput that fits and meets the limits on waiting times.

    Of those that are as fast to a thousandth, the one with the smallest batch is chosen. With
    several GPUs, tensor parallelism, with experts divided or whole, and a pipeline are searched one after
    the other unless one of them is asked for, and the result names all. Whole experts must be faster than
    divided ones by more than a hundredth, as tokens may go to them less evenly than plans are told. GPUs
    that are not all alike are searched without those of some kinds as well. If nothing is possible or fits,
    the result says so.
    """
    found = _search(space, solver, runner_ups)
    for gpus in sets_of_kinds(space.profile):
        if len(gpus) == 1 and (space.parallelism, space.expert_division) != (None, None):
            continue  # which is asked of several
        fewer = _search(replace(space, profile=only_gpus(space.profile, gpus)), solver, runner_ups)
        found = _either(found, fewer, gpus)
    return found


def _either(all_used: SearchResult, fewer: SearchResult, gpus: tuple[int, ...]) -> SearchResult:
    """The better of what was found with all GPUs (or others) and with these alone, and how both were found."""

    def with_gpus(predicted: Estimate) -> Estimate:
        return replace(predicted, policy=replace(predicted.policy, gpus=gpus))

    ways = [replace(way, best=way.best and with_gpus(way.best), gpus=gpus) for way in fewer.ways]
    best = fewer.best and with_gpus(fewer.best)
    ways = ways or [Way(Parallelism.TENSOR, best, gpus=gpus)]
    chosen = all_used
    if fewer.tokens_per_s > all_used.tokens_per_s * (1 + TIE):
        chosen = replace(fewer, best=best, runner_ups=tuple(map(with_gpus, fewer.runner_ups)))
    return replace(
        chosen,
        greatest_tokens_per_s=max(all_used.greatest_tokens_per_s, fewer.greatest_tokens_per_s),
        bound_tokens_per_s=max(all_used.bound_tokens_per_s, fewer.bound_tokens_per_s),
        outcome=Outcome.BEST_FOUND if chosen.outcome is Outcome.OPTIMAL else chosen.outcome,
        **{name: getattr(all_used, name) + getattr(fewer, name) for name in _WORK},
        ways=(*all_used.ways, *ways),
    )


def _search(space: Space, solver: Solver, runner_ups: int) -> SearchResult:
    """The same with all GPUs of the space."""
    started_s = time.perf_counter()
    several = space.profile.num_gpus > 1
    ways: list[_Searched] = []
    for way, division in ways_of(space):
        best = max((one for one in ways if one.best), key=lambda one: one.tokens_per_s, default=None)
        ways.append(_searched(space, way, division, solver, best))
    fastest = max(ways, key=lambda way: way.tokens_per_s / (1 + _EVENLY * (way.division is ExpertDivision.WHOLE)))
    chosen = fastest.with_runner_ups(runner_ups)
    ways[ways.index(fastest)] = chosen
    found = Found.best_of(way.found for way in ways)
    bound = _greatest(way.bound or _bound(way.spaces, found.greatest_tokens_per_s) for way in ways)
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
        ways=tuple(map(_Searched.told, ways)) if several else (),
    )
    if result.best is None:
        return _with_advice(result, space)
    if found.interrupted:
        return replace(result, outcome=Outcome.INTERRUPTED)
    return replace(result, outcome=Outcome.OPTIMAL) if result.gap <= OPTIMAL_GAP else result


@dataclass(frozen=True, kw_only=True)
class _Searched:
    """One way to share the GPUs of `whole`, and what was found for a part of them.

    `part` is None if the model cannot be divided like that, which `obstacle` then says, and where what
    was found is of all stages together. `spaces` are what was searched of it, or what only the `bound` is of
    if it `is_hopeless`.
    """

    parallelism: Parallelism
    division: ExpertDivision
    obstacle: str
    whole: Space
    part: Space | None
    spaces: Sequence[Space]
    found: Found
    bound: Bound | None = None
    is_hopeless: bool = False

    @cached_property
    def best(self) -> Estimate | None:
        """What the best policy does on the whole machine."""
        return self.of_whole(self.found.ranked[0]) if self.found.ranked else None

    @property
    def tokens_per_s(self) -> float:
        """Its throughput; 0 if there is none."""
        return 0.0 if self.best is None else self.best.tokens_per_s

    def told(self) -> Way:
        """The way with the best policy so."""
        at_most = self.bound.tokens_per_s if self.bound is not None and self.is_hopeless else 0.0
        way = Way(self.parallelism, self.best, self.obstacle, expert_division=self.division)
        return replace(way, at_most_tokens_per_s=at_most)

    def of_whole(self, of_part: Estimate) -> Estimate:
        """What a part's policy does where the whole machine is so divided."""
        if self.parallelism is Parallelism.TENSOR or of_part.stages:
            return of_part
        policy = replace(of_part.policy, parallelism=self.parallelism)
        if self.whole.workload.num_requests is None:  # one batch, which takes the whole as long
            return replace(of_part, policy=policy)
        return self.whole.predicted(policy)

    def with_runner_ups(self, count: int) -> "_Searched":
        """The same with so many runner-ups simulated; one that is as fast and smaller is chosen."""
        ranking = self.found.ranked
        if self.part is None or not ranking:
            return self
        known = {predicted.policy for predicted in ranking}
        others = (predicted for predicted in self.found.more() if predicted.policy not in known)
        again = ranked([*ranking, *islice(others, max(0, count + 1 - len(ranking)))])
        if again[0] is not ranking[0]:
            again = smallest_first(self.part.holding(again[0].policy), again)
        simulated = self.found.simulated + len(again) - len(ranking)
        return replace(self, found=replace(self.found, ranked=again, simulated=simulated))


def ways_of(space: Space) -> tuple[tuple[Parallelism, ExpertDivision], ...]:
    """The ways to share the GPUs that are asked for, one for a single GPU."""
    inner, whole = ExpertDivision
    asked = space.expert_division
    ways = ((Parallelism.TENSOR, inner), (Parallelism.TENSOR, whole), (Parallelism.PIPELINE, inner))
    if space.profile.num_gpus == 1:
        return ways[:1]
    if asked is not None and space.parallelism is Parallelism.PIPELINE:
        rule = "is how tensor parallelism divides experts, of which stages of a pipeline have all"
        raise PolicyError("--expert-division", asked.value, rule, "leave it out, or --parallelism")
    divides = Parallelism.TENSOR if asked is not None else space.parallelism
    return tuple(way for way in ways if divides in {None, way[0]} and (asked is None or way[1] is asked))


def _searched(
    space: Space, parallelism: Parallelism, division: ExpertDivision, solver: Solver, best: _Searched | None
) -> _Searched:
    """What is found in one way, where `best` is the best of others.

    Whole experts and stages' lengths are not searched if a bound shows that they cannot be better than that.
    """
    part = space_of_part(space, parallelism, division)
    alike = _Searched(
        parallelism=parallelism,
        division=division,
        obstacle=obstacle_to(parallelism, space.spec, space.profile.num_gpus, division),
        whole=space,
        part=part,
        spaces=(),
        found=Found(),
    )
    if part is None:
        return alike
    known = 0.0 if best is None else best.tokens_per_s
    if division is ExpertDivision.WHOLE and best is not None:
        spaces = _tried(part, best.found)
        bound = _bound(spaces, known)
        if bound.tokens_per_s <= known * (1 + _EVENLY):
            return replace(alike, spaces=spaces, bound=bound, is_hopeless=True)
    found, spaces = _found(part, solver)
    alike = replace(alike, spaces=spaces, found=found)
    lengths = first_lengths(space) if parallelism is Parallelism.PIPELINE and space.profile.num_gpus > 1 else None
    return _with_lengths(alike, part, lengths, solver, known) if lengths else alike


def _with_lengths(
    alike: _Searched, part: Space, lengths: Lengths, solver: Solver, known_tokens_per_s: float
) -> _Searched:
    """A pipeline whose stages have lengths of their own, or that which is planned by one stage if it is as good.

    GPUs that are not alike can only have the first. Where even stages are far behind another way, lengths are not
    searched.
    """
    space, least = alike.whole, least_stage(alike.whole, part)
    if least is None or space.limits != NO_LIMITS:
        alike = replace(alike, bound=Bound(inf, 0))
    else:
        best = alike.found.ranked[0].policy if alike.found.ranked else None
        known = max(known_tokens_per_s, alike.tokens_per_s)
        bound = _bound([*least.of_pinning(), *least.in_parts(best)], known)
        alike = replace(alike, bound=bound)
        if bound.tokens_per_s <= known * (1 + CLOSE):
            return alike
    if not space.profile.gpus and 0 < _LENGTHS_GAIN * alike.tokens_per_s < known_tokens_per_s:
        return alike
    own = search_stages(space, lengths, alike.found, lambda stage: _found(stage, solver)[0])
    if space.profile.gpus or own.tokens_per_s > alike.tokens_per_s * (1 + TIE):
        return replace(alike, part=None, found=own)
    return replace(alike, found=Found.best_of([alike.found, replace(own, ranked=())]))


def _tried(part: Space, found: Found) -> list[Space]:
    """What is searched for one part of the machine: with weights staged and, going by what was found, in parts, too."""
    return [*part.of_pinning(), *part.in_parts(found.ranked[0].policy if found.ranked else None)]


def _found(part: Space, solver: Solver) -> tuple[Found, list[Space]]:
    """What a solver finds for one part of the machine, and where: with weights staged or in parts if that is better."""

    def find_in(one: Space) -> Found:
        return within_limits(one, lambda tighter: find(tighter, solver))

    found = Found.best_of(map(find_in, part.of_pinning()))
    spaces = _tried(part, found)
    in_parts = [space for space in spaces if space.experts_per_part != part.experts_per_part]
    if in_parts:
        found = Found.best_of([found, *map(find_in, in_parts)])
    return found, spaces


def find(space: Space, solver: Solver) -> Found:
    """What a solver finds in one space, polished, and of near ties the smallest first."""
    found = solver.find(space)
    ranking = smallest_first(space, polished(space, found.ranked, found.greatest_tokens_per_s))
    return replace(found, ranked=ranking, simulated=found.simulated + len(ranking) - len(found.ranked))


def _bound(searched: Sequence[Space], known_tokens_per_s: float) -> Bound:
    """A bound on what was searched; with limits on waiting times there is none."""
    if any(one.limits != NO_LIMITS for one in searched):
        return Bound(inf, 0)
    return _greatest(upper_bound(one, known_tokens_per_s) for one in searched)


def _greatest(bounds: Iterable[Bound]) -> Bound:
    """One on all of what these are on."""
    bounds = list(bounds)
    tokens_per_s = max((bound.tokens_per_s for bound in bounds), default=0.0)
    return Bound(tokens_per_s, sum(bound.regions for bound in bounds))


def _with_advice(result: SearchResult, space: Space) -> SearchResult:
    """The result where nothing was found, with what to change, which is worked out if it is asked for."""
    if result.ways and all(way.obstacle for way in result.ways):
        obstacles = "; ".join(f"{way.words}: {way.obstacle}" for way in result.ways)
        told = f"must be shared by {space.profile.num_gpus} GPUs, and {obstacles}"
        return replace(result, advice=lambda: (told, "ask for another number of GPUs"))
    from hrm.search.remedy import advice, fits_somehow

    too_slow = space.limits != NO_LIMITS and fits_somehow(space)
    outcome = Outcome.TOO_SLOW if too_slow else result.outcome
    return replace(result, outcome=outcome, advice=lambda: advice(space))


def space_of_part(
    space: Space, parallelism: Parallelism, division: ExpertDivision = ExpertDivision.INNER
) -> Space | None:
    """What one part of the machine has to do: a rank's, or a stage's layers for its share of the requests.

    None if the model cannot be divided like that; all of it on a machine with one GPU.
    """
    if obstacle_to(parallelism, space.spec, space.profile.num_gpus, division):
        return None
    spec, profile = part_of(space.spec, space.profile, parallelism, division)
    workload = space.workload
    if profile.num_stages > 1 and workload.num_requests is not None:
        share = ceil(workload.num_requests / profile.num_stages)
        workload = replace(workload, num_requests=share)
    return replace(space, spec=spec, profile=profile, workload=workload, expert_division=division)
