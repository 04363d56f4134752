"""Pipelines whose stages are planned one by one: how many layers each gets, beside the policy that all of them share.

Solvers search one stage: first one that stands for all, which has what the smallest GPU has, then those of
the lengths that were found. Each policy is then tried on all stages, every one with as many resident experts as
its own GPU has room for, and layers move from the slowest stage to others as long as that pays. GPUs that are
alike get stages of unequal lengths too where a model cannot be divided into stages that are alike.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, chain, pairwise
from math import ceil, inf
from typing import Final, NamedTuple

import numpy as np

from hrm.closed_form import phases_of_batches
from hrm.estimate import Estimate
from hrm.machines import stage_part, with_host_memory
from hrm.memory import plan_memory
from hrm.model_spec import ModelSpec
from hrm.parallel import has_experts, stage_layers, stage_of
from hrm.policy import Parallelism, Policy, spread_experts
from hrm.search.choose import TIE, ranked
from hrm.search.grid import ALL_THAT_FIT, make_grid
from hrm.search.solver import Found
from hrm.search.space import Kind, Space
from hrm.tasks import Device

ROUNDS: Final = 3
SIMULATED: Final = 4  # policies of a round, the best by their closed form
_PARTS: Final = (1.0, 0.75, 0.5, 0.25, 0.0)  # of the experts that fit, where the CPU computes the others

Lengths = tuple[int, ...]


def search_stages(space: Space, lengths: Lengths, first: Found, find: Callable[[Space], Found]) -> Found:
    """The best pipelines of a machine's GPUs, simulated, best first, from these lengths on.

    `first` is what was found for a stage that stands for all, and `find` searches the space of one.
    """
    latest = [first]
    found, simulated, greatest = [*latest], list[Estimate](), 0.0
    for _ in range(ROUNDS):
        before = _rate(simulated)
        tried = _Tried(space, (predicted.policy for one in latest for predicted in one.ranked))
        plans = tried.best_plans(lengths)
        greatest = max([greatest, *(plan.tokens_per_s for plan in plans)])
        simulated += _simulated(space, (plan.policy for plan in plans[:SIMULATED]))
        if simulated and _rate(simulated) <= before * (1 + TIE):
            break
        lengths = _best(simulated).policy.stage_lengths if simulated else lengths
        latest = [find(stage) for stage in _different_stages(space, lengths)]
        found += latest
        if not any(one.ranked for one in latest):
            break
    simulated += _polished(space, simulated)
    return replace(
        Found.best_of(found),
        ranked=ranked(simulated),
        more=Found().more,
        greatest_tokens_per_s=greatest,
        simulated=sum(one.simulated for one in found) + len(simulated),
    )


def first_lengths(space: Space) -> Lengths:
    """Lengths to begin with, in proportion to what each GPU holds; none if lengths are not searched.

    That is where the stages of GPUs that are alike are so too, as even lengths make them. There must be as many layers
    with experts as GPUs.
    """
    spec, profile = space.spec, space.profile
    if profile.gpus:
        return _in_proportion([card.level.usable_bytes for card in profile.gpus], spec)
    stages = stage_layers(spec.num_layers, profile.num_gpus)
    forms = {(len(layers), sum(spec.layer_kind(layer).has_experts for layer in layers)) for layers in stages}
    return tuple(map(len, stages)) if len(forms) > 1 else ()


def least_stage(space: Space, part: Space) -> Space | None:
    """A stage that takes no longer than the slowest of any lengths, for GPUs and layers with experts that are alike.

    Of E layers with experts, one of g stages has k = E/g at least, rounded up. Beside them it may have all layers that
    have none, and so large a share of the host's rates. All stages together have caches and buffers on the host, of
    which this one's are no more than k/E, and the weights that no GPU has room for. Handing hidden states on is taken
    to be no longer than what the last stage does instead. None if layers with experts differ by more than their
    windows; `part` is the space of the stage that stands for all.
    """
    spec, profile, weights = space.spec, space.profile, space.formats.weights
    with_experts = [layer for layer in spec.layers if layer.has_experts]
    if profile.gpus or len({layer.without_window for layer in with_experts}) > 1:
        return None
    count = ceil(len(with_experts) / profile.num_gpus)
    narrowest = min(with_experts, key=lambda layer: layer.window or inf)
    least = spec.with_layers([narrowest] * count, has_embedding=False, has_head=False)
    others = spec.num_layers - len(with_experts)
    host, share = profile.host, count / len(with_experts)
    left_bytes = host.usable_bytes - max(0, spec.total_layer_bytes(weights) - profile.top.usable_bytes)
    host_bytes = max(0, int(share * left_bytes)) + least.total_layer_bytes(weights)
    machine = stage_part(profile, 0, (count + others) / spec.num_layers)
    return replace(part, spec=least, profile=with_host_memory(machine, host_bytes, host.usable_pinned_bytes))


def space_of_stage(space: Space, index: int, layers: range) -> Space:
    """What the stage with these layers has to do on the GPU of that number."""
    spec, profile = stage_of(space.spec, space.profile, index, layers)
    requests = space.workload.num_requests
    share = None if requests is None else ceil(requests / profile.num_stages)
    return replace(space, spec=spec, profile=profile, workload=replace(space.workload, num_requests=share))


def _different_stages(space: Space, lengths: Lengths) -> list[Space]:
    """The space of every stage that has other layers than an earlier one, or another GPU."""
    stages = {_form(space, index, layers)[:2]: (index, layers) for index, layers in enumerate(_ranges(lengths))}
    return [space_of_stage(space, *stage) for stage in stages.values()]


_Form = tuple[int, tuple[int, ...], bool, bool]


def _form(space: Space, index: int, layers: range) -> _Form:
    """What a stage is like: the first GPU like its own, the kinds of its layers, and whether it is first or last."""
    gpus, spec = space.profile.gpus, space.spec
    kinds = spec.order[layers.start : layers.stop]
    return gpus.index(gpus[index]) if gpus else 0, kinds, layers.start == 0, layers.stop == spec.num_layers


def _ranges(lengths: Lengths) -> list[range]:
    """The layers of every stage."""
    return [range(low, high) for low, high in pairwise(accumulate(lengths, initial=0))]


def _in_proportion(sizes: Sequence[float], spec: ModelSpec) -> Lengths:
    """Lengths in proportion to sizes, each of one layer with experts at least."""
    with_experts = [layer for layer, kind in enumerate(spec.layers) if kind.has_experts]
    free = len(with_experts) - len(sizes)
    before = [index + round(free * part / sum(sizes)) for index, part in enumerate(accumulate(sizes[:-1]), 1)]
    ends = [with_experts[count - 1] + 1 for count in before]
    return tuple(high - low for low, high in pairwise([0, *ends, spec.num_layers]))


def _moved(lengths: Lengths, index: int, step: int) -> Iterator[Lengths]:
    """Lengths of which one is so much less, and another as much more."""
    for other in range(len(lengths)):
        if other != index and lengths[index] > step:
            yield tuple(n + step * (i == other) - step * (i == index) for i, n in enumerate(lengths))


class _Plan(NamedTuple):
    """A policy of all stages, and its throughput in closed form."""

    policy: Policy
    tokens_per_s: float


class _Row(NamedTuple):
    """A policy that is tried, and the part of the experts that fit a GPU which are to stay there."""

    policy: Policy
    part: float


class _OnStage(NamedTuple):
    """What a policy does on a stage: seconds of both phases of a batch, infinite where it does not fit there."""

    prefill_s: float
    decode_s: float
    residents: int
    prefix_tokens: int


class _Tried:
    """Policies on stages of any lengths: what they do on one is worked out for all of them at once."""

    def __init__(self, space: Space, policies: Iterable[Policy]) -> None:
        self.space = space
        self.rows = [
            _Row(policy, part)
            for policy in dict.fromkeys(map(_without_layers, policies))
            for part in (_PARTS if policy.ffn is Device.CPU else _PARTS[:1])
        ]
        self.known: dict[_Form, list[_OnStage]] = {}

    def best_plans(self, lengths: Lengths) -> list[_Plan]:
        """Each policy that fits, with the lengths that are best for it, found from these; the fastest first."""
        plans: list[_Plan] = []
        for row in range(len(self.rows)):
            best = self._best_lengths(row, lengths)
            policy = self.policy(row, best)
            if policy is not None:
                tokens = policy.batch_size * self.space.workload.generated_tokens
                plans.append(_Plan(policy, tokens / sum(self._phases(row, best))))
        return sorted(plans, key=lambda plan: -plan.tokens_per_s)

    def policy(self, row: int, lengths: Lengths) -> Policy | None:
        """A policy with these lengths; None if it does not fit the machine."""
        if not self._are_models(lengths) or sum(self._phases(row, lengths)) == inf:
            return None
        stages = self._on_stages(row, lengths)
        layers = [self.space.spec.layers[of_stage.start : of_stage.stop] for of_stage in _ranges(lengths)]
        specs = map(self.space.spec.with_layers, layers)
        counts = [spread_experts(spec, stage.residents) for spec, stage in zip(specs, stages, strict=True)]
        whole = replace(
            self.rows[row].policy,
            parallelism=Parallelism.PIPELINE,
            stage_lengths=lengths,
            resident_experts=tuple(chain.from_iterable(counts)),
            prefix_buffer_tokens=max(stage.prefix_tokens for stage in stages),
        )
        return whole if plan_memory(self.space.spec, whole, self.space.profile).fits else None

    def _best_lengths(self, row: int, lengths: Lengths) -> Lengths:
        """Move layers away from the slowest stages, ever fewer at a time, as long as that pays."""
        step = max(1, self.space.spec.num_layers // 4)
        while step:
            better = min(
                self._neighbours(row, lengths, step), key=lambda other: self._order(row, other), default=lengths
            )
            if self._order(row, better) < self._order(row, lengths):
                lengths = better
            else:
                step //= 2
        return lengths

    def _neighbours(self, row: int, lengths: Lengths, step: int) -> Iterator[Lengths]:
        """Lengths in which a stage that is slowest in a phase, or in both, has fewer layers."""
        stages = self._on_stages(row, lengths)
        phases = [(stage.prefill_s, stage.decode_s, stage.prefill_s + stage.decode_s) for stage in stages]
        slowest = {max(range(len(stages)), key=lambda index, of=of: phases[index][of]) for of in range(3)}
        for other in (other for index in slowest for other in _moved(lengths, index, step)):
            if self._are_models(other):
                yield other

    def _are_models(self, lengths: Lengths) -> bool:
        return all(has_experts(self.space.spec, layers) for layers in _ranges(lengths))

    def _order(self, row: int, lengths: Lengths) -> tuple[int, float]:
        """By what lengths are compared: on how many stages a policy does not fit, and how long it takes."""
        stages = self._on_stages(row, lengths)
        return sum(stage.prefill_s == inf for stage in stages), sum(self._phases(row, lengths))

    def _phases(self, row: int, lengths: Lengths) -> tuple[float, float]:
        """Seconds of both phases of a batch: those of the slowest stage in each."""
        stages = self._on_stages(row, lengths)
        return max(stage.prefill_s for stage in stages), max(stage.decode_s for stage in stages)

    def _on_stages(self, row: int, lengths: Lengths) -> list[_OnStage]:
        return [self._on_stage(index, layers)[row] for index, layers in enumerate(_ranges(lengths))]

    def _on_stage(self, index: int, layers: range) -> list[_OnStage]:
        """What every policy does on a stage, which may have all of the host's memory to itself."""
        form = _form(self.space, index, layers)
        if form not in self.known:
            space = space_of_stage(self.space, index, layers)
            host = self.space.profile.host
            sizes = {name: getattr(host, name) for name in ("capacity_bytes", "reserve_bytes", "pinnable_bytes")}
            levels = (space.profile.top, replace(space.profile.host, **sizes))
            self.known[form] = _worked_out(replace(space, profile=replace(space.profile, levels=levels)), self.rows)
        return self.known[form]


