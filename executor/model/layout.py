"""Where each weight lies in memory, the same for every family.

D hidden, Q = heads*head_dim, KV = kv_heads*head_dim, E experts, I intermediate, V vocab.

A table says which tensors there are, in the order in which they lie in a vector: that of the dtype of
all that are not packed, where `hrm.layers.places` says. The blocks of a layer tell theirs: those of
the dense part, and those of an expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from executor.formats import Matrix, packed_in
from executor.native.experts import ExpertWeights
from hrm.formats import FORMATS, Format
from hrm.layers import (
    Block,
    DenseFfn,
    GatedDeltaNet,
    GroupedQueryAttention,
    LatentAttention,
    Layer,
    RoutedExperts,
    TensorSpec,
    Unit,
    places,
)
from hrm.model_spec import ModelSpec

Tensors = tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Grouped-query attention; `qkv` maps to queries, a gate if there is one, keys and values.

    Norms of queries and keys are as long as a head, or as all of them.
    """

    attention_norm: Tensor  # (D)
    qkv: Matrix  # (Q+2KV, D)
    output: Matrix  # (D, Q)
    attention_norm_bias: Tensor | None = None  # (D)
    qkv_bias: Tensor | None = None  # (Q+2KV)
    gate_bias: Tensor | None = None  # (Q)
    output_bias: Tensor | None = None  # (D)
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    sinks: Tensor | None = None  # (H)
    attention_output_norm: Tensor | None = None  # (D)


@dataclass(frozen=True, slots=True)
class GatedDeltaWeights:
    """The gated delta rule; `projections` map to queries, keys, values, gate, decays and steps.

    X elements of queries, keys and values are convolved over k tokens; H value heads of v elements.
    `decay` is the logarithm of each head's rate.
    """

    attention_norm: Tensor  # (D)
    projections: Matrix  # (X+H*v+2H, D)
    convolution: Tensor  # (X, k)
    decay: Tensor  # (H)
    step_bias: Tensor  # (H)
    output_norm: Tensor  # (v)
    output: Matrix  # (D, H*v)


@dataclass(frozen=True, slots=True)
class LatentWeights:
    """Latent attention: queries come by `query`, or through `query_down` and `query_up`.

    Q = heads*(n+p), r elements of a compressed vector and q of compressed queries; of a head n and p
    elements without and with rotation, and v of its value.
    """

    attention_norm: Tensor  # (D)
    kv_down: Matrix  # (r+p, D)
    kv_norm: Tensor  # (r)
    kv_up: Tensor  # (heads*(n+v), r)
    output: Matrix  # (D, heads*v)
    query: Matrix | None = None  # (Q, D)
    query_down: Matrix | None = None  # (q, D)
    query_norm: Tensor | None = None  # (q)
    query_up: Matrix | None = None  # (Q, q)
    query_down_bias: Tensor | None = None  # (q)
    kv_down_bias: Tensor | None = None  # (r+p)
    output_bias: Tensor | None = None  # (D)


@dataclass(frozen=True, slots=True)
class RouterWeights:
    """What comes before routed experts and after them, and the shared ones, which every token goes through."""

    ffn_norm: Tensor  # (D)
    router: Tensor  # (E, D)
    ffn_norm_bias: Tensor | None = None  # (D)
    router_bias: Tensor | None = None  # (E)
    score_correction: Tensor | None = None  # (E)
    shared_gate: Tensor | None = None  # (D)
    shared_w13: Matrix | None = None  # (2I, D)
    shared_w2: Matrix | None = None  # (D, I)
    router_scale: Tensor | None = None  # (D)
    expert_scale: Tensor | None = None  # (E)
    shared_norm: Tensor | None = None  # (D)
    shared_output_norm: Tensor | None = None  # (D)
    routed_output_norm: Tensor | None = None  # (D)
    ffn_output_norm: Tensor | None = None  # (D)
    layer_scale: Tensor | None = None  # (1)

    @property
    def has_pending(self) -> bool:
        """Whether something is done to the sum of all experts, so that they are not added one by one."""
        return not (self.routed_output_norm is self.ffn_output_norm is self.layer_scale is None)


@dataclass(frozen=True, slots=True)
class FfnWeights:
    """An FFN that every token goes through; its matrices are as those of an expert."""

    ffn_norm: Tensor  # (D)
    dense_w13: Matrix  # (2I, D)
    dense_w2: Matrix  # (D, I)
    ffn_norm_bias: Tensor | None = None  # (D)


