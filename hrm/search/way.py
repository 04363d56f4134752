"""One way for some of a machine's GPUs to share a model: what is searched of it, what is found, and a bound on it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from math import ceil
from typing import Final

from hrm.errors import PolicyError
from hrm.estimate import Estimate
from hrm.latency import NO_LIMITS
from hrm.layers import ExpertDivision
from hrm.parallel import obstacle_to, part_of
from hrm.policy import Parallelism, Policy
from hrm.search.bound import CLOSE, FEW_REGIONS, LARGEST_BUDGET, NO_BOUND, Bound, Bounding, greatest
from hrm.search.choose import TIE, ranked
from hrm.search.constraints import within_limits
from hrm.search.exhaustive import rough
from hrm.search.lengths import search_lengths
from hrm.search.polish import polished
from hrm.search.result import Way
from hrm.search.solver import Found, Solver
from hrm.search.space import Space
from hrm.search.stages import Lengths, different_stages, first_lengths, least_stage
from hrm.search.ties import smallest_first

_EVENLY: Final = 0.01  # by more than this whole experts must be faster, as tokens may go to them less evenly
# More than lengths of their own have brought beside even ones: 1.26 at most of what was tried.
_LENGTHS_GAIN: Final = 1.3
_ROUGHLY: Final = 1.75  # what is found was at most 1.74 times what was roughly to be expected, of 114 ways


@dataclass(frozen=True, kw_only=True)
class WaySearch:
    """One way to share the GPUs of `whole`, and what was found for a part of them.

    These are `gpus` of the machine alone, by their numbers, or all that it has if none are given.
    `part` is None if the model cannot be divided like that, which `obstacle` then says, and where what
    was found is of all stages together. `spaces` are what a bound on it is of, None if there is none to be had.
    A pipeline whose stages may have `lengths` of their own is told which to begin with. The bound that was found
    `before` a search is of all of it. If it has shown that others are better, the way is `hopeless` and was not
    searched, nor were kinds of policies of which it has shown this; one of fewer GPUs that is `far_behind` was not,
    either. `boundings` are those of spaces that have begun.
    """

    parallelism: Parallelism
    division: ExpertDivision
    obstacle: str
    whole: Space
    part: Space | None
    lengths: Lengths
    gpus: tuple[int, ...] = ()
    spaces: Sequence[Space] | None = ()
    found: Found = field(default_factory=Found)
    before: Bound = NO_BOUND
    hopeless: bool = False
    far_behind: bool = False
    boundings: list[tuple[Space, Bounding]] = field(default_factory=list[tuple[Space, Bounding]])

    @staticmethod
    def nothing_of(
        space: Space, parallelism: Parallelism, division: ExpertDivision, *, gpus: tuple[int, ...] = ()
    ) -> "WaySearch":
        """The way before anything of it was searched."""
        several = space.profile.num_gpus
        part = space_of_part(space, parallelism, division)
        in_stages = part is not None and parallelism is Parallelism.PIPELINE and several > 1
        way = WaySearch(
            parallelism=parallelism,
            division=division,
            obstacle=obstacle_to(parallelism, space.spec, several, division),
            whole=space,
            part=part,
            lengths=first_lengths(space) if in_stages else (),
            gpus=gpus,
        )
        return way.with_spaces(None)

    def with_spaces(self, best: Policy | None) -> "WaySearch":
        """The same with what a bound on it is of, going by the best policy that was found, if any was."""
        bounded = least_stage(self.whole, self.part) if self.lengths and self.part is not None else self.part
        if bounded is None:
            return replace(self, spaces=() if self.part is None else None)
        return replace(self, spaces=[*bounded.of_pinning(), *bounded.in_parts(best)])

    def bound(self, known_tokens_per_s: float, most_regions: int = LARGEST_BUDGET) -> Bound:
        """A bound on all of it; with limits on waiting times there is none."""
        if self.hopeless:
            return self.before
        if self.spaces is None or self.whole.limits != NO_LIMITS:
            return NO_BOUND
        return greatest(self._bounding(one).go_on(known_tokens_per_s, most_regions) for one in self.spaces)

    def _bounding(self, space: Space) -> Bounding:
        """That of one of the spaces, which goes on where it stopped."""
        if not any(known == space for known, _ in self.boundings):
            self.boundings.append((space, Bounding(space)))
        return next(bounding for known, bounding in self.boundings if known == space)

    def promise(self) -> float:
        """About the throughput that a search will find, by which it is decided what is searched first."""
        return 0.0 if self.part is None or not self.is_searched else rough(self.part) / self.handicap

    def unless_far_behind(self, best: "WaySearch | None") -> "WaySearch":
        """The same; if it is of fewer GPUs, not to be searched if far less is to be expected than `best` does.

        Of unequal GPUs too little is expected, as one stage stands for all.
        """
        if not self.gpus or best is None or self.hopeless or self.part is None or self.whole.profile.gpus:
            return self
        most = rough(self.part, all_kinds=True) * _ROUGHLY
        return replace(self, far_behind=most < best.worth())

    @property
    def handicap(self) -> float:
        """By what factor it must be faster than others."""
        return (1 + _EVENLY * (self.division is ExpertDivision.WHOLE)) * (1 + TIE * bool(self.gpus))

    def worth(self) -> float:
        """The throughput by which it is compared with others."""
        return self.tokens_per_s / self.handicap

    @cached_property
    def best(self) -> Estimate | None:
        """What the best policy does on the whole machine."""
        return self.of_whole(self.found.ranked[0]) if self.found.ranked else None

    @property
    def is_searched(self) -> bool:
        """Whether the model can be shared so, and it was not known before that others are better."""
        return not (self.obstacle or self.hopeless or self.far_behind)

    @property
    def tokens_per_s(self) -> float:
        """Its throughput; 0 if there is none."""
        return 0.0 if self.best is None else self.best.tokens_per_s

    def told(self) -> Way:
        """The way with the best policy so."""
        is_whole = not self.hopeless and (self.part is None or self.part.kinds_left is None)
        return Way(
            parallelism=self.parallelism,
            best=self.best,
            obstacle=self.obstacle,
            gpus=self.gpus,
            expert_division=self.division,
            at_most_tokens_per_s=0.0 if is_whole else self.before.tokens_per_s,
        )

    def of_whole(self, of_part: Estimate) -> Estimate:
        """What a part's policy does where the whole machine is so divided."""
        if self.parallelism is Parallelism.TENSOR or of_part.stages:
            whole = of_part
        elif self.whole.workload.num_requests is None:  # one batch, which takes the whole as long
            whole = replace(of_part, policy=replace(of_part.policy, parallelism=self.parallelism))
        else:
            whole = self.whole.predicted(replace(of_part.policy, parallelism=self.parallelism))
        return replace(whole, policy=replace(whole.policy, gpus=self.gpus))

    def with_runner_ups(self, count: int) -> "WaySearch":
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


