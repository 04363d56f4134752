"""Where each weight of a layer lies in memory, the same for every family.

D hidden, Q = heads*head_dim, KV = kv_heads*head_dim, E experts, I intermediate, V vocab.

The dense part of a layer, then its experts in order, contiguous and without padding: the sizes are
those of `ModelSpec.dense_parameters` and `ModelSpec.expert_parameters`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from hrm.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """A layer's weights outside its experts, in the order in which they lie in memory.

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


def dense_views(spec: ModelSpec, flat: Tensor) -> DenseWeights:
    """Views of the dense part that lies in `flat`, a vector of `spec.dense_parameters` elements."""
    hidden = spec.hidden_size
    return DenseWeights(
        *_views(
            flat,
            (hidden,),
            (spec.query_size + 2 * spec.kv_size, hidden),
            (hidden, spec.query_size),
            (hidden,),
            (spec.num_experts, hidden),
        )
    )


def expert_views(spec: ModelSpec, flat: Tensor) -> ExpertWeights:
    """Views of the expert that lies in `flat`, a vector of `spec.expert_parameters` elements."""
    hidden, intermediate = spec.hidden_size, spec.intermediate_size
    return ExpertWeights(*_views(flat, (2 * intermediate, hidden), (hidden, intermediate)))


def expert_stack(spec: ModelSpec, flat: Tensor, first: int) -> ExpertStack:
    """The experts that lie one after the other in `flat`, numbered from `first`."""
    hidden, intermediate = spec.hidden_size, spec.intermediate_size
    each_EP = flat.view(-1, spec.expert_parameters)
    w13, w2 = each_EP.split((2 * intermediate * hidden, intermediate * hidden), dim=1)
    return ExpertStack(first, w13.unflatten(1, (2 * intermediate, hidden)), w2.unflatten(1, (hidden, intermediate)))


def head_views(spec: ModelSpec, flat: Tensor) -> HeadWeights:
    """Views of the head that lies in `flat`, a vector of `spec.head_parameters` elements."""
    hidden = spec.hidden_size
    return HeadWeights(*_views(flat, (hidden,), (spec.vocab_size, hidden)))


def _views(flat: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    sizes = [prod(shape) for shape in shapes]
    assert flat.ndim == 1, flat.shape
    assert len(flat) == sum(sizes), (len(flat), sizes)
    return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
