"""Several GPUs of one machine: tensor parallelism inside every layer, or a pipeline of stages.

Either way the machine is like so many equal parts, one GPU and a share of the host each. In tensor
parallelism each part is a rank that has of every layer its heads and its part of every expert's
width, or as many whole experts as any other rank, works on the same batch as the others, and sums up
with them twice a layer. In a pipeline, stage s holds every layer of its own range, and as many batches
are under way as there are stages, each in another stage: in the time that a part takes for its layers,
one batch moves on by one stage, so the throughput of the whole is that of one part with its layers.
Every part keeps its layers' KV caches of all those batches. A pipeline needs no all-reduces, but every
link moves whole layers for a batch that is that many times smaller.

Stages whose lengths a policy gives are told one by one: each has its own layers, its own GPU, and of
the host's rates as large a share as of the model's layers; the first has the embedding and the last the
LM head. The slowest sets the pace. A pipeline that is run is always told so.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise, zip_longest
from math import inf
from typing import Final, NamedTuple

from hrm.errors import PolicyError
from hrm.formats import FORMATS
from hrm.gpus import only_gpus
from hrm.hardware import HardwareProfile
from hrm.layers import ExpertDivision, Layer
from hrm.machines import one_part, stage_part
from hrm.model_spec import ModelSpec
from hrm.policy import Parallelism, Policy

# Norms and scales of what blocks add to hidden states, and norms that may be of all heads together.
_OF_SUMS: Final = frozenset(
    {"attention_output_norm", "shared_output_norm", "routed_output_norm", "ffn_output_norm", "layer_scale"}
)
_OF_HEADS: Final = frozenset({"query_norm", "key_norm"})


class Part(NamedTuple):
    """What a policy is for: a model and a machine, whole, or what one rank or one pipeline stage has of both.

    Whatever is told of a policy (shares, bytes, seconds) is told of its part.
    """

    spec: ModelSpec
    profile: HardwareProfile


class Share(NamedTuple):
    """A policy and the part of model and machine that it is told of."""

    policy: Policy
    part: Part


def part_of(
    spec: ModelSpec, profile: HardwareProfile, parallelism: Parallelism, division: ExpertDivision = ExpertDivision.INNER
) -> Part:
    """What is planned: model and machine whole, or one rank or pipeline stage with its part of both."""
    if profile.num_gpus == 1:
        return Part(spec, profile)
    if parallelism is Parallelism.TENSOR:
        return Part(_rank_of(spec, profile.num_gpus, division), one_part(profile, is_stage=False))
    return Part(longest_stage(spec, profile.num_gpus), one_part(profile, is_stage=True))


@lru_cache(maxsize=64)
def _rank_of(spec: ModelSpec, ranks: int, division: ExpertDivision) -> ModelSpec:
    """Kept, for costs are kept by what they are of."""
    return spec.of_rank(ranks, division)


def undivided_vector(spec: ModelSpec, of_rank: ModelSpec) -> str:
    """A vector of the model that takes the whole of what ranks add up one by one; empty if there is none.

    `of_rank` is what one of them has, see `ModelSpec.of_rank`.
    """
    for layer, part in zip(spec.layers, of_rank.layers, strict=True):
        for block, narrow in zip(layer.blocks, part.blocks, strict=True):
            sizes = dict(narrow.vectors)
            for name, size in block.vectors:
                if name in _OF_SUMS or (name in _OF_HEADS and sizes[name] < size):
                    return name
    return ""


def part_for(policy: Policy, spec: ModelSpec, profile: HardwareProfile) -> Part:
    """The part of model and machine that the policy is for.

    Raises PolicyError if the model cannot be divided like that over the machine's GPUs, or if the
    policy was made for other layers than those of the part, or for stages that are told one by one.
    """
    profile = used_of(profile, policy)
    _check_obstacle(policy, spec, profile)
    part = part_of(spec, profile, policy.parallelism, policy.expert_division)
    policy.check_model(part.spec)
    return part


def shares_for(policy: Policy, spec: ModelSpec, profile: HardwareProfile) -> tuple[Share, ...]:
    """What of a policy is planned: what stands for all parts alike, or every stage if their lengths are given.

    Raises PolicyError as `part_for` does, or if there are not as many stages as GPUs.
    """
    if not policy.stage_lengths:
        return (Share(policy, part_for(policy, spec, profile)),)
    profile = used_of(profile, policy)
    _check_obstacle(policy, spec, profile)
    if len(policy.stage_lengths) != profile.num_gpus:
        raise PolicyError(
            "policy: stage_lengths",
            policy.stage_lengths,
            f"must have one length for each of the {profile.num_gpus} GPUs of {profile.name}",
            "run hrm search for this machine",
        )
    policy.check_model(spec)
    for layers in policy.stages:
        if not has_experts(spec, layers):
            raise PolicyError(
                "policy: stage_lengths",
                policy.stage_lengths,
                f"must leave each stage a layer with experts of {spec.name}",
                "run hrm search for this model",
            )
    return tuple(
        Share(policy.of_stage(index), stage_of(spec, profile, index, layers))
        for index, layers in enumerate(policy.stages)
    )


def ranks_of(policy: Policy, spec: ModelSpec, profile: HardwareProfile) -> tuple[Share, ...]:
    """What each process of a run has of a policy, by its rank: one, parts that are alike, or the stages in order.

    Raises PolicyError as `shares_for` does.
    """
    shares = shares_for(policy, spec, profile)
    ranks = used_of(profile, policy).num_gpus
    if policy.parallelism is Parallelism.TENSOR or ranks == 1:
        return shares * ranks
    return shares_for(_with_lengths(policy, spec, ranks), spec, profile)


def _with_lengths(policy: Policy, spec: ModelSpec, num_stages: int) -> Policy:
    """The policy of a pipeline with the lengths of its stages, and the resident experts of all of them.

    One that was made for the longest stage has as many experts resident in each of a stage's layers with experts as
    there, which are more than those of any stage.
    """
    if policy.stage_lengths:
        return policy
    stages = stage_layers(spec.num_layers, num_stages)
    counts: list[int] = []
    for layers in stages:
        of_longest = iter(policy.resident_experts)
        counts += [next(of_longest) if spec.layer_kind(layer).has_experts else 0 for layer in layers]
    return replace(policy, stage_lengths=tuple(map(len, stages)), resident_experts=tuple(counts))


def used_of(profile: HardwareProfile, policy: Policy) -> HardwareProfile:
    """The machine with the GPUs alone that the policy uses; PolicyError if it has no such GPUs."""
    every = list(range(profile.num_gpus))
    if not policy.gpus or list(policy.gpus) == every:
        return profile
    if list(policy.gpus) != sorted(set(policy.gpus) & set(every)):
        raise PolicyError(
            "policy: gpus",
            policy.gpus,
            f"must be numbers of GPUs, ascending, and {profile.name} has {profile.num_gpus}",
            "leave it out, or run hrm search for this machine",
        )
    return only_gpus(profile, policy.gpus)


def has_experts(spec: ModelSpec, layers: range) -> bool:
    """Whether any of these layers has experts, without which a stage is no model."""
    return any(spec.layer_kind(layer).has_experts for layer in layers)


def stage_of(spec: ModelSpec, profile: HardwareProfile, index: int, layers: range) -> Part:
    """The stage that has these layers, on the GPU of that number."""
    machine = stage_part(profile, index, len(layers) / spec.num_layers)
    return Part(_stage_spec(spec, layers.start, layers.stop), machine)


@lru_cache(maxsize=512)
def _stage_spec(spec: ModelSpec, start: int, stop: int) -> ModelSpec:
    """Those layers, with the embedding before the first and the LM head after the last: kept, as costs are of it."""
    return spec.with_layers(
        spec.layers[start:stop],
        name=f"{spec.name}, layers {start} to {stop - 1}",
        has_embedding=start == 0,
        has_head=stop == spec.num_layers,
    )


def _check_obstacle(policy: Policy, spec: ModelSpec, profile: HardwareProfile) -> None:
    obstacle = obstacle_to(policy.parallelism, spec, profile.num_gpus, policy.expert_division)
    whole = policy.expert_division is ExpertDivision.WHOLE
    if obstacle:
        raise PolicyError(
            f"policy: {'expert_division' if whole else 'parallelism'}",
            policy.expert_division.value if whole else policy.parallelism.value,
            f"cannot be, as {spec.name} is: {obstacle}",
            "run hrm search, which tries all ways, or ask for another number of GPUs",
        )


def stage_layers(num_layers: int, num_stages: int) -> tuple[range, ...]:
    """The layers of every stage, as even as can be; the first has no more than any other."""
    ends = [stage * num_layers // num_stages for stage in range(num_stages + 1)]
    return tuple(range(low, high) for low, high in pairwise(ends))


@lru_cache(maxsize=64)
def longest_stage(spec: ModelSpec, num_stages: int) -> ModelSpec:
    """The stage that is planned for all: no real one needs more memory or more time.

    It has of each kind of attention as many layers as any stage, their windows as wide as any
    stage's, counted from the widest, all with experts, and the embedding and the LM head. Where
    layers without experts make a stage heavier outside its routed experts, the difference is
    divided among the planned layers, in plain numbers: what GPUs take to write packed ones out is not in it.
    """
    stages = [spec.layers[stage.start : stage.stop] for stage in stage_layers(spec.num_layers, num_stages)]
    most = max((kind for kind in spec.layer_kinds() if kind.has_experts), key=_weight)
    layers = [layer.with_ffn(most) for layer in _widest(stages)]
    heaviest = max(sum(map(_weight, stage)) for stage in stages)
    missing = -(-max(0, heaviest - sum(map(_weight, layers))) // len(layers))
    if missing:
        layers = [replace(layer, mixer=layer.mixer.with_vectors(of_dense_layers=missing)) for layer in layers]
    return spec.with_layers(
        layers,
        name=f"{spec.name}, one of {num_stages} stages",
        least_inner_size=max(block.inner_size for layer in spec.layers for block in layer.ffn),
        least_reaches=spec.num_reaches,
    )


def _widest(stages: Sequence[tuple[Layer, ...]]) -> list[Layer]:
    """Of each kind of attention, for each place in the order of windows, the widest of any stage."""
    kinds = dict.fromkeys(layer.without_window.mixer for stage in stages for layer in stage)
    widest: list[Layer] = []
    for kind in kinds:
        of_stages = (
            sorted((layer for layer in stage if layer.without_window.mixer == kind), key=_width, reverse=True)
            for stage in stages
        )
        places = zip_longest(*of_stages)
        widest += [max((layer for layer in place if layer is not None), key=_width) for place in places]
    return widest


def _weight(layer: Layer) -> int:
    """What weighs as much outside routed experts, in numbers that are not packed."""
    plain = FORMATS["bfloat16"]
    return plain.elements_in(layer.dense_bytes(plain))


def _width(layer: Layer) -> float:
    return layer.window or inf


def tensor_parallel_obstacle(spec: ModelSpec, num_gpus: int, division: ExpertDivision = ExpertDivision.INNER) -> str:
    """Why the model cannot be divided over so many GPUs within its layers; empty if it can."""
    return next(filter(None, (kind.obstacle_to(num_gpus, division) for kind in spec.layer_kinds())), "")


def pipeline_obstacle(spec: ModelSpec, num_gpus: int) -> str:
    """Why the model cannot be divided into so many stages; empty if it can."""
    if spec.num_layers < num_gpus:
        return f"its {spec.num_layers} layers are fewer than {num_gpus} stages"
    for stage in stage_layers(spec.num_layers, num_gpus):
        if not has_experts(spec, stage):
            return f"its layers {stage.start} to {stage.stop - 1}, one of {num_gpus} stages, have no experts"
    return ""


def obstacle_to(
    parallelism: Parallelism, spec: ModelSpec, num_gpus: int, division: ExpertDivision = ExpertDivision.INNER
) -> str:
    """Why the model cannot be divided like that over so many GPUs; empty if it can."""
    if num_gpus == 1:
        return ""
    if parallelism is Parallelism.TENSOR:
        return tensor_parallel_obstacle(spec, num_gpus, division)
    return pipeline_obstacle(spec, num_gpus)