def _worked_out(space: Space, rows: Sequence[_Row]) -> list[_OnStage]:
    """What each policy does in the space of one stage, in closed form."""
    found: dict[int, _OnStage] = {}
    kinds: dict[tuple[Kind, bool, int], list[int]] = {}
    for number, row in enumerate(rows):
        form = Kind.of_policy(row.policy), row.policy.staging, row.policy.experts_per_part
        kinds.setdefault(form, []).append(number)
    for (kind, *_), numbers in kinds.items():
        policies = [rows[number].policy for number in numbers]
        variant = space.holding(policies[0])
        places = np.array([_place(rows[number]) for number in numbers])
        grid = make_grid(variant, kind, places)
        ways = len(grid) // len(numbers)  # of keeping projections, and of computing experts in prefill
        wanted = np.repeat([(p.resident_dense, p.prefill_ffn is Device.GPU) for p in policies], ways, axis=0)
        alike = (grid.resident_dense == wanted[:, 0]) & (grid.gpu_prefill_ffn == wanted[:, 1])
        grid = grid.take(np.flatnonzero(alike))
        assert len(grid) == len(numbers), "each policy is one of the ways that its kind has"
        seconds = phases_of_batches(space.costs, grid.point(variant), space.schedule, space.workload)
        seconds = space.costs.prefills_in_turn * seconds[0], seconds[1]
        prefill_s, decode_s = (np.where(grid.fits, np.broadcast_to(of, len(grid)), inf) for of in seconds)
        for index, number in enumerate(numbers):
            found[number] = _OnStage(
                float(prefill_s[index]),
                float(decode_s[index]),
                int(grid.resident_total[index]),
                int(grid.prefix_buffer_tokens[index]),
            )
    return [found[number] for number in range(len(rows))]


