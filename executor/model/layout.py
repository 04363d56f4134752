"""Where each weight lies in memory, the same for every family.

D hidden, Q = heads*head_dim, KV = kv_heads*head_dim, E experts, I intermediate, V vocab.

A table says which tensors there are, in the order in which they lie in a vector, contiguous and
without padding. Of a layer that is the dense part, and then each of its experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from torch import Tensor

from hrm.model_spec import ModelSpec


class TensorSpec(NamedTuple):
    """A tensor; `parts` are the rows of each of the matrices that it joins, if it joins any."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[int, ...] = ()


Tensors = tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """A layer's weights outside its experts.

    `qkv` maps to queries, keys and values one after the other.
    """

    attention_norm: Tensor  # (D)
    qkv: Tensor  # (Q+2KV, D)
    output: Tensor  # (D, Q)
    ffn_norm: Tensor  # (D)
    router: Tensor  # (E, D)


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert: `w2 @ (silu(gate) * up)`, where `w13 @ x` is the gate followed by the up half."""

    w13: Tensor  # (2I, D)
    w2: Tensor  # (D, I)


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """Experts that lie one after the other, from number `first` on, as one tensor a matrix."""

    first: int
    w13_E2ID: Tensor  # noqa: N815
    w2_EDI: Tensor  # noqa: N815


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
    return (TensorSpec("embedding", (spec.vocab_size, spec.hidden_size)),)


def dense_tensors(spec: ModelSpec) -> Tensors:
    """A layer's tensors outside its experts."""
    hidden, parts = spec.hidden_size, (spec.query_size, spec.kv_size, spec.kv_size)
    return (
        TensorSpec("attention_norm", (hidden,)),
        TensorSpec("qkv", (sum(parts), hidden), parts),
        TensorSpec("output", (hidden, spec.query_size)),
        TensorSpec("ffn_norm", (hidden,)),
        TensorSpec("router", (spec.num_experts, hidden)),
    )


def expert_tensors(spec: ModelSpec) -> Tensors:
    """One expert's tensors."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    return TensorSpec("w13", (2 * inner, hidden), (inner, inner)), TensorSpec("w2", (hidden, inner))


def head_tensors(spec: ModelSpec) -> Tensors:
    """What comes after the layers."""
    return TensorSpec("final_norm", (spec.hidden_size,)), TensorSpec("lm_head", (spec.vocab_size, spec.hidden_size))


def views(tensors: Tensors, flat: Tensor) -> dict[str, Tensor]:
    """The tensors, by name, that lie in a vector of as many elements as they have."""
    sizes = [prod(tensor.shape) for tensor in tensors]
    assert flat.ndim == 1, flat.shape
    assert len(flat) == sum(sizes), (len(flat), sizes)
    parts = zip(flat.split(sizes), tensors, strict=True)
    return {tensor.name: part.view(tensor.shape) for part, tensor in parts}


def dense_views(spec: ModelSpec, flat: Tensor) -> DenseWeights:
    """The dense part of a layer that lies in `flat`."""
    return DenseWeights(**views(dense_tensors(spec), flat))


def expert_views(spec: ModelSpec, flat: Tensor) -> ExpertWeights:
    """The expert that lies in `flat`."""
    return ExpertWeights(**views(expert_tensors(spec), flat))


def expert_stack(spec: ModelSpec, flat: Tensor, first: int) -> ExpertStack:
    """The experts that lie one after the other in `flat`, numbered from `first`."""
    tensors = expert_tensors(spec)
    each_EP = flat.view(-1, spec.expert_parameters)
    parts = each_EP.split([prod(tensor.shape) for tensor in tensors], dim=1)
    stacked = (part.unflatten(1, tensor.shape) for part, tensor in zip(parts, tensors, strict=True))
    return ExpertStack(first, *stacked)


def head_views(spec: ModelSpec, flat: Tensor) -> HeadWeights:
    """The head that lies in `flat`."""
    return HeadWeights(**views(head_tensors(spec), flat))
