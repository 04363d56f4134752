"""Pipelines whose stages are planned one by one: how many layers each gets, beside the policy that all of them share.

A policy is tried on all stages, every one with as many resident experts as its own GPU has room for. Layers move
from the slowest stage to others as long as that pays, and then the integers around the best policies are tried.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from math import inf
from typing import Final, NamedTuple

import numpy as np

from hrm.closed_form import phases_of_batches
from hrm.estimate import Estimate
from hrm.latency import NO_LIMITS
from hrm.memory import plan_memory
from hrm.parallel import has_experts
from hrm.policy import Parallelism, Policy, spread_experts
from hrm.search.choose import TIE, ranked, simulated_above
from hrm.search.constraints import allowed_s
from hrm.search.fit import Ints, host_needed
from hrm.search.grid import ALL_THAT_FIT, CHUNK, PART, QUARTERS, make_grid
from hrm.search.lattice import REACHES, around, chunk_ranges, distinct
from hrm.search.longest import with_longest_chunks
from hrm.search.polish import places_near
from hrm.search.regions import Floats
from hrm.search.result import OPTIMAL_GAP
from hrm.search.scores import tokens_per_batch
from hrm.search.solver import Found
from hrm.search.space import Kind, Space
from hrm.search.stages import Form, Lengths, different_stages, form_of, ranges_of, space_of_stage
from hrm.tasks import Device

BEAM: Final = 6  # candidates of a kind around which others are tried
SIMULATED: Final = 8  # policies of all kinds at most, the best by their closed form


def search_lengths(space: Space, lengths: Lengths, policies: Iterable[Policy]) -> Found:
    """The best pipelines of a machine's GPUs, simulated, best first, from these lengths and policies on."""
    groups: dict[tuple[Kind, bool, int], list[Policy]] = {}
    for policy in policies:
        groups.setdefault((Kind.of_policy(policy), policy.staging, policy.experts_per_part), []).append(policy)
    plans, evaluations = list[_Plan](), 0
    for group in groups.values():
        of_kind, count = _best_plans(_Tried.of(space, group), lengths)
        plans, evaluations = [*plans, *of_kind], evaluations + count
    plans.sort(key=lambda plan: -plan.tokens_per_s)
    simulated: list[Estimate] = []
    for plan in plans[:SIMULATED]:
        if plan.tokens_per_s > _rate(simulated) * (1 + TIE):
            simulated += simulated_above(space, _rate(simulated), [plan.policy])
    greatest = max((plan.tokens_per_s for plan in plans), default=0.0)
    simulated += _polished(space, simulated, greatest)
    return Found(
        ranked=ranked(simulated), greatest_tokens_per_s=greatest, evaluations=evaluations, simulated=len(simulated)
    )


class _Plan(NamedTuple):
    """A policy of all stages, and its throughput in closed form."""

    policy: Policy
    tokens_per_s: float


class _OnStage(NamedTuple):
    """What candidates do on a stage, one an entry of every array.

    They take seconds for both phases of a batch, infinite where they do not fit it though it had the host to itself.
    """

    prefill_s: Floats
    decode_s: Floats
    residents: Ints
    prefix_tokens: Ints
    host_bytes: Ints
    pinned_bytes: Ints