def _without_layers(policy: Policy) -> Policy:
    """What all stages share."""
    return replace(policy, stage_lengths=(), resident_experts=(0,))


def _place(row: _Row) -> tuple[int, ...]:
    """The policy as one of the places that grids are made of."""
    policy = row.policy
    numbers = policy.micro_batch_size, policy.num_micro_batches, policy.gpu_kv_micro_batches
    return (*numbers, round(row.part * ALL_THAT_FIT), policy.prefill_chunk_tokens)


# ----------------------------------------------------------------------------------- simulated


def _simulated(space: Space, policies: Iterable[Policy]) -> list[Estimate]:
    """What policies do, those left out that miss the limits on waiting times."""
    predicted = [space.predicted(policy) for policy in policies]
    return [each for each in predicted if space.limits.are_met(each.latency)]


def _polished(space: Space, simulated: Sequence[Estimate]) -> list[Estimate]:
    """Plans better than the best, if there are any with a layer less in its slowest stage."""
    found: list[Estimate] = []
    while simulated:
        best = _best([*simulated, *found])
        slowest = max(range(len(best.stages)), key=lambda index: best.stages[index].seconds)
        tried, others = _Tried(space, [best.policy]), _moved(best.policy.stage_lengths, slowest, 1)
        policies = [tried.policy(row, other) for other in others for row in range(len(tried.rows))]
        found += _simulated(space, filter(None, policies))
        if _rate(found) <= best.tokens_per_s:
            break
    return found


def _rate(simulated: Sequence[Estimate]) -> float:
    return max((predicted.tokens_per_s for predicted in simulated), default=0.0)


def _best(simulated: Sequence[Estimate]) -> Estimate:
    return max(simulated, key=lambda predicted: predicted.tokens_per_s)
