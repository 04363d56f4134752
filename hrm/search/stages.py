"""The stages of a pipeline: what lengths they may have, and the space of what each of them has to do."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from itertools import accumulate, pairwise
from math import ceil, inf

from hrm.layers import Layer
from hrm.machines import stage_part, with_host_memory
from hrm.model_spec import ModelSpec
from hrm.parallel import stage_layers, stage_of
from hrm.search.space import Space

Lengths = tuple[int, ...]


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
    """A stage that takes no longer than the slowest of any lengths, for GPUs that are alike.

    Of E layers with experts, one of g stages has k = E/g at least, rounded up, and of each kind as many as there are in
    any k that follow one another. Beside them it may have all layers that have none, and so large a share of the host's
    rates. All stages together have caches and buffers on the host, of which this one's are no more than k/E, and the
    weights that no GPU has room for. Handing hidden states on is taken to be no longer than what the last stage does
    instead. None for GPUs that differ; `part` is the space of the stage that stands for all.
    """
    spec, profile, weights = space.spec, space.profile, space.formats.weights
    with_experts = [layer for layer in spec.layers if layer.has_experts]
    count = ceil(len(with_experts) / profile.num_gpus)
    layers = _least_layers(with_experts, count)
    if profile.gpus or not layers:
        return None
    least = spec.with_layers(layers, has_embedding=False, has_head=False)
    others = spec.num_layers - len(with_experts)
    host, share = profile.host, count / len(with_experts)
    left_bytes = host.usable_bytes - max(0, spec.total_layer_bytes(weights) - profile.top.usable_bytes)
    host_bytes = max(0, int(share * left_bytes)) + least.total_layer_bytes(weights)
    machine = stage_part(profile, 0, (count + others) / spec.num_layers)
    return replace(part, spec=least, profile=with_host_memory(machine, host_bytes, host.usable_pinned_bytes))


def _least_layers(layers: Sequence[Layer], count: int) -> list[Layer]:
    """What any `count` layers that follow one another have in common, and as much as the rest of them has at least.

    The rest are taken for the narrowest of all, or left out if layers differ by more than their windows.
    """
    runs = [Counter(layers[first : first + count]) for first in range(len(layers) - count + 1)]
    common = list(reduce(lambda one, other: one & other, runs).elements())
    if len({layer.without_window for layer in layers}) > 1:
        return common
    return common + [min(layers, key=lambda layer: layer.window or inf)] * (count - len(common))


def space_of_stage(space: Space, index: int, layers: range) -> Space:
    """What the stage with these layers has to do on the GPU of that number."""
    spec, profile = stage_of(space.spec, space.profile, index, layers)
    requests = space.workload.num_requests
    share = None if requests is None else ceil(requests / profile.num_stages)
    return replace(space, spec=spec, profile=profile, workload=replace(space.workload, num_requests=share))


def different_stages(space: Space, lengths: Lengths) -> list[Space]:
    """The space of every stage that has other layers than an earlier one, or another GPU."""
    stages = {form_of(space, index, layers)[:2]: (index, layers) for index, layers in enumerate(ranges_of(lengths))}
    return [space_of_stage(space, *stage) for stage in stages.values()]


Form = tuple[int, tuple[int, ...], bool, bool]


def form_of(space: Space, index: int, layers: range) -> Form:
    """What a stage is like: the first GPU like its own, the kinds of its layers, and whether it is first or last.

    In closed form the order of its layers tells nothing, but for which is the last.
    """
    gpus, order = space.profile.gpus, space.spec.order[layers.start : layers.stop]
    kinds = (*sorted(order[:-1]), order[-1])
    return gpus.index(gpus[index]) if gpus else 0, kinds, layers.start == 0, layers.stop == space.spec.num_layers


def ranges_of(lengths: Lengths) -> list[range]:
    """The layers of every stage."""
    return [range(low, high) for low, high in pairwise(accumulate(lengths, initial=0))]


def _in_proportion(sizes: Sequence[float], spec: ModelSpec) -> Lengths:
    """Lengths in proportion to sizes, each of one layer with experts at least."""
    with_experts = [layer for layer, kind in enumerate(spec.layers) if kind.has_experts]
    free = len(with_experts) - len(sizes)
    before = [index + round(free * part / sum(sizes)) for index, part in enumerate(accumulate(sizes[:-1]), 1)]
    ends = [with_experts[count - 1] + 1 for count in before]
    return tuple(high - low for low, high in pairwise([0, *ends, spec.num_layers]))
