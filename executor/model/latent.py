"""Latent attention, in both of its forms (arXiv 2405.04434, §2.1).

Decode is in the absorbed form: what projects cached vectors up to keys and values is applied to the new
token's queries and outputs instead, so that each row of the cache is read once for all heads. Prefill
projects the cached vectors up.

T tokens, R requests, C rows of a cache, H heads; of a head n and p elements of its query without and
with rotation, k = n+p, and v of its value; r elements of a compressed vector, L = r+p of a row of the
cache. An expanded token has (H, v+k): of every head the value and then the key.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from executor.model.kv_rows import dequantised, gathered, is_quantised
from executor.model.numbers import RowNumbers
from executor.model.workspace import Workspace
from executor.native import kernels
from executor.native.mixers import SplitQuery
from hrm.contract.temporaries import MASK_BLOCK_TOKENS
from hrm.layers import LatentAttention


def decode_on_host(
    block: LatentAttention,
    query_RHk: Tensor,
    kv_up: Tensor,
    cache_CL: Tensor,
    rows: RowNumbers,
    scale: float,
    out_RHv: Tensor,
) -> None:
    """Attention of one new token per request, by the native kernel or request by request."""
    native, query = kernels(), SplitQuery(*query_RHk.split((block.nope_head_dim, block.rope_head_dim), dim=2))
    if native is not None and native.takes_latent(query, cache_CL, kv_up, out_RHv):
        native.latent_attention(query, cache_CL, kv_up, rows.starts, rows.lengths, scale, out_RHv)
        return
    if is_quantised(cache_CL):
        for r, (start, length) in enumerate(zip(rows.starts, rows.lengths, strict=True)):
            rows_LL = dequantised(cache_CL.narrow(0, start, length), block.cached_parts, query_RHk.dtype)
            one, alone = slice(r, r + 1), replace(rows, starts=[0], lengths=[length])
            decode_on_host(block, query_RHk[one], kv_up, rows_LL, alone, scale, out_RHv[one])
        return
    absorbed_RHL = _absorbed(block, query_RHk, kv_up)
    context_RHr = absorbed_RHL[..., : block.kv_rank]  # whose place it takes
    for query_HL, context_Hr, start, length in zip(absorbed_RHL, context_RHr, rows.starts, rows.lengths, strict=True):
        own = cache_CL.narrow(0, start, length)[None, None]
        context_Hr.copy_(_attended(query_HL[None, None], own, block.kv_rank, None, scale)[0, 0])
    _write_values(block, context_RHr, kv_up, out_RHv)


def decode_at_once(
    block: LatentAttention,
    query_RHk: Tensor,
    kv_up: Tensor,
    cache_CL: Tensor,
    rows: RowNumbers,
    scale: float,
    out_RHv: Tensor,
    *,
    spare_bytes: int,
) -> None:
    """The same for many requests at once, so many that what is gathered and computed fits `spare_bytes`."""
    heads, size = block.num_heads, query_RHk.itemsize
    # Should torch have no kernel for heads so wide, it makes float32 copies of all, and scores.
    of_token = (size + 12) * block.cached_elements + 8 + heads * (2 * size + 8)
    if is_quantised(cache_CL):
        of_token += cache_CL.shape[1]
    of_head = (3 * size + 12) * block.cached_elements
    at_once = max(1, spare_bytes // (rows.longest * of_token + heads * of_head))
    for first in range(0, len(query_RHk), at_once):
        some = slice(first, first + at_once)
        rows_rC, seen_r11C = rows.sent.places(some, range(rows.longest))
        rows_rCL = _rows(block, cache_CL, rows_rC, query_RHk.dtype)
        query_r1HL = _absorbed(block, query_RHk[some], kv_up).unsqueeze(1)
        context_r1Hr = _attended(query_r1HL, rows_rCL.unsqueeze(1), block.kv_rank, seen_r11C, scale)
        _write_values(block, context_r1Hr[:, 0], kv_up, out_RHv[some])


def _rows(block: LatentAttention, cache_CL: Tensor, rows_rC: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of the cache as numbers."""
    if not is_quantised(cache_CL):
        return cache_CL[rows_rC]
    return dequantised(gathered(cache_CL, rows_rC), block.cached_parts, dtype)


def _attended(query_r1HL: Tensor, rows_r1CL: Tensor, rank: int, seen_r11C: Tensor | None, scale: float) -> Tensor:
    """Sums of compressed vectors; all heads are queries of one key that they share."""
    values = rows_r1CL[..., :rank]
    return scaled_dot_product_attention(query_r1HL, rows_r1CL, values, attn_mask=seen_r11C, scale=scale)


def _absorbed(block: LatentAttention, query_RHk: Tensor, kv_up: Tensor) -> Tensor:
    """Queries as cached rows answer them: (R, H, L)."""
    keys_Hnr, _ = _of_heads(block, kv_up)
    nope_RHn, rope_RHp = query_RHk.split((block.nope_head_dim, block.rope_head_dim), dim=2)
    absorbed_RHL = query_RHk.new_empty(*query_RHk.shape[:2], block.cached_elements)
    absorbed_RHL[..., : block.kv_rank].copy_(torch.bmm(nope_RHn.transpose(0, 1), keys_Hnr).transpose(0, 1))
    absorbed_RHL[..., block.kv_rank :].copy_(rope_RHp)
    return absorbed_RHL


