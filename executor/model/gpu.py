"""What a GPU computes otherwise than the host: attention of many requests at once, grouped experts.

Nothing here makes the host wait for the device, but for `run_experts` where there is no grouped GEMM or many rows
go to several stacks, so tasks can be queued ahead. It all runs on CPU tensors too, where the tests compare it with
the functions that the host uses.

T tokens, D hidden, H heads, G kv heads, d head_dim, Q = H*d, X = Q+2KV, R requests, C tokens of a
cache, E experts, K experts per token, I intermediate, N = T*K routed rows, n of them at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar, Final, NamedTuple, final

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from executor.model.attention import prefill_attention
from executor.model.kernels import AbstractKernels
from executor.model.kv_attention import attend_to_codes
from executor.model.kv_rows import is_quantised
from executor.model.layout import Experts, ExpertStack
from executor.model.linear import multiply
from executor.model.numbers import PromptNumbers, RowNumbers
from executor.model.softmax import PLAIN, Softmax, attend
from executor.model.workspace import Workspace
from executor.native.experts import SILU, Glu, Routing
from hrm.layers import GroupedQueryAttention
from hrm.units import MIB

FLASH_DTYPES: Final = (torch.bfloat16, torch.float16)
FLASH_HEAD_DIM: Final = 256  # at most, in steps of 8
ALIGNED_BYTES: Final = 16  # of the rows and the places of a grouped GEMM's matrices
# Of routed rows: with fewer, waiting for how many go where takes longer than computing some for nothing.
WORTH_COUNTING_BYTES: Final = 64 * MIB


@final
@dataclass(frozen=True)
class GpuKernels(AbstractKernels):
    """The kernels of one GPU.

    `flash` is aten's _flash_attention_forward where the GPU has it, and `grouped` a grouped GEMM
    that takes its offsets from the device.
    """

    flash: Callable[..., Any] | None = None
    grouped: Callable[..., Tensor] | None = None
    shares_memory: ClassVar[bool] = False

    def decode_attention(
        self,
        block: GroupedQueryAttention,
        qkv_RX: Tensor,
        cache_C2Gd: Tensor,
        rows: RowNumbers,
        out_RQ: Tensor,
        *,
        spare_bytes: int,
        softmax: Softmax = PLAIN,
    ) -> None:
        """Attention of one new token per request over its own part of the cache.

        Without flash attention the caches of as many requests as fit `spare_bytes` are gathered at
        a time. Quantised ones are gathered in any case.
        """
        numbers, longest = rows.sent, rows.longest
        query_RHd = qkv_RX[:, : block.query_size].view(-1, block.num_heads, block.head_dim)
        if is_quantised(cache_C2Gd):
            attend_to_codes(block, query_RHd, cache_C2Gd, rows, out_RQ, softmax, spare_bytes=spare_bytes)
            return
        keys_CGd, values_CGd = cache_C2Gd.unbind(1)
        if self.flash is not None and _takes_flash(cache_C2Gd.dtype, block.head_dim):
            out_RHd, lse_HR = self.flash(
                query_RHd,
                keys_CGd,
                values_CGd,
                numbers.queries,
                numbers.starts,
                1,
                longest,
                0.0,
                False,
                False,
                seqused_k=numbers.lengths_R,
                scale=softmax.scale,
            )[:2]
            out_RQ.copy_(_damped(softmax, out_RHd, lse_HR).reshape(out_RQ.shape))
            return
        group = block.num_heads // block.num_kv_heads
        token_bytes = block.cached_elements * cache_C2Gd.itemsize
        at_once = max(1, spare_bytes // (2 * longest * token_bytes))
        for first in range(0, len(query_RHd), at_once):
            some = slice(first, first + at_once)
            rows_rL, seen = numbers.places(some, range(longest))
            grouped = query_RHd[some].view(-1, block.num_kv_heads, group, block.head_dim)
            keys, values = (part[rows_rL].transpose(1, 2) for part in (keys_CGd, values_CGd))
            context = _with_sinks(grouped, keys, values, seen, softmax)
            out_RQ[some].copy_(context.reshape(-1, out_RQ.shape[1]))

    def prefill_attention(
        self,
        block: GroupedQueryAttention,
        qkv_TX: Tensor,
        prompts: PromptNumbers,
        caches_C2Gd: Sequence[Tensor | None],
        out_TQ: Tensor,
        workspace: Workspace,
        softmax: Softmax = PLAIN,
    ) -> None:
        """Causal attention within each of the prompts that lie one after the other in `qkv_TX`.

        The first prompt's cache is attended over before those of the others are written: they may
        lie in the same memory.
        """
        lengths, ends = prompts.lengths, prompts.ends
        heads, groups = block.num_heads, block.num_kv_heads
        head_dim = block.head_dim
        cache = caches_C2Gd[0]
        after_prefix = int(cache is not None and len(cache) > lengths[0])
        first = sum(lengths[:after_prefix])
        if self.flash is None or not _takes_flash(qkv_TX.dtype, head_dim) or softmax.reach.chunked:
            if after_prefix:
                prefill_attention(
                    block, qkv_TX[:first], lengths[:1], caches_C2Gd[:1], out_TQ[:first], workspace, softmax
                )
            _attend_one_by_one(block, qkv_TX[first:], lengths[after_prefix:], out_TQ[first:], softmax)
        else:
            q, k, v = qkv_TX.view(len(qkv_TX), -1, head_dim).split((heads, groups, groups), dim=1)
            how = {"scale": softmax.scale}
            if softmax.reach.rows:
                how |= {"window_size_left": softmax.reach.rows - 1, "window_size_right": 0}
            if len(lengths) > after_prefix:
                # Of single tokens the kernel reads its queries without looking where they are.
                longest = max(lengths[after_prefix:])
                whole = ends[1:] - ends[1] if after_prefix else ends
                parts = (q[first:], k[first:], v[first:])
                out_THd, lse_HT = self.flash(*parts, whole, whole, longest, longest, 0.0, True, False, **how)[:2]
                out_TQ[first:].copy_(_damped(softmax, out_THd, lse_HT).reshape(len(out_THd), -1))
            if cache is not None and after_prefix:
                total = len(cache)
                _fill(caches_C2Gd[:1], qkv_TX[:first], lengths[:1], heads)
                keys, values = cache.unbind(1)
                rows = torch.arange(0, 2 * total, total, dtype=torch.int32, device=cache.device)
                parts = (q[:first], keys, values)
                out_LHd, lse_HL = self.flash(*parts, ends[:2], rows, first, total, 0.0, True, False, **how)[:2]
                out_TQ[:first].copy_(_damped(softmax, out_LHd, lse_HL).reshape(first, -1))
        # Only now: another prompt's cache may lie where the first one's did.
        _fill(caches_C2Gd[after_prefix:], qkv_TX[first:], lengths[after_prefix:], heads)

    def run_experts(
        self,
        x_TD: Tensor,
        routing: Routing,
        experts: Experts,
        out_TD: Tensor,
        workspace: Workspace,  # noqa: ARG002 - temporaries are torch's
        *,
        rows_at_once: int,
        num_experts: int,
        glu: Glu = SILU,
    ) -> Tensor:
        """Stack by stack; the counts are on the device.

        Where each stack's rows end is read back once, if a stack has no grouped GEMM, or if several stacks would each
        compute all of many rows.
        """
        experts_N = routing.experts_TK.flatten()
        counts_E = experts_N.new_zeros(num_experts)
        counts_E.scatter_add_(0, experts_N, experts_N.new_ones(1).expand_as(experts_N))
        if not len(x_TD):
            return counts_E
        grouped = [self.grouped if _takes_grouped(x_TD, stack) else None for stack in experts.stacks]
        row_bytes = x_TD.shape[1] * x_TD.itemsize
        is_worth_it = len(experts.stacks) > 1 and len(experts_N) * row_bytes >= WORTH_COUNTING_BYTES
        counts = counts_E.tolist() if is_worth_it or None in grouped else None
        tokens = _RoutedTokens(x_TD, routing, out_TD, rows_at_once, num_experts, glu)
        for stack, gemm in zip(experts.stacks, grouped, strict=True):
            tokens.run(stack, gemm, None if counts is None else _ends(counts, stack))
        return counts_E


@final
@dataclass(frozen=True, slots=True)
class _RoutedTokens:
    """Tokens and which experts each goes to; a stack of these adds what it makes of its own to `out_TD`."""

    x_TD: Tensor  # noqa: N815
    routing: Routing
    out_TD: Tensor  # noqa: N815
    rows_at_once: int
    num_experts: int
    glu: Glu

    def run(self, stack: ExpertStack, grouped: Callable[..., Tensor] | None, ends: list[int] | None) -> None:
        """By a grouped GEMM if it is given; `ends` is where each expert's rows end, where the host knows."""
        per_token = self.routing.experts_TK.shape[1]
        # The stack's own experts come first, whichever they are.
        keys_N = (self.routing.experts_TK.flatten() - stack.first).remainder_(self.num_experts)
        sorted_N, order_N = keys_N.to(torch.int16).sort(stable=True)
        count = len(stack.w13_E2ID)
        of_stack = torch.arange(count, device=self.x_TD.device, dtype=torch.int16)
        ends_E = torch.searchsorted(sorted_N, of_stack, right=True, out_int32=True)
        del keys_N, sorted_N
        num_rows = len(order_N) if ends is None else ends[-1]
        if not num_rows:
            return
        rows = _Rows(order_N // per_token, self.routing.weights_TK.flatten()[order_N].to(self.x_TD.dtype).unsqueeze(1))
        places_N = torch.empty_like(order_N)
        places_N[order_N] = torch.arange(len(order_N), device=self.x_TD.device)
        if grouped is not None and (2 * num_rows <= self.rows_at_once or per_token == 1):
            # Room for all at once. A row past them stands for all that are another stack's.
            here = slice(0, len(order_N) if ends is None else min(num_rows + 1, len(order_N)))
            y_ND = self._outputs(rows.at(here), stack, ends_E, None, grouped)
            if ends is None:
                _mask_others(y_ND, ends_E, count, self.num_experts)
            else:
                y_ND[num_rows:].zero_()
                places_N.clamp_(max=len(y_ND) - 1)
            self.out_TD.add_(y_ND[places_N].view(len(self.x_TD), per_token, -1).sum(1))
            return
        for first in range(0, num_rows, self.rows_at_once):
            piece = slice(first, min(first + self.rows_at_once, num_rows))
            size = piece.stop - first
            ends_here = (ends_E - first).clamp_(0, size)
            on_host = None if ends is None else [min(max(e - first, 0), size) for e in ends]
            y_nD = self._outputs(rows.at(piece), stack, ends_here, on_host, grouped)
            if on_host is None:
                _mask_others(y_nD, ends_here, count, self.num_experts)
            _add_rows(self.out_TD, y_nD, places_N.view(len(self.x_TD), per_token) - first)
            del y_nD

    def _outputs(
        self,
        rows: "_Rows",
        stack: ExpertStack,
        ends_E: Tensor,
        ends: list[int] | None,
        grouped: Callable[..., Tensor] | None,
    ) -> Tensor:
        """The experts' weighted outputs of rows sorted by expert; whatever it may be in rows of others."""
        glu, x_nD = self.glu, self.x_TD.index_select(0, rows.tokens_n)
        if glu.weight_on_input:
            x_nD.mul_(rows.weights_n1)
        if grouped is not None and isinstance(stack.w13_E2ID, Tensor) and isinstance(stack.w2_EDI, Tensor):
            gate_up_n2I = grouped(x_nD, stack.w13_E2ID.transpose(-2, -1), offs=ends_E)
            del x_nD
            _add_bias(gate_up_n2I, stack.w13_bias_E2I, ends_E)
            y_nD = grouped(glu.apply(gate_up_n2I), stack.w2_EDI.transpose(-2, -1), offs=ends_E)
            _add_bias(y_nD, stack.w2_bias_ED, ends_E)
            return y_nD if glu.weight_on_input else y_nD.mul_(rows.weights_n1)
        assert ends is not None
        gate_up_n2I = x_nD.new_empty(len(x_nD), stack.w13_E2ID.shape[1])
        start = 0
        for expert, end in enumerate(ends):
            if end > start:
                own = slice(start, end)
                multiply(x_nD[own], stack.w13_E2ID[expert], gate_up_n2I[own])
                if stack.w13_bias_E2I is not None:
                    gate_up_n2I[own] += stack.w13_bias_E2I[expert]
                gate_nI = glu.apply(gate_up_n2I[own])
                multiply(gate_nI, stack.w2_EDI[expert], x_nD[own])  # done with as input
            start = end
        _add_bias(x_nD, stack.w2_bias_ED, ends_E)
        return x_nD if glu.weight_on_input else x_nD.mul_(rows.weights_n1)


class _Rows(NamedTuple):
    """Routed rows, sorted by expert: the token of each, and its weight."""

    tokens_n: Tensor
    weights_n1: Tensor

    def at(self, piece: slice) -> "_Rows":
        """Some of them."""
        return _Rows(self.tokens_n[piece], self.weights_n1[piece])


def _fill(caches_C2Gd: Sequence[Tensor | None], qkv_TX: Tensor, lengths: Sequence[int], heads: int) -> None:
    """Write each prompt's keys and values to the last rows of its cache, if it has one."""
    start = 0
    for cache_C2Gd, length in zip(caches_C2Gd, lengths, strict=True):
        if cache_C2Gd is not None:
            kv_L = qkv_TX[start : start + length, heads * cache_C2Gd.shape[-1] :]
            cache_C2Gd[-length:].copy_(kv_L.view(length, *cache_C2Gd.shape[1:]))
        start += length


def _damped(softmax: Softmax, out_THd: Tensor, lse_HT: Tensor) -> Tensor:
    """What flash attention tells, with sinks."""
    if softmax.sinks_H is None:
        return out_THd
    return softmax.damped(out_THd.permute(1, 0, 2).unsqueeze(1), lse_HT.unsqueeze(1)).squeeze(1).permute(1, 0, 2)


def _with_sinks(q_rGhd: Tensor, k_rGLd: Tensor, v_rGLd: Tensor, seen_r11L: Tensor, softmax: Softmax) -> Tensor:
    """Attention of one query of each head; with sinks their logits are few enough to be kept."""
    if softmax.sinks_H is None:
        return scaled_dot_product_attention(q_rGhd, k_rGLd, v_rGLd, attn_mask=seen_r11L, scale=softmax.scale)
    scale = q_rGhd.shape[-1] ** -0.5 if softmax.scale is None else softmax.scale
    logits = torch.matmul(q_rGhd, k_rGLd.transpose(-1, -2)).float().mul_(scale)
    logits = logits.masked_fill_(seen_r11L.logical_not(), -torch.inf)
    sinks = softmax.sinks_H.float().view(1, *q_rGhd.shape[1:3], 1).expand(len(logits), -1, -1, -1)
    weights = torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1]
    return torch.matmul(weights.to(v_rGLd.dtype), v_rGLd)


