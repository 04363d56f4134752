"""Which experts tokens go to, and what these make of them: what torch and native kernels are told alike.

T tokens, D hidden, E experts, K experts per token, I intermediate, G groups of experts, e experts of each.
"""

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from math import inf
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from executor.formats import Matrix


class Activation(IntEnum):
    """What an expert makes of its gate and up projections, numbered as in `kernels.hpp`."""

    SILU = 0  # silu(gate) * up
    GELU_TANH = 1  # gelu(gate) * up, with the tanh that approximates it
    CLAMPED = 2  # (up + 1) * gate * sigmoid(1.702 * gate), gates clamped from above, ups to ± limit


@dataclass(frozen=True, slots=True)
class Glu:
    """What an FFN makes of its gate and up projections; `limit` is of `Activation.CLAMPED`.

    With `weight_on_input` a router's weights multiply what goes into experts, not what comes out.
    """

    activation: Activation = Activation.SILU
    limit: float = inf
    weight_on_input: bool = False

    def apply(self, gate_up_n2I: Tensor) -> Tensor:
        """The gate through the activation times the other half, where the gate was."""
        gate_nI, up_nI = gate_up_n2I.chunk(2, dim=1)
        if self.activation is Activation.SILU:
            return functional.silu(gate_nI, inplace=True).mul_(up_nI)
        if self.activation is Activation.GELU_TANH:
            return gate_nI.copy_(functional.gelu(gate_nI, approximate="tanh")).mul_(up_nI)
        gate_nI.clamp_(max=self.limit)
        up_nI.clamp_(-self.limit, self.limit).add_(1)
        return gate_nI.mul_(torch.sigmoid(gate_nI * 1.702)).mul_(up_nI)


SILU: Final = Glu()


class Scores(StrEnum):
    """What a router makes of its logits: probabilities of one choice, or of each expert by itself.

    By SPARSE_MIXER experts are chosen one after the other; see `sparse_mixer`.
    """

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    SPARSE_MIXER = "sparse_mixer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """How experts are chosen: those with the greatest scores, which become a token's weights.

    A correction, where weights have one, is added to scores for the choice only. Of `groups` of
    experts, one after the other, only `chosen_groups` are chosen from: those whose `best_of_group`
    greatest scores have the greatest sum. The weights are divided by their `norm`-norm (1 makes them
    sum to one; None leaves them alone), and then multiplied by `scale`, and by what weights may have for
    each expert. Weights may also have a norm of the router's own for its input, whose logits are
    multiplied by `input_scale`. A sparse mixer takes none of these, only `jitter`.
    """

    scores: Scores = Scores.SOFTMAX
    norm: float | None = 1.0
    groups: int = 1
    chosen_groups: int = 1
    best_of_group: int = 1
    scale: float = 1.0
    jitter: float = 0.0
    input_scale: float = 1.0

    def restricted(self, scores_TE: Tensor) -> Tensor:
        """Scores, least of all where a group is not chosen from."""
        if self.chosen_groups == self.groups:
            return scores_TE
        scores_TGe = scores_TE.unflatten(1, (self.groups, -1))
        of_group_TG = scores_TGe.topk(self.best_of_group).values.sum(-1)
        chosen_Tg = of_group_TG.topk(self.chosen_groups, sorted=False).indices
        excluded_TG = torch.ones_like(of_group_TG, dtype=torch.bool).scatter_(1, chosen_Tg, value=False)
        return scores_TGe.masked_fill(excluded_TG.unsqueeze(-1), -torch.inf).flatten(1)


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts each token goes to, each expert at most once, and their weights."""

    weights_TK: Tensor  # noqa: N815 - float32
    experts_TK: Tensor  # noqa: N815 - int64


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One expert: `w2 @ (silu(gate) * up)`, where `w13 @ x` is the gate followed by the up half."""

    w13: Matrix  # (2I, D)
    w2: Matrix  # (D, I)
    w13_bias: Tensor | None = None  # (2I)
    w2_bias: Tensor | None = None  # (D)
