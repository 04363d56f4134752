"""Routed experts over the tokens that go to them.

T tokens, D hidden, K experts per token, I intermediate, n tokens that go to one expert.
"""

from collections.abc import Callable, Iterable
from itertools import chain, cycle
from typing import Final

import torch
from torch import Tensor

from executor.formats import Packed
from executor.model.crossings import TOKENS_TRIED, Trial, Work, native_up_to, past_caches, random_numbers
from executor.model.linear import PACKED_PRODUCTS, multiply
from executor.model.workspace import Workspace
from executor.native import Kernels, kernels
from executor.native.experts import SILU, ExpertWeights, Glu, Routing
from executor.native.tape import is_recording
from hrm.contract.temporaries import TEMPORARY_ALIGNMENT_BYTES

_HIDDEN: Final = 2048  # of the experts that are tried
_INTERMEDIATE: Final = 512


def max_native_tokens(dtype: torch.dtype, *, packed: bool = False) -> int:
    """How many tokens of an expert at most the native kernels compute."""
    return native_up_to(PACKED_PRODUCTS if packed else EXPERTS, dtype)


def _trial(dtype: torch.dtype) -> Trial:
    """Tokens that all go to one expert, the next time to the next."""
    per_expert = 3 * _HIDDEN * _INTERMEDIATE
    rows_ERD = random_numbers((past_caches(per_expert, dtype), 3 * _INTERMEDIATE, _HIDDEN), dtype)
    matrices = [(rows[: 2 * _INTERMEDIATE], rows[2 * _INTERMEDIATE :].view(_HIDDEN, -1)) for rows in rows_ERD]
    next_of = cycle([ExpertWeights(w13, w2) for w13, w2 in matrices])

    def work_of(tokens: int) -> Callable[[], object]:
        x_TD, out_TD = torch.randn(tokens, _HIDDEN).to(dtype), torch.zeros(tokens, _HIDDEN, dtype=dtype)
        routing = Routing(torch.ones(tokens, 1), torch.zeros(tokens, 1, dtype=torch.int64))
        room = tokens * (_HIDDEN + 2 * _INTERMEDIATE + 2 * TEMPORARY_ALIGNMENT_BYTES) * dtype.itemsize
        workspace = Workspace(torch.empty(room, dtype=torch.uint8))
        return lambda: run_experts(x_TD, routing, [(0, next(next_of))], out_TD, workspace)

    return work_of


EXPERTS: Final = Work("experts", TOKENS_TRIED, _trial)


def run_experts(
    x_TD: Tensor,
    routing: Routing,
    experts: Iterable[tuple[int, ExpertWeights]],
    out_TD: Tensor,
    workspace: Workspace,
    *,
    glu: Glu = SILU,
) -> list[int]:
    """Add to `out_TD` the output of exactly the `experts` given, as (index, weights), weighted as `glu` says.

    Returns how many tokens are routed to each expert, given or not, up to the last that any is.
    Experts may come lazily and in any order; those that no token goes to are skipped. `out_TD` may
    be the residual stream itself, but not `x_TD`. On the CPU the native kernels, if they are there,
    compute the experts of at most `max_native_tokens`, torch all others.
    """
    native = kernels()
    if native is None or not native.takes_experts(x_TD, routing, out_TD):
        return _run_in_torch(x_TD, routing, experts, out_TD, workspace, glu)
    given = list(experts)
    if not is_recording():  # others will be chosen when it is played
        chosen = set(chain.from_iterable(routing.experts_TK.tolist()))
        given = [(index, weights) for index, weights in given if index in chosen]
    if not given or not x_TD.shape[0] or not native.takes_weights(given[0][1]):
        return _run_in_torch(x_TD, routing, given, out_TD, workspace, glu)
    counts, left_out = _run_natively(native, x_TD, routing, given, out_TD, workspace, glu)
    if left_out:
        _run_in_torch(x_TD, routing, [given[i] for i in left_out], out_TD, workspace, glu)
    return counts


def _run_natively(
    native: Kernels,
    x_TD: Tensor,
    routing: Routing,
    experts: list[tuple[int, ExpertWeights]],
    out_TD: Tensor,
    workspace: Workspace,
    glu: Glu,
) -> tuple[list[int], list[int]]:
    tokens, hidden = x_TD.shape
    intermediate = experts[0][1].w2.shape[1]
    # As much as torch would take for one expert with all tokens, or less if that is enough.
    planned = tokens * (hidden + 2 * intermediate) * x_TD.itemsize // torch.float32.itemsize
    enough = routing.experts_TK.numel() * native.activation_floats(intermediate)
    mark = workspace.mark()
    done = native.run_experts(
        x_TD,
        routing,
        experts,
        out_TD,
        workspace.take((min(planned, enough),), torch.float32),
        max_tokens=max_native_tokens(x_TD.dtype, packed=isinstance(experts[0][1].w13, Packed)),
        glu=glu,
    )
    workspace.release(mark)
    return done


def _run_in_torch(
    x_TD: Tensor,
    routing: Routing,
    experts: Iterable[tuple[int, ExpertWeights]],
    out_TD: Tensor,
    workspace: Workspace,
    glu: Glu,
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
        if glu.weight_on_input:
            x_nD.mul_(weights[routed])
        multiply(x_nD, expert.w13, gate_up_n2I)
        if expert.w13_bias is not None:
            gate_up_n2I += expert.w13_bias
        multiply(glu.apply(gate_up_n2I), expert.w2, x_nD)
        if expert.w2_bias is not None:
            x_nD += expert.w2_bias
        if not glu.weight_on_input:
            x_nD.mul_(weights[routed])
        out_TD.index_add_(0, rows, x_nD)
    workspace.release(mark)
    return counts
