"""Where each weight lies in memory, the same for every family.

D hidden, Q = heads*head_dim, KV = kv_heads*head_dim, E experts, I intermediate, V vocab.

A table says which tensors there are, in the order in which they lie in a vector, contiguous and
without padding. The blocks of a layer tell theirs: those of the dense part, and those of an expert.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

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
)
from hrm.model_spec import ModelSpec

Tensors = tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """Grouped-query attention; `qkv` maps to queries, a gate if there is one, keys and values.

    Norms of queries and keys are as long as a head, or as all of them.
    """

    attention_norm: Tensor  # (D)
    qkv: Tensor  # (Q+2KV, D)
    output: Tensor  # (D, Q)
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
    projections: Tensor  # (X+H*v+2H, D)
    convolution: Tensor  # (X, k)
    decay: Tensor  # (H)
    step_bias: Tensor  # (H)
    output_norm: Tensor  # (v)
    output: Tensor  # (D, H*v)


@dataclass(frozen=True, slots=True)
class LatentWeights:
    """Latent attention: queries come by `query`, or through `query_down` and `query_up`.

    Q = heads*(n+p), r elements of a compressed vector and q of compressed queries; of a head n and p
    elements without and with rotation, and v of its value.
    """

    attention_norm: Tensor  # (D)
    kv_down: Tensor  # (r+p, D)
    kv_norm: Tensor  # (r)
    kv_up: Tensor  # (heads*(n+v), r)
    output: Tensor  # (D, heads*v)
    query: Tensor | None = None  # (Q, D)
    query_down: Tensor | None = None  # (q, D)
    query_norm: Tensor | None = None  # (q)
    query_up: Tensor | None = None  # (Q, q)
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
    shared_w13: Tensor | None = None  # (2I, D)
    shared_w2: Tensor | None = None  # (D, I)
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
    dense_w13: Tensor  # (2I, D)
    dense_w2: Tensor  # (D, I)
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
class ExpertWeights:
    """One expert: `w2 @ (silu(gate) * up)`, where `w13 @ x` is the gate followed by the up half."""

    w13: Tensor  # (2I, D)
    w2: Tensor  # (D, I)
    w13_bias: Tensor | None = None  # (2I)
    w2_bias: Tensor | None = None  # (D)


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """Experts that lie one after the other, from number `first` on, as one tensor a matrix."""

    first: int
    w13_E2ID: Tensor  # noqa: N815
    w2_EDI: Tensor  # noqa: N815
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


def embedding_tensors(spec: ModelSpec) -> Tensors:
    """The token embedding."""
    return (TensorSpec("embedding", (spec.vocab_size, spec.hidden_size), Unit.MODEL),)


def head_tensors(spec: ModelSpec) -> Tensors:
    """What comes after the layers."""
    final_norm = TensorSpec("final_norm", (spec.hidden_size,), Unit.MODEL)
    return final_norm, TensorSpec("lm_head", (spec.vocab_size, spec.hidden_size), Unit.MODEL)


def dense_tensors(of: Layer | Block) -> Tensors:
    """The tensors of a layer, or of a block of it, outside routed experts."""
    return tuple(tensor for tensor in of.tensors if tensor.unit is not Unit.EXPERT)


def expert_tensors(layer: Layer) -> Tensors:
    """The tensors of one of a layer's experts."""
    return tuple(tensor for tensor in layer.tensors if tensor.unit is Unit.EXPERT)


def num_elements(tensors: Tensors) -> int:
    """Elements of all of them."""
    return sum(tensor.parameters for tensor in tensors)


def views(tensors: Tensors, flat: Tensor) -> dict[str, Tensor]:
    """The tensors, by name, that lie in a vector of as many elements as they have."""
    assert flat.ndim == 1, flat.shape
    assert len(flat) == num_elements(tensors), (len(flat), tensors)
    parts = zip(flat.split([tensor.parameters for tensor in tensors]), tensors, strict=True)
    return {tensor.name: part.view(tensor.shape) for part, tensor in parts}


def dense_views(layer: Layer, flat: Tensor) -> DenseWeights:
    """The dense part of a layer that lies in `flat`."""
    tensors = [dense_tensors(block) for block in layer.blocks]
    parts = zip(layer.blocks, tensors, flat.split([num_elements(each) for each in tensors]), strict=True)
    return DenseWeights(*(WEIGHTS_OF[type(block)](**views(each, part)) for block, each, part in parts))


def expert_views(layer: Layer, flat: Tensor) -> ExpertWeights:
    """The expert of a layer that lies in `flat`."""
    return ExpertWeights(**views(expert_tensors(layer), flat))


def experts_in(layer: Layer, flat: Tensor, first: int) -> Experts:
    """All experts of a layer that lie in `flat` one after the other, numbered from `first`."""
    if not len(flat):
        return Experts()
    tensors = expert_tensors(layer)
    each_EP = flat.view(-1, num_elements(tensors))
    parts = each_EP.split([tensor.parameters for tensor in tensors], dim=1)
    stack = ExpertStack(first, *(part.unflatten(1, each.shape) for part, each in zip(parts, tensors, strict=True)))
    return Experts([(first + e, expert_views(layer, part)) for e, part in enumerate(each_EP)], (stack,))


def head_views(spec: ModelSpec, flat: Tensor) -> HeadWeights:
    """The head that lies in `flat`."""
    return HeadWeights(**views(head_tensors(spec), flat))