# What the tensors of a kind of block are in the executor; a new kind of block needs a row here.
WEIGHTS_OF: Final[dict[type[Block], type[Any]]] = {
    GroupedQueryAttention: AttentionWeights,
    GatedDeltaNet: GatedDeltaWeights,
    LatentAttention: LatentWeights,
    RoutedExperts: RouterWeights,
    DenseFfn: FfnWeights,
}


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """A layer's weights outside routed experts, block by block: those of `WEIGHTS_OF`."""

    mixer: Any
    ffn: Any


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """Experts that lie one after the other, from number `first` on, as one tensor a matrix."""

    first: int
    w13_E2ID: Matrix  # noqa: N815
    w2_EDI: Matrix  # noqa: N815
    w13_bias_E2I: Tensor | None = None  # noqa: N815
    w2_bias_ED: Tensor | None = None  # noqa: N815


@dataclass(frozen=True, slots=True)
class Experts:
    """Experts of one layer: each with its number, and the same ones as stacks, one for each place."""

    each: Sequence[tuple[int, ExpertWeights]] = ()
    stacks: tuple[ExpertStack, ...] = ()

    def __add__(self, others: "Experts") -> "Experts":
        """These and the others."""
        return Experts([*self.each, *others.each], (*self.stacks, *others.stacks))


@dataclass(frozen=True, slots=True)
class HeadWeights:
    """What turns the last hidden states into logits."""

    final_norm: Tensor  # (D)
    lm_head: Tensor  # (V, D)
    final_norm_bias: Tensor | None = None  # (D)
    lm_head_bias: Tensor | None = None  # (V)


def dense_tensors(layer: Layer) -> Tensors:
    """The tensors of a layer outside routed experts."""
    return tuple(tensor for tensor in layer.tensors if tensor.unit is not Unit.EXPERT)


def expert_tensors(layer: Layer) -> Tensors:
    """The tensors of one of a layer's experts."""
    return tuple(tensor for tensor in layer.tensors if tensor.unit is Unit.EXPERT)


def plain_format(dtype: torch.dtype) -> Format:
    """The format of what is not packed in vectors of that dtype."""
    return FORMATS[str(dtype).removeprefix("torch.")]


def num_elements(tensors: Tensors, dtype: torch.dtype) -> int:
    """Elements of a vector of that dtype that has all of them."""
    return places(tensors, plain_format(dtype))[1] // dtype.itemsize


def in_order(tensors: Tensors, flat: Tensor) -> list[Matrix]:
    """The tensors that lie in a vector of `num_elements`; of several in rows, each with an axis more.

    What aligns the vector's end need not be there.
    """
    plain, size = plain_format(flat.dtype), flat.itemsize
    starts, end = places(tensors, plain)
    made: list[Matrix] = []
    for tensor, start in zip(tensors, starts, strict=True):
        stop = start + tensor.bytes_in(plain)
        part = flat[..., start // size : stop // size]
        assert part.shape[-1] * size == stop - start, (flat.shape, tensors)
        if tensor.packed is None:
            made.append(part.unflatten(-1, tensor.shape))
        else:
            rows, width = tensor.shape
            made.append(packed_in(tensor.packed, rows, width, part.view(torch.uint8)))
    assert flat.shape[-1] * size <= end, (flat.shape, tensors)
    return made


def views(tensors: Tensors, flat: Tensor) -> dict[str, Matrix]:
    """The same by name."""
    return {tensor.name: view for tensor, view in zip(tensors, in_order(tensors, flat), strict=True)}


def dense_views(layer: Layer, flat: Tensor) -> DenseWeights:
    """The dense part of a layer that lies in `flat`."""
    there = iter(in_order(dense_tensors(layer), flat))

    def of(block: Block) -> Any:
        names = (tensor.name for tensor in block.tensors if tensor.unit is not Unit.EXPERT)
        return WEIGHTS_OF[type(block)](**{name: next(there) for name in names})

    return DenseWeights(*map(of, layer.blocks))


def expert_views(layer: Layer, flat: Tensor) -> ExpertWeights:
    """The expert of a layer that lies in `flat`."""
    matrices: dict[str, Any] = {**views(expert_tensors(layer), flat)}
    return ExpertWeights(**matrices)


def experts_in(layer: Layer, flat: Tensor, first: int) -> Experts:
    """All experts of a layer that lie in `flat` one after the other, numbered from `first`."""
    if not flat.shape[0]:
        return Experts()
    tensors = expert_tensors(layer)
    each_EP = flat.view(-1, num_elements(tensors, flat.dtype))
    stacked: dict[str, Any] = {**views(tensors, each_EP)}
    alone = ({name: matrices[e] for name, matrices in stacked.items()} for e in range(each_EP.shape[0]))
    each = [(first + e, ExpertWeights(**matrices)) for e, matrices in enumerate(alone)]
    return Experts(each, (ExpertStack(first, *stacked.values()),))


def head_views(spec: ModelSpec, flat: Tensor) -> HeadWeights:
    """The head that lies in `flat`."""
    tensors: dict[str, Any] = {**views(spec.head_tensors, flat)}
    return HeadWeights(**tensors)