def searched(way: WaySearch, solver: Solver, best: WaySearch | None) -> WaySearch:
    """What is found in one way, where `best` is the best of others: nothing if a bound shows that it is not better."""
    if best is not None and best.worth() > way.whole.known_tokens_per_s:
        way = without_hope(way, best)
    if way.part is None or not way.is_searched:
        return way
    found = _found(replace(way.part, known_tokens_per_s=_known(way, _worth(way, best))), solver)
    return replace(way, found=found).with_spaces(found.ranked[0].policy if found.ranked else None)


def without_hope(way: WaySearch, best: WaySearch | None) -> WaySearch:
    """The way without what a bound shows to be no better than `best`, the best of others: all of it, or kinds."""
    worth, part = _worth(way, best), way.part
    if part is None or way.hopeless or not worth:
        return way
    way = way.with_spaces(best.found.ranked[0].policy if best is not None and best.found.ranked else None)
    bound = way.bound(worth, FEW_REGIONS)
    hopeless = bound.tokens_per_s <= worth * way.handicap * (1 + CLOSE)
    are_fewer = bound.kinds is not None and len(bound.kinds) < len(part.kinds())
    left = replace(part, kinds_left=bound.kinds) if are_fewer and not hopeless else part
    return replace(way, part=left, before=bound, hopeless=hopeless)


def _worth(way: WaySearch, best: WaySearch | None) -> float:
    return max(way.whole.known_tokens_per_s, 0.0 if best is None else best.worth())


def _known(way: WaySearch, worth: float) -> float:
    """What a part must exceed; nothing where the rate of a stage is not yet that of the whole."""
    in_stages = way.parallelism is Parallelism.PIPELINE
    if in_stages and (way.lengths or way.whole.workload.num_requests is not None):
        return 0.0
    return worth * way.handicap


def with_lengths(alike: WaySearch, solver: Solver, best: WaySearch) -> WaySearch:
    """A pipeline whose stages have lengths of their own, or that which is planned by one stage if it is as good.

    GPUs that are not alike can only have the first. Of others no lengths are searched if they cannot be better than the
    best way, or if even stages are far behind it.
    """
    space, unequal = alike.whole, bool(alike.whole.profile.gpus)
    known = max(best.tokens_per_s, space.known_tokens_per_s)
    if not unequal and (
        0 < _LENGTHS_GAIN * alike.tokens_per_s < known
        or alike.bound(known, FEW_REGIONS).tokens_per_s <= known * (1 + CLOSE)
    ):
        return alike
    firsts = [alike.found]
    if unequal:  # one stage stands for none of them
        firsts += [_found(stage, solver) for stage in different_stages(space, alike.lengths)]
    policies = [
        policy for first in firsts for policy in (*(predicted.policy for predicted in first.ranked), *first.slower)
    ]
    own = search_lengths(space, alike.lengths, policies)
    if unequal or own.tokens_per_s > alike.tokens_per_s * (1 + TIE):
        work = [replace(first, ranked=(), greatest_tokens_per_s=0.0) for first in firsts]
        return replace(alike, part=None, found=Found.best_of([own, *work]))
    return replace(alike, found=Found.best_of([alike.found, replace(own, ranked=())]))


def _found(part: Space, solver: Solver) -> Found:
    """What a solver finds for one part of the machine, with weights staged or in parts if that is better."""

    def find_in(one: Space) -> Found:
        return within_limits(one, lambda tighter: find(tighter, solver))

    found = _first_to_last(find_in, part.of_pinning(), Found())
    return _first_to_last(find_in, part.in_parts(found.ranked[0].policy if found.ranked else None), found)


def _first_to_last(find_in: Callable[[Space], Found], spaces: Sequence[Space], found: Found) -> Found:
    """The best of what was found and what is found in spaces, up to one in which the search is interrupted."""
    for space in spaces:
        if found.interrupted:
            break
        known = max(space.known_tokens_per_s, found.tokens_per_s)
        found = Found.best_of([found, find_in(replace(space, known_tokens_per_s=known))])
    return found


def find(space: Space, solver: Solver) -> Found:
    """What a solver finds in one space, polished, and of near ties the smallest first."""
    found = solver.find(space)
    ranking = polished(space, found)
    if ranking and ranking[0].tokens_per_s > space.known_tokens_per_s:
        ranking = smallest_first(space, ranking)
    return replace(found, ranked=ranking, simulated=found.simulated + len(ranking) - len(found.ranked))


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