class _Stages:
    """The spaces of stages that may each have all of the host's memory to itself, made once."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.known: dict[tuple[int, range], Space] = {}

    def of(self, index: int, layers: range) -> Space:
        gpu = index if self.space.profile.gpus else 0  # GPUs that are alike have like stages
        if (gpu, layers) not in self.known:
            self.known[gpu, layers] = self._made(index, layers)
        return self.known[gpu, layers]

    def _made(self, index: int, layers: range) -> Space:
        own, host = space_of_stage(self.space, index, layers), self.space.profile.host
        sizes = {name: getattr(host, name) for name in ("capacity_bytes", "reserve_bytes", "pinnable_bytes")}
        levels = (own.profile.top, replace(own.profile.host, **sizes))
        return replace(own, profile=replace(own.profile, levels=levels))


class _Tried:
    """Candidates of one kind, what they do on stages of any lengths worked out for all of them at once.

    A place has one candidate for each way to keep projections and to compute experts in prefill.
    """

    def __init__(self, stages: _Stages, kind: Kind, places: Ints) -> None:
        self.stages, self.kind, self.places = stages, kind, places
        self.known: dict[Form, _OnStage] = {}
        first = stages.of(0, range(self.space.spec.num_layers))
        self.grid = make_grid(first, kind, places)  # of which only what all stages share is used
        self.tokens = tokens_per_batch(first, self.grid.batch_size)

    @property
    def space(self) -> Space:
        """That of the whole machine."""
        return self.stages.space

    @staticmethod
    def of(space: Space, policies: Sequence[Policy]) -> "_Tried":
        """Policies of one kind, as they are and with other ways to keep projections and to compute experts in prefill.

        Where the CPU computes experts, as many stay on the GPU as fit, or fewer.
        """
        first = policies[0]
        parts = QUARTERS if first.ffn is Device.CPU else QUARTERS[:1]
        places = [_place(policy, part) for policy in policies for part in parts]
        return _Tried(_Stages(space.holding(first)), Kind.of_policy(first), distinct(np.array(places)))

    def rates(self, lengths: Lengths) -> Floats:
        """Tokens a second in closed form; 0 for what does not fit, or what is too slow for the limits."""
        stages, host = self._on_stages(lengths), self.space.profile.host
        prefill_s = np.maximum.reduce([stage.prefill_s for stage in stages])
        decode_s = np.maximum.reduce([stage.decode_s for stage in stages])
        fits = sum(stage.host_bytes for stage in stages) <= host.usable_bytes
        if host.pinnable_bytes is not None:
            fits &= sum(stage.pinned_bytes for stage in stages) <= host.usable_pinned_bytes
        if self.space.limits != NO_LIMITS:
            first = self.stages.of(0, ranges_of(lengths)[0])
            most_prefill_s, most_decode_s = allowed_s(first)
            passing_s = sum(stage.prefill_s for stage in stages) / len(stages) / first.costs.prefills_in_turn
            fits &= (passing_s <= most_prefill_s) & (decode_s <= most_decode_s)
        return np.where(fits, self.tokens / (prefill_s + decode_s), 0.0)

    def best(self, lengths: Lengths, count: int, forms: Ints) -> list[int]:
        """Positions of the best that fit, each of another form; of equals, the first."""
        rates, found = self.rates(lengths), dict[int, int]()
        for row in np.argsort(-rates, kind="stable").tolist():
            if len(found) == count or rates[row] <= 0:
                break
            found.setdefault(int(forms[row]), row)
        return list(found.values())

    def forms(self, lengths: Lengths) -> Ints:
        """What tells apart candidates between which only a simulation decides.

        Those are numbers of micro-batches, and whether there are weights to be loaded at all.
        """
        all_resident = sum(stage.residents for stage in self._on_stages(lengths)) == self.space.everything
        return 2 * self.grid.half_octaves + all_resident

    @property
    def place_of(self) -> Ints:
        """Which place each candidate has."""
        return np.arange(len(self.grid)) * len(self.places) // len(self.grid)

    def only(self, rows: Sequence[int]) -> "_Tried":
        """The places of these candidates alone."""
        return _Tried(self.stages, self.kind, distinct(self.places[self.place_of[rows]]))

    def with_near(self, lengths: Lengths, reach: float) -> "_Tried":
        """The best at these lengths, and the integers around them."""
        rows = [*self.best(lengths, BEAM, self.grid.num_micro_batches), *self.best(lengths, BEAM, self.place_of)]
        best = distinct(self.places[self.place_of[rows]])
        if not len(best):
            return self
        near = [best]
        stages = different_stages(self.space, lengths)
        for chunks in chunk_ranges(stages[0]):
            inside = best[(chunks.least <= best[:, CHUNK]) & (best[:, CHUNK] <= chunks.most)]
            if not len(inside):
                continue
            tried = around(stages[0], self.kind, chunks, inside, reach)
            longest = [with_longest_chunks(stage, self.kind, chunks, inside).places() for stage in stages]
            for places in longest:
                places[:, PART] = ALL_THAT_FIT
            near += [tried, *longest]
        return _Tried(self.stages, self.kind, distinct(np.concatenate(near)))

    def best_lengths(self, row: int, lengths: Lengths, step: int = 1) -> Lengths:
        """Move layers away from the slowest stages, so many at a time and ever fewer, as long as that pays."""
        while step:
            better = min(
                self._neighbours(row, lengths, step), key=lambda other: self._order(row, other), default=lengths
            )
            if self._order(row, better) < self._order(row, lengths):
                lengths = better
            else:
                step //= 2
        return lengths

    def policy(self, row: int, lengths: Lengths) -> Policy | None:
        """A candidate with these lengths as a policy; None if it does not fit the machine."""
        if not self.are_models(lengths):
            return None
        stages = self._on_stages(lengths)
        if any(stage.prefill_s[row] == inf for stage in stages):
            return None
        specs = [self.stages.of(*stage).spec for stage in enumerate(ranges_of(lengths))]
        residents = [int(stage.residents[row]) for stage in stages]
        counts = [spread_experts(spec, count) for spec, count in zip(specs, residents, strict=True)]
        own = replace(self.grid.take(np.array([row])), resident_total=np.array([sum(residents)]))
        whole = replace(
            own.policy(self.space, 0),
            parallelism=Parallelism.PIPELINE,
            stage_lengths=lengths,
            resident_experts=tuple(chain.from_iterable(counts)),
            prefix_buffer_tokens=max(int(stage.prefix_tokens[row]) for stage in stages),
        )
        return whole if plan_memory(self.space.spec, whole, self.space.profile).fits else None

    def above(self, lengths: Lengths, tokens_per_s: float) -> list[Policy]:
        """The candidates with these lengths that are faster in closed form, and fit."""
        rows = np.flatnonzero(self.rates(lengths) > tokens_per_s) if self.are_models(lengths) else ()
        return list(filter(None, (self.policy(int(row), lengths) for row in rows)))

    def _neighbours(self, row: int, lengths: Lengths, step: int) -> Iterator[Lengths]:
        """Lengths in which a stage that is slowest in a phase, or in both, has fewer layers."""
        stages = self._on_stages(lengths)
        of_phases = [(float(stage.prefill_s[row]), float(stage.decode_s[row])) for stage in stages]
        seconds = [(prefill_s, decode_s, prefill_s + decode_s) for prefill_s, decode_s in of_phases]
        slowest = {max(range(len(stages)), key=lambda index, of=of: seconds[index][of]) for of in range(3)}
        for other in (other for index in slowest for other in _moved(lengths, index, step)):
            if self.are_models(other):
                yield other

    def are_models(self, lengths: Lengths) -> bool:
        """Whether each stage has a layer with experts."""
        return all(has_experts(self.space.spec, layers) for layers in ranges_of(lengths))

    def _order(self, row: int, lengths: Lengths) -> tuple[int, float]:
        """By what lengths are compared: on how many stages a candidate does not fit, and how long it takes."""
        of_phases = [(float(stage.prefill_s[row]), float(stage.decode_s[row])) for stage in self._on_stages(lengths)]
        return sum(one == inf for one, _ in of_phases), sum(map(max, zip(*of_phases, strict=True)))

    def _on_stages(self, lengths: Lengths) -> list[_OnStage]:
        return [self._on_stage(index, layers) for index, layers in enumerate(ranges_of(lengths))]

    def _on_stage(self, index: int, layers: range) -> _OnStage:
        form = form_of(self.space, index, layers)
        if form not in self.known:
            self.known[form] = self._worked_out(self.stages.of(index, layers))
        return self.known[form]

    def _worked_out(self, space: Space) -> _OnStage:
        """What every candidate does in the space of one stage, in closed form."""
        grid = make_grid(space, self.kind, self.places)
        phases = phases_of_batches(space.costs, grid.point(space), space.schedule, space.workload)
        seconds = space.costs.prefills_in_turn * phases[0], phases[1]
        prefill_s, decode_s = (np.where(grid.fits, np.broadcast_to(of, len(grid)), inf) for of in seconds)
        host = host_needed(space, self.kind, grid.numbers(), grid.resident_total)
        return _OnStage(prefill_s, decode_s, grid.resident_total, grid.prefix_buffer_tokens, *host)


def _best_plans(tried: _Tried, lengths: Lengths) -> tuple[list[_Plan], int]:
    """The best candidates of a kind, each of another form, and how many were looked at."""
    first = tried.best(lengths, BEAM, np.arange(len(tried.grid))) or range(len(tried.grid))
    step = max(1, tried.space.spec.num_layers // 4)
    climbed = {row: tried.best_lengths(row, lengths, step) for row in first}
    lengths = climbed[max(first, key=lambda row: tried.rates(climbed[row])[row])]
    evaluations = len(tried.grid)
    for reach in REACHES:
        tried = tried.with_near(lengths, reach)
        evaluations += len(tried.grid)
        others = [other for index in range(len(lengths)) for other in _moved(lengths, index, 1)]
        lengths = max([lengths, *filter(tried.are_models, others)], key=lambda own: tried.rates(own).max())
    rows = tried.best(lengths, SIMULATED, tried.forms(lengths))
    if not rows:
        return [], evaluations
    tried, plans = tried.only(rows), list[_Plan]()
    for row in tried.best(lengths, SIMULATED, tried.forms(lengths)):
        own = tried.best_lengths(row, lengths)
        policy = tried.policy(row, own)
        if policy is not None:
            plans.append(_Plan(policy, float(tried.rates(own)[row])))
    return plans, evaluations


def _place(policy: Policy, part: float) -> tuple[int, ...]:
    """The policy as one of the places that grids are made of, with such a part of the experts that fit."""
    numbers = policy.micro_batch_size, policy.num_micro_batches, policy.gpu_kv_micro_batches
    return (*numbers, round(part * ALL_THAT_FIT), policy.prefill_chunk_tokens)


def _moved(lengths: Lengths, index: int, step: int) -> Iterator[Lengths]:
    """Lengths of which one is so much less, and another as much more."""
    for other in range(len(lengths)):
        if other != index and lengths[index] > step:
            yield tuple(n + step * (i == other) - step * (i == index) for i, n in enumerate(lengths))


# ----------------------------------------------------------------------------------- simulated


def _polished(space: Space, simulated: Sequence[Estimate], greatest_tokens_per_s: float) -> list[Estimate]:
    """Plans better than the best, if there are any near by: with a layer less in its slowest stage.

    Where waits cost it more than a policy that is called optimal may lie below the closed form, its number of
    micro-batches and its chunks are changed, too.
    """
    found: list[Estimate] = []
    while simulated:
        best = _best([*simulated, *found])
        lengths, enough = best.policy.stage_lengths, best.tokens_per_s * (1 + TIE)
        slowest = max(range(len(best.stages)), key=lambda index: best.stages[index].seconds)
        same = _Tried.of(space, [best.policy])
        policies = [policy for own in _moved(lengths, slowest, 1) for policy in same.above(own, enough)]
        if best.tokens_per_s < greatest_tokens_per_s * (1 - OPTIMAL_GAP):
            places = places_near(different_stages(same.space, lengths)[0], best.policy)
            policies += _Tried(same.stages, same.kind, places).above(lengths, enough)
        known = {predicted.policy for predicted in (*simulated, *found)}
        better = simulated_above(space, best.tokens_per_s, [policy for policy in policies if policy not in known])
        found += better
        if _rate(better) <= enough:
            break
    return found


def _rate(simulated: Sequence[Estimate]) -> float:
    return max((predicted.tokens_per_s for predicted in simulated), default=0.0)


def _best(simulated: Sequence[Estimate]) -> Estimate:
    return max(simulated, key=lambda predicted: predicted.tokens_per_s)
