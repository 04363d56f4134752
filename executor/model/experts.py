"""What comes after attention: output projection, router and experts; and the logits at the end.

T tokens, D hidden, Q = heads*head_dim, E experts, K experts per token, I intermediate,
R requests, V vocab, n tokens that go to one expert.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from executor.model.architecture import Architecture, Scores
from executor.model.layout import DenseWeights, ExpertWeights, RouterWeights
from executor.model.linear import add_projected, max_native_tokens, project
from executor.model.norm import normed
from executor.model.workspace import Workspace
from executor.native import Kernels, kernels


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts each token goes to, each expert at most once, and their weights."""

    weights_TK: Tensor  # noqa: N815 - float32
    experts_TK: Tensor  # noqa: N815 - int64


def post_attention(
    arch: Architecture, hidden_TD: Tensor, attention_TQ: Tensor, dense: DenseWeights, workspace: Workspace
) -> tuple[Tensor, Routing]:
    """Add the projected attention to `hidden_TD`, in place, in a layer with experts.

    Returns the experts' input, taken from the workspace, and its routing, allocated by torch.
    """
    assert isinstance(dense.ffn, RouterWeights), dense.ffn
    add_projected(attention_TQ, dense.attention.output, hidden_TD)
    x_TD = normed(arch, hidden_TD, dense.ffn.ffn_norm, workspace)
    return x_TD, route(arch, x_TD, dense.ffn.router)


def route(arch: Architecture, x_TD: Tensor, router_ED: Tensor) -> Routing:
    """The experts of greatest score for each token, and their normalised scores."""
    logits_TE = project(x_TD, router_ED, x_TD.new_empty(len(x_TD), len(router_ED)))
    if arch.router.scores is Scores.SIGMOID:
        scores_TE = logits_TE.float().sigmoid_()
    else:
        scores_TE = logits_TE.softmax(-1, dtype=torch.float32)
    weights_TK, experts_TK = scores_TE.topk(arch.spec.experts_per_token)
    if arch.router.norm is not None:
        weights_TK /= torch.linalg.vector_norm(weights_TK, arch.router.norm, dim=-1, keepdim=True)
    return Routing(weights_TK, experts_TK)


def run_experts(
    x_TD: Tensor, routing: Routing, experts: Iterable[tuple[int, ExpertWeights]], out_TD: Tensor, workspace: Workspace
) -> list[int]:
    """Add to `out_TD` the weighted output of exactly the `experts` given, as (index, weights).

    Returns how many tokens are routed to each expert, given or not, up to the last that any is.
    Experts may come lazily and in any order; those that no token goes to are skipped. `out_TD` may
    be the residual stream itself, but not `x_TD`. On the CPU the native kernels, if they are there,
    compute the experts of at most `max_native_tokens`, torch all others.
    """
    native = kernels()
    if native is None or not native.takes_experts(x_TD, routing.weights_TK, routing.experts_TK, out_TD):
        return _run_in_torch(x_TD, routing, experts, out_TD, workspace)
    given = list(experts)
    if not given or not len(x_TD):
        return _run_in_torch(x_TD, routing, given, out_TD, workspace)
    counts, left_out = _run_natively(native, x_TD, routing, given, out_TD, workspace)
    if left_out:
        _run_in_torch(x_TD, routing, [given[i] for i in left_out], out_TD, workspace)
    return counts


def _run_natively(
    native: Kernels,
    x_TD: Tensor,
    routing: Routing,
    experts: list[tuple[int, ExpertWeights]],
    out_TD: Tensor,
    workspace: Workspace,
) -> tuple[list[int], list[int]]:
    tokens, hidden = x_TD.shape
    intermediate = experts[0][1].w2.shape[1]
    # As much as torch would take for one expert with all tokens, or less if that is enough.
    planned = tokens * (hidden + 2 * intermediate) * x_TD.itemsize // torch.float32.itemsize
    enough = routing.experts_TK.numel() * native.activation_floats(intermediate)
    mark = workspace.mark()
    done = native.run_experts(
        x_TD,
        routing.weights_TK,
        routing.experts_TK,
        [(index, weights.w13, weights.w2) for index, weights in experts],
        out_TD,
        workspace.take((min(planned, enough),), torch.float32),
        max_tokens=max_native_tokens(x_TD.dtype),
    )
    workspace.release(mark)
    return done


def _run_in_torch(
    x_TD: Tensor, routing: Routing, experts: Iterable[tuple[int, ExpertWeights]], out_TD: Tensor, workspace: Workspace
) -> list[int]:
    experts_per_token = routing.experts_TK.shape[1]
    sorted_experts, order = routing.experts_TK.flatten().sort(stable=True)
    weights = routing.weights_TK.flatten()[order].to(x_TD.dtype).unsqueeze(1)
    tokens = order // experts_per_token
    counts = torch.bincount(sorted_experts).tolist()
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    mark = workspace.mark()
    gathered: Tensor | None = None
    activations: Tensor | None = None
    for index, expert in experts:
        count = counts[index] if index < len(counts) else 0
        if not count:
            continue
        if gathered is None or activations is None:
            gathered = workspace.take((max(counts), x_TD.shape[1]), x_TD.dtype)
            activations = workspace.take((max(counts), len(expert.w13)), x_TD.dtype)
        routed = slice(starts[index], starts[index] + count)
        rows, x_nD, gate_up_n2I = tokens[routed], gathered[:count], activations[:count]
        torch.index_select(x_TD, 0, rows, out=x_nD)
        torch.mm(x_nD, expert.w13.T, out=gate_up_n2I)
        gate_nI, up_nI = gate_up_n2I.chunk(2, dim=1)
        functional.silu(gate_nI, inplace=True).mul_(up_nI)
        torch.mm(gate_nI, expert.w2.T, out=x_nD)
        out_TD.index_add_(0, rows, x_nD.mul_(weights[routed]))
    workspace.release(mark)
    return counts


def logits(
    arch: Architecture, hidden_RD: Tensor, final_norm_D: Tensor, lm_head_VD: Tensor, workspace: Workspace
) -> Tensor:
    """Logits of the next token, float32 and taken from the workspace."""
    shape = (len(hidden_RD), len(lm_head_VD))
    logits_RV = workspace.take(shape, torch.float32)
    mark = workspace.mark()
    x_RD = normed(arch, hidden_RD, final_norm_D, workspace)
    if x_RD.dtype is torch.float32:
        project(x_RD, lm_head_VD, logits_RV)
    else:
        narrow_RV = workspace.take(shape, x_RD.dtype)
        logits_RV.copy_(project(x_RD, lm_head_VD, narrow_RV))
    workspace.release(mark)
    return logits_RV
