"""Grouped-query attention over the KV cache.

T tokens, D hidden, H heads, G kv heads, d head_dim, Q = H*d, KV = G*d, X = Q+2KV, R requests,
C tokens of a cache. Queries, keys and values of a token lie in one row of X elements; one token of
a cache holds its keys and then its values, (2, G, d).
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from executor.model.crossings import Trial, Work, native_up_to, random_numbers
from executor.model.kv_rows import dequantised, is_quantised
from executor.model.softmax import PLAIN, Softmax, attend, attended
from executor.model.workspace import Workspace
from executor.native import kernels
from hrm.contract.temporaries import MASK_BLOCK_TOKENS
from hrm.layers import GroupedQueryAttention

CONTEXTS_TRIED: Final = (128, 256, 512, 1024)


def max_native_context(dtype: torch.dtype) -> int:
    """How long the cache may be that the native kernel attends over in prefill, one token after the other."""
    return native_up_to(PREFILL_ATTENTION, dtype)


def _trial(dtype: torch.dtype) -> Trial:
    block = GroupedQueryAttention(hidden_size=1024, num_heads=8, num_kv_heads=2, head_dim=128)
    width = block.query_size + 2 * block.kv_size

    def work_of(tokens: int) -> Callable[[], object]:
        qkv_TX, out_TQ = random_numbers((tokens, width), dtype), torch.empty(tokens, block.query_size, dtype=dtype)
        cache_C2Gd = torch.empty(tokens, *block.cached_shape, dtype=dtype)
        nothing = Workspace(torch.empty(0, dtype=torch.uint8))
        return lambda: prefill_attention(block, qkv_TX, [tokens], [cache_C2Gd], out_TQ, nothing)

    return work_of


PREFILL_ATTENTION: Final = Work("attention in prefill", CONTEXTS_TRIED, _trial)


class _Prompts(NamedTuple):
    """Prompts one after the other, and their outputs."""

    qkv_TX: Tensor  # noqa: N815
    lengths: Sequence[int]
    caches_C2Gd: Sequence[Tensor | None]  # noqa: N815
    out_TQ: Tensor  # noqa: N815


def prefill_attention(
    block: GroupedQueryAttention,
    qkv_TX: Tensor,
    lengths: Sequence[int],
    caches_C2Gd: Sequence[Tensor | None],
    out_TQ: Tensor,
    workspace: Workspace,
    softmax: Softmax = PLAIN,
) -> None:
    """Causal attention within each of the prompts that lie one after the other in `qkv_TX`.

    Where a prompt has a cache, its tokens' keys and values are written to the cache's last rows.
    If it has more rows, these are the prompt's earlier tokens, which are attended over as well.
    On the CPU the native kernel attends over caches up to `max_native_context`, as to one more request
    with each token, of all prompts at once whose caches lie in the same memory; torch does all else, and
    allocates one prompt's output besides.
    """
    start, number = 0, 0
    while number < len(lengths):
        count, memory = _side_by_side(lengths[number:], caches_C2Gd[number:])
        some = slice(number, number + count)
        rows = slice(start, start + sum(lengths[some]))
        prompts = _Prompts(qkv_TX[rows], lengths[some], caches_C2Gd[some], out_TQ[rows])
        if memory is None or not _attended_natively(prompts, memory, softmax):
            _attend_one_by_one(block, prompts, workspace, softmax)
        start, number = rows.stop, some.stop
    assert start == qkv_TX.shape[0], (start, qkv_TX.shape)


def _attend_one_by_one(block: GroupedQueryAttention, prompts: _Prompts, workspace: Workspace, softmax: Softmax) -> None:
    """The same as torch does it, prompt by prompt."""
    qkv_TX, lengths, caches_C2Gd, out_TQ = prompts
    heads, kv_heads = block.num_heads, block.num_kv_heads
    sizes = (heads, kv_heads, kv_heads)
    out_THd = out_TQ.view(-1, heads, block.head_dim)
    qkv_TXd = qkv_TX.view(qkv_TX.shape[0], -1, block.head_dim)
    start = 0
    for length, cache_C2Gd in zip(lengths, caches_C2Gd, strict=True):
        prompt = slice(start, start + length)
        q_THd, k_TGd, v_TGd = qkv_TXd[prompt].split(sizes, dim=1)
        start += length
        if cache_C2Gd is not None:
            cache_C2Gd[-length:].view(length, -1, block.head_dim).copy_(qkv_TXd[prompt, heads:])
        k_LGd, v_LGd = (k_TGd, v_TGd) if cache_C2Gd is None else cache_C2Gd.unbind(1)
        if not softmax.is_plain(k_LGd.shape[0]):
            attend(q_THd, k_LGd, v_LGd, out_THd[prompt], softmax)
            continue
        if cache_C2Gd is not None and cache_C2Gd.shape[0] > length:
            if q_THd.device.type == "cpu":
                _after_prefix_in_blocks(q_THd, cache_C2Gd, out_THd[prompt], workspace, softmax.scale)
            else:
                _after_prefix(q_THd, cache_C2Gd, out_THd[prompt], softmax.scale)
            continue
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_THd, k_TGd, v_TGd))
        context = scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=heads != kv_heads, scale=softmax.scale
        )
        out_THd[prompt].copy_(context[0].transpose(0, 1))


def _side_by_side(lengths: Sequence[int], caches_C2Gd: Sequence[Tensor | None]) -> tuple[int, Tensor | None]:
    """How many prompts from the first on have caches in the same memory, and what lies there from first row to last.

    One with earlier tokens is alone, as where these lie another prompt's may come to lie. None where the native kernel
    is not to attend to the first.
    """
    first = caches_C2Gd[0]
    if first is None or not first.is_cpu or kernels() is None:
        return 1, None
    longest, token_bytes, storage = max_native_context(first.dtype), first[:1].nbytes, first.untyped_storage()
    if first.shape[0] > longest:
        return 1, None
    count, low, high = 0, first.data_ptr(), first.data_ptr()
    for length, cache in zip(lengths, caches_C2Gd, strict=True):
        if cache is None or cache.untyped_storage().data_ptr() != storage.data_ptr():
            break
        address, is_alone = cache.data_ptr(), not length == cache.shape[0] <= longest
        if count and (is_alone or (address - low) % token_bytes):
            break
        low, high, count = min(low, address), max(high, address + cache.nbytes), count + 1
        if is_alone:
            break
    shape = ((high - low) // token_bytes, *first.shape[1:])
    offset = first.storage_offset() - (first.data_ptr() - low) // first.itemsize
    return count, first.as_strided(shape, first.stride(), offset)


def _attended_natively(prompts: _Prompts, memory_C2Gd: Tensor, softmax: Softmax) -> bool:
    """Causal attention of the last tokens of caches in that memory, if the native kernel takes it; else False."""
    qkv_TX, lengths, caches_C2Gd, out_TQ = prompts
    native = kernels()
    if native is None or not native.takes_attention(qkv_TX, memory_C2Gd, out_TQ):
        return False
    token_bytes = memory_C2Gd[:1].nbytes
    starts, ends = list[int](), list[int]()
    places: list[tuple[int, int]] = []  # of new tokens: the first row and how many
    for length, cache in zip(lengths, caches_C2Gd, strict=True):
        assert cache is not None
        place, context = (cache.data_ptr() - memory_C2Gd.data_ptr()) // token_bytes, cache.shape[0]
        earlier = context - length
        if softmax.reaches_all(context):
            starts += [place] * length
        else:
            starts += [place + softmax.first_seen(position) for position in range(earlier, context)]
        ends += range(place + earlier + 1, place + context + 1)
        if places and sum(places[-1]) == place + earlier:
            places[-1] = places[-1][0], places[-1][1] + length
        else:
            places.append((place + earlier, length))
    kv_T2Gd, row = qkv_TX[:, out_TQ.shape[1] :].unflatten(1, memory_C2Gd.shape[1:]), 0
    for place, length in places:
        memory_C2Gd[place : place + length].copy_(kv_T2Gd[row : row + length])
        row += length
    seen = [end - start for end, start in zip(ends, starts, strict=True)]
    native.decode_attention(qkv_TX, memory_C2Gd, starts, seen, out_TQ, softmax.logits)
    return True


def _after_prefix(q_THd: Tensor, cache_C2Gd: Tensor, out_THd: Tensor, scale: float | None) -> None:
    """Causal attention of a cache's last tokens; where kernels know it, no mask is ever made.

    Query heads that share a KV head are a batch of their own, for which it is broadcast: told that
    heads are grouped, torch on older GPUs makes the mask and all scores.
    """
    from torch.nn.attention.bias import causal_lower_right  # it brings torch's compiler, a second of imports

    tokens, heads, head_dim = q_THd.shape
    length, _, kv_heads, _ = cache_C2Gd.shape
    split = (tokens, kv_heads, heads // kv_heads, head_dim)
    grouped = (2, kv_heads, heads // kv_heads, length, head_dim)
    k, v = cache_C2Gd.permute(1, 2, 0, 3).unsqueeze(2).expand(grouped).unbind()
    context = scaled_dot_product_attention(
        q_THd.view(split).permute(1, 2, 0, 3), k, v, attn_mask=causal_lower_right(tokens, length), scale=scale
    )
    out_THd.view(split).copy_(context.permute(2, 0, 1, 3))


def _after_prefix_in_blocks(
    q_THd: Tensor, cache_C2Gd: Tensor, out_THd: Tensor, workspace: Workspace, scale: float | None
) -> None:
    """The same on the CPU, where a causal mask has to start with the cache's first token.

    With a block's queries in reverse, each row of the mask is the one before moved by an element,
    so that all of them are views of one line. Heads that share a KV head read it in place.
    """
    tokens, heads, head_dim = q_THd.shape
    length, _, kv_heads, _ = cache_C2Gd.shape
    grouped = (2, kv_heads, heads // kv_heads, length, head_dim)
    k, v = cache_C2Gd.permute(1, 2, 0, 3).unsqueeze(2).expand(grouped).unbind()
    mark = workspace.mark()
    line = workspace.take((length + MASK_BLOCK_TOKENS,), q_THd.dtype).zero_()
    line[length:] = -torch.inf
    for first in range(0, tokens, MASK_BLOCK_TOKENS):
        last = min(first + MASK_BLOCK_TOKENS, tokens)
        unseen = tokens - last  # tokens after the block
        seen = length - unseen
        reverse = torch.arange(last - first - 1, -1, -1)
        block_THd = out_THd[first:last]  # holds the queries until it is overwritten
        torch.index_select(q_THd[first:last], 0, reverse, out=block_THd)
        context_GhTd = scaled_dot_product_attention(
            block_THd.transpose(0, 1).unflatten(0, (kv_heads, -1)),
            k[:, :, :seen],
            v[:, :, :seen],
            attn_mask=line[unseen:].as_strided((last - first, seen), (1, 1)),
            scale=scale,
        )
        context_THd = context_GhTd.flatten(0, 1).transpose(0, 1)
        torch.index_select(context_THd, 0, reverse, out=block_THd)
    workspace.release(mark)


def decode_attention(
    block: GroupedQueryAttention,
    qkv_RX: Tensor,
    cache_C2Gd: Tensor,
    starts: Sequence[int],
    lengths: Sequence[int],
    out_RQ: Tensor,
    softmax: Softmax = PLAIN,
) -> None:
    """Attention of one new token per request over its own part of the cache, in place.

    Request r's tokens are the cache's rows from `starts[r]`, `lengths[r]` of them, the new token
    included. The query heads that share a KV head are the rows of one small attention, so the cache
    is read once; requests are computed one by one, so no result depends on a neighbour. On the CPU
    the native kernel does it if there is one, else torch. Of a quantised cache, (C, B), torch makes one
    request's numbers at a time.
    """
    native, heads = kernels(), (block.num_kv_heads, block.head_dim)
    if native is not None and native.takes_attention(qkv_RX, cache_C2Gd, out_RQ, heads=heads):
        native.decode_attention(qkv_RX, cache_C2Gd, starts, lengths, out_RQ, softmax.logits, heads=heads)
        return
    if is_quantised(cache_C2Gd):
        for r, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            numbers = dequantised(cache_C2Gd.narrow(0, start, length), block.cached_parts, qkv_RX.dtype)
            of_one = qkv_RX[r : r + 1], numbers.view(-1, *block.cached_shape), [0], [length], out_RQ[r : r + 1]
            decode_attention(block, *of_one, softmax)
        return
    if softmax.sinks_H is not None:
        queries_R1Hd = qkv_RX[:, : block.query_size].view(-1, 1, block.num_heads, block.head_dim)
        for query, out, start, length in zip(queries_R1Hd, out_RQ, starts, lengths, strict=True):
            k_LGd, v_LGd = cache_C2Gd[start : start + length].unbind(1)
            out.copy_(attended(query, k_LGd, v_LGd, None, softmax).flatten())
        return
    kv_heads, head_dim = cache_C2Gd.shape[2:]
    grouped = (qkv_RX.shape[0], 1, kv_heads, block.num_heads // kv_heads, head_dim)
    queries = qkv_RX[:, : block.query_size].view(grouped).unbind()
    outputs = out_RQ.view(grouped).unbind()
    keys_1GCd, values_1GCd = cache_C2Gd.permute(1, 2, 0, 3).unsqueeze(1).unbind()
    for query, out, start, length in zip(queries, outputs, starts, lengths, strict=True):
        k, v = keys_1GCd.narrow(2, start, length), values_1GCd.narrow(2, start, length)
        out.copy_(scaled_dot_product_attention(query, k, v, scale=softmax.scale))
