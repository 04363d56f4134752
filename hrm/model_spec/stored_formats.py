"""Which of our tensors are packed, and in which format: as the published weights of a model are, or as is asked."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Final

from hrm.errors import ModelError
from hrm.formats import PackedFormat
from hrm.layers import Block, GatedDeltaNet, Layer, Mixer, TensorSpec, Unit
from hrm.model_spec.quantisation import UNQUANTISED, Quantisation
from hrm.model_spec.spec import ModelSpec

# The names of a module in different families, any of which a config may speak of.
ModuleNames = tuple[str, ...]


def _ffn(*places: str) -> Mapping[str, tuple[ModuleNames, ...]]:
    """Of the gate, what it scales and the way back, where FFNs have one of these names."""
    gate, up, down = (
        tuple(f"{place}.{name}" for place in places for name in names)
        for names in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"))
    )
    return {"w13": (gate, up), "w1": (up,), "w2": (down,)}


_EXPERTS: Final = ("mlp.experts.0", "block_sparse_moe.experts.0", "feed_forward.experts.0", "mlp.experts")
_SHARED: Final = ("mlp.shared_experts", "mlp.shared_expert", "feed_forward.shared_expert")
_OF_FFN: Final[Mapping[str, tuple[ModuleNames, ...]]] = {
    **_ffn(*_EXPERTS),
    **{f"shared_{name}": modules for name, modules in _ffn(*_SHARED).items()},
    **{f"dense_{name}": modules for name, modules in _ffn("mlp", "feed_forward").items()},
}
_OF_ATTENTION: Final[Mapping[str, tuple[ModuleNames, ...]]] = {
    "qkv": (("self_attn.q_proj",), ("self_attn.k_proj",), ("self_attn.v_proj",)),
    "output": (("self_attn.o_proj",),),
    "query": (("self_attn.q_proj",),),
    "query_down": (("self_attn.q_a_proj",),),
    "query_up": (("self_attn.q_b_proj",),),
    "kv_down": (("self_attn.kv_a_proj_with_mqa",),),
}
# Qwen3-Next's joined matrices and Qwen3.5's separate ones: what is convolved, the gate, decays and steps.
_OF_DELTA: Final[Mapping[str, tuple[ModuleNames, ...]]] = {
    "projections": tuple(
        (f"linear_attn.{joined}", f"linear_attn.{alone}")
        for joined, alone in (
            ("in_proj_qkvz", "in_proj_qkv"),
            ("in_proj_qkvz", "in_proj_z"),
            ("in_proj_ba", "in_proj_a"),
            ("in_proj_ba", "in_proj_b"),
        )
    ),
    "output": (("linear_attn.out_proj",),),
}


def stored_formats(how: Quantisation, layer: Layer, number: int) -> tuple[tuple[str, str], ...]:
    """Names of those tensors of a layer that are packed, with their formats' names, in the layer's order.

    Plain are vectors, routers, what attention itself reads, and matrices that join what is stored in
    several ways. Raises ModelError naming a tensor if those of an expert cannot be packed.
    """
    stored: list[tuple[str, str]] = []
    for block in layer.blocks:
        for tensor in block.tensors:
            found = _formats(how, block, tensor, f"model.layers.{number}.")
            packed = [form for form in found if form is not None]
            obstacle = _obstacle(tensor, found) if packed else ""
            if obstacle and tensor.unit is Unit.EXPERT:
                raise ModelError(f"model.layers.{number}.{tensor.name}", "<quantised>", obstacle, UNQUANTISED)
            if packed and not obstacle:
                stored.append((tensor.name, packed[0].name))
    return tuple(stored)


class What(StrEnum):
    """Which matrices are packed."""

    EXPERTS = "experts"  # the routed ones
    LINEAR = "linear"  # all but routers, head, embedding, and what attention itself reads


def packed_as(spec: ModelSpec, form: PackedFormat, what: What = What.EXPERTS) -> ModelSpec:
    """The same model with these matrices in a format, and all others plain.

    A matrix that cannot be packed so stays plain, too. Raises ModelError if none can.
    """
    kinds = {kind: replace(kind, packed=tuple(_packed_as(kind, form, what))) for kind in spec.kinds}
    if not any(kind.packed for kind in kinds.values()):
        rule = "must be a format in which rows of the model's matrices are whole"
        raise ModelError(f"{spec.name}: format", form.name, rule, "choose one with smaller groups")
    return spec.with_layers(kinds[layer] for layer in spec.layers)


def packable(layer: Layer) -> tuple[TensorSpec, ...]:
    """The matrices of a layer that may be packed at all."""
    return tuple(tensor for block in layer.blocks for tensor in block.tensors if _modules(block, tensor))


def _packed_as(layer: Layer, form: PackedFormat, what: What) -> Iterator[tuple[str, str]]:
    for tensor in packable(layer):
        if (what is What.LINEAR or tensor.unit is Unit.EXPERT) and not _obstacle(tensor, {form}):
            yield tensor.name, form.name


def _formats(how: Quantisation, block: Block, tensor: TensorSpec, prefix: str) -> set[PackedFormat | None]:
    """Those of the modules that have a tensor's rows; None is plain."""
    found = [how.of(*(prefix + name for name in names)) for names in _modules(block, tensor)]
    return {None if each is None else each.format for each in found}


def _obstacle(tensor: TensorSpec, forms: Collection[PackedFormat | None]) -> str:
    """Why a tensor cannot be packed whose modules have these formats; empty if it can."""
    if len(forms) > 1:
        told = " and ".join(sorted("plain" if form is None else form.name for form in forms))
        return f"must not join matrices in different formats: {told}"
    (form,) = forms
    assert form is not None
    parts = tensor.parts or tensor.shape[:1]
    if not form.takes(tensor.shape, parts):
        told = f"{' + '.join(map(str, parts))} rows of {tensor.shape[-1]}"
        return f"must have parts of whole groups in {form.name}, not {told}"
    return ""


def _modules(block: Block, tensor: TensorSpec) -> Sequence[ModuleNames]:
    """The names of the modules that have the rows of a tensor, one after the other; none if it stays plain."""
    if isinstance(block, Mixer) and tensor.name in block.host_tensors:
        return ()
    table = _OF_DELTA if isinstance(block, GatedDeltaNet) else _OF_ATTENTION if isinstance(block, Mixer) else _OF_FFN
    return table.get(tensor.name, ())
