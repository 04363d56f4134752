"""What comes after attention in a layer without experts: one FFN that every token goes through.

T tokens, D hidden, Q = heads*head_dim, I intermediate.
"""

from torch import Tensor
from torch.nn import functional

from executor.model.architecture import Architecture
from executor.model.layout import DenseWeights, FfnWeights
from executor.model.linear import add_projected, project
from executor.model.norm import normed
from executor.model.workspace import Workspace


def feed_forward(
    arch: Architecture, hidden_TD: Tensor, attention_TQ: Tensor, dense: DenseWeights, workspace: Workspace
) -> None:
    """Add the projected attention to `hidden_TD`, in place, and then the output of its FFN."""
    weights = dense.ffn
    assert isinstance(weights, FfnWeights), weights
    add_projected(attention_TQ, dense.attention.output, hidden_TD)
    mark = workspace.mark()
    x_TD = normed(arch, hidden_TD, weights.ffn_norm, workspace)
    gate_up_T2I = workspace.take((len(x_TD), len(weights.dense_w13)), x_TD.dtype)
    gate_TI, up_TI = project(x_TD, weights.dense_w13, gate_up_T2I).chunk(2, dim=1)
    functional.silu(gate_TI, inplace=True).mul_(up_TI)
    add_projected(gate_TI, weights.dense_w2, hidden_TD)
    workspace.release(mark)