def _write_values(block: LatentAttention, context_RHr: Tensor, kv_up: Tensor, out_RHv: Tensor) -> None:
    _, values_Hvr = _of_heads(block, kv_up)
    out_RHv.copy_(torch.bmm(context_RHr.transpose(0, 1), values_Hvr.transpose(1, 2)).transpose(0, 1))


def _of_heads(block: LatentAttention, kv_up: Tensor) -> tuple[Tensor, Tensor]:
    """What projects up to every head's key, and to its value."""
    up_HUr = kv_up.view(block.num_heads, -1, block.kv_rank)
    keys_Hnr, values_Hvr = up_HUr.split((block.nope_head_dim, block.value_head_dim), dim=1)
    return keys_Hnr, values_Hvr


def expand(block: LatentAttention, cached_TL: Tensor, kv_up: Tensor, expanded_THe: Tensor) -> None:
    """Write keys and values of all heads."""
    keys_Hnr, values_Hvr = _of_heads(block, kv_up)
    compressed_TL, rotary_Tp = cached_TL.split((block.kv_rank, block.rope_head_dim), dim=1)
    shared_HTr = compressed_TL.expand(block.num_heads, -1, -1)
    sizes = (block.value_head_dim, block.nope_head_dim, block.rope_head_dim)
    value_HTv, nope_HTn, rope_HTp = expanded_THe.transpose(0, 1).split(sizes, dim=2)
    torch.bmm(shared_HTr, values_Hvr.transpose(1, 2), out=value_HTv)
    torch.bmm(shared_HTr, keys_Hnr.transpose(1, 2), out=nope_HTn)
    rope_HTp.copy_(rotary_Tp.expand(block.num_heads, -1, -1))


def prefill(
    block: LatentAttention,
    query_THk: Tensor,
    expanded_THe: Tensor,
    lengths: Sequence[int],
    prefixes_CHe: Sequence[Tensor | None],
    scale: float,
    out_THv: Tensor,
    workspace: Workspace,
) -> None:
    """Causal attention within each of the prompts that lie one after the other.

    Where a prompt has a prefix, its tokens are written to the prefix's last rows; if that has more, they
    are the prompt's earlier tokens.
    """
    bounds = pairwise([sum(lengths[:index]) for index in range(len(lengths) + 1)])
    for (first, last), prefix_CHe in zip(bounds, prefixes_CHe, strict=True):
        rows_CHe = expanded_THe[first:last]
        if prefix_CHe is not None:
            rows_CHe = prefix_CHe
            rows_CHe[first - last :].copy_(expanded_THe[first:last])
        _attend_causally(block, query_THk[first:last], rows_CHe, scale, out_THv[first:last], workspace)


def _attend_causally(
    block: LatentAttention, query_THk: Tensor, rows_CHe: Tensor, scale: float, out_THv: Tensor, workspace: Workspace
) -> None:
    """Attention of the last tokens of a text over all of it.

    Fast kernels want values as wide as keys, so they are shown a part of the key behind the value, too,
    and what comes out beside the value is left out.
    """
    tokens, length, wide = len(query_THk), len(rows_CHe), max(block.value_head_dim, block.head_dim)
    q, k, v = (
        part.transpose(0, 1).unsqueeze(0)
        for part in (query_THk, rows_CHe[..., block.value_head_dim :], rows_CHe[..., :wide])
    )
    if tokens < length and query_THk.device.type == "cpu":
        _attend_in_blocks(query_THk, k, v, scale, out_THv, workspace)
        return
    if tokens == length:
        context = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        from torch.nn.attention.bias import causal_lower_right  # it brings torch's compiler, a second of imports

        context = scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(tokens, length), scale=scale)
    out_THv.copy_(context[0].transpose(0, 1)[..., : block.value_head_dim])


def _attend_in_blocks(
    query_THk: Tensor, k: Tensor, v: Tensor, scale: float, out_THv: Tensor, workspace: Workspace
) -> None:
    """The same on the CPU, whose kernel knows no mask but one that it is given.

    With a block's queries in reverse, each row of the mask is the one before moved by an element, so
    that all of them are views of one line.
    """
    tokens, length = len(query_THk), k.shape[2]
    mark = workspace.mark()
    line = workspace.take((length + MASK_BLOCK_TOKENS,), query_THk.dtype).zero_()
    line[length:] = -torch.inf
    for first in range(0, tokens, MASK_BLOCK_TOKENS):
        last = min(first + MASK_BLOCK_TOKENS, tokens)
        unseen = tokens - last  # tokens after the block
        seen = length - unseen
        context = scaled_dot_product_attention(
            query_THk[first:last].flip(0).transpose(0, 1).unsqueeze(0),
            k[:, :, :seen],
            v[:, :, :seen],
            attn_mask=line[unseen:].as_strided((last - first, seen), (1, 1)),
            scale=scale,
        )
        out_THv[first:last].copy_(context[0, ..., : out_THv.shape[2]].transpose(0, 1).flip(0))
    workspace.release(mark)