def _attend_one_by_one(
    block: GroupedQueryAttention, qkv_TX: Tensor, lengths: Sequence[int], out_TQ: Tensor, softmax: Softmax
) -> None:
    """Prompt by prompt, the query heads that share a KV head as a batch of their own.

    So keys and values are broadcast, not copied, and every kernel of torch's takes that.
    """
    groups, heads, head_dim = block.num_kv_heads, block.num_heads, block.head_dim
    start = 0
    for length in lengths:
        rows = qkv_TX[start : start + length]
        q, k, v = rows.view(length, -1, head_dim).split((heads, groups, groups), dim=1)
        out = out_TQ[start : start + length]
        start += length
        if not softmax.is_plain(length):
            attend(q, k, v, out.view(length, heads, head_dim), softmax)
            continue
        q_GgLd = q.view(length, groups, -1, head_dim).permute(1, 2, 0, 3)
        k_GgLd, v_GgLd = (x.permute(1, 0, 2).unsqueeze(1).expand(-1, heads // groups, -1, -1) for x in (k, v))
        context = scaled_dot_product_attention(q_GgLd, k_GgLd, v_GgLd, is_causal=True, scale=softmax.scale)
        out.view(length, groups, -1, head_dim).copy_(context.permute(2, 0, 1, 3))


def _takes_flash(dtype: torch.dtype, head_dim: int) -> bool:
    return dtype in FLASH_DTYPES and head_dim % 8 == 0 and head_dim <= FLASH_HEAD_DIM


def _add_bias(rows_nW: Tensor, bias_EW: Tensor | None, ends_E: Tensor) -> None:
    """Add to rows sorted by expert, up to `ends_E`, the bias of each one's expert."""
    if bias_EW is not None:
        places_n = torch.arange(len(rows_nW), device=rows_nW.device, dtype=ends_E.dtype)
        experts_n = torch.searchsorted(ends_E, places_n, right=True).clamp_(max=len(bias_EW) - 1)
        rows_nW += bias_EW[experts_n]


def grouped_gemm() -> Callable[..., Tensor]:
    """torch's, under its name of before 2.10 or of since."""
    return getattr(functional, "grouped_mm", None) or getattr(torch, "_grouped_mm")  # noqa: B009


def _ends(counts: Sequence[int], stack: ExpertStack) -> list[int]:
    """Where the rows of each of a stack's experts end, sorted by expert, given how many every expert has."""
    own = range(stack.first, stack.first + len(stack.w13_E2ID))
    return list(accumulate(counts[expert % len(counts)] for expert in own))


def _mask_others(y_nD: Tensor, ends_E: Tensor, count: int, num_experts: int) -> None:
    """Zeros in the rows past the last expert of a stack, where nothing was written."""
    if count < num_experts:
        past_n = torch.arange(len(y_nD), device=y_nD.device) >= ends_E[-1]
        y_nD.masked_fill_(past_n.unsqueeze(1), 0)


def _add_rows(out_TD: Tensor, y_nD: Tensor, places_TK: Tensor) -> None:
    """Add to every token those of its rows that are among these, in the order of its experts.

    index_add_ would add them in whatever order they come, which in bfloat16 is another result.
    """
    inside_TK = (places_TK >= 0) & (places_TK < len(y_nD))
    rows_TK = places_TK.clamp(0, len(y_nD) - 1)
    for rows_T, inside_T in zip(rows_TK.unbind(1), inside_TK.unbind(1), strict=True):
        part_TD = y_nD.index_select(0, rows_T)
        out_TD += part_TD.masked_fill_(inside_T.logical_not().unsqueeze(1), 0)


def _takes_grouped(x_TD: Tensor, stack: ExpertStack) -> bool:
    matrices = (stack.w13_E2ID, stack.w2_EDI)
    return x_TD.dtype is torch.bfloat16 and all(
        isinstance(part, Tensor)
        and part.data_ptr() % ALIGNED_BYTES == 0
        and all(part.stride(axis) * part.itemsize % ALIGNED_BYTES == 0 for axis in (0, 1))
        for part in matrices
    )
