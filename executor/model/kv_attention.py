"""Attention of many requests at once over a quantised cache, in torch and in bounded memory.

R requests, r of them at once, C rows of a cache, B bytes of a row, L of a request's tokens at once, H heads,
G kv heads, h = H/G query heads that share one, d head_dim.
"""

import torch
from torch import Tensor

from executor.model.kv_rows import dequantised, gathered
from executor.model.numbers import RowNumbers
from executor.model.softmax import Softmax
from hrm.layers import GroupedQueryAttention

_Sums = tuple[Tensor, Tensor, Tensor]  # each head's greatest logit, sum of weights, and weighted values


def attend_to_codes(
    block: GroupedQueryAttention,
    query_RHd: Tensor,
    cache_CB: Tensor,
    rows: RowNumbers,
    out_RQ: Tensor,
    softmax: Softmax,
    *,
    spare_bytes: int,
) -> None:
    """Decode attention in float32 over what the codes mean.

    As many requests, and of one as many tokens, are gathered and widened at a time as fit `spare_bytes`;
    softmaxes over parts of a context are merged.
    """
    longest = rows.longest
    # The row, its place, keys and values in float32, one of them a second time, and a logit of each head.
    of_token = cache_CB.shape[1] + 32 + 6 * block.cached_elements + 5 * block.num_heads
    of_request = 4 * (4 * block.query_size + 8 * block.num_heads)  # queries, sums, and what is added to them
    tokens = max(1, min(longest, (spare_bytes - of_request) // of_token))
    requests = max(1, spare_bytes // (longest * of_token + of_request))
    scale = block.head_dim**-0.5 if softmax.scale is None else softmax.scale
    for first in range(0, len(query_RHd), requests):
        some = slice(first, first + requests)
        grouped_rGhd = query_RHd[some].unflatten(1, (block.num_kv_heads, -1)).float() * scale
        sums = _begin(grouped_rGhd, softmax)
        for token in range(0, longest, tokens):
            rows_rL, seen_r11L = rows.sent.places(some, range(token, min(token + tokens, longest)))
            sums = _add_part(block, grouped_rGhd, gathered(cache_CB, rows_rL), seen_r11L.logical_not_(), sums)
        _, total, context = sums
        out_RQ[some].copy_(context.div_(total).flatten(1))


def _add_part(
    block: GroupedQueryAttention, grouped_rGhd: Tensor, rows_rLB: Tensor, unseen_r11L: Tensor, sums: _Sums
) -> _Sums:
    """Sums over some more tokens."""
    kv_rL2Gd = dequantised(rows_rLB, block.cached_parts, torch.float32).unflatten(2, block.cached_shape)
    keys, values = kv_rL2Gd.permute(2, 0, 3, 1, 4).unbind()
    logits_rGhL = torch.matmul(grouped_rGhd, keys.transpose(2, 3)).masked_fill_(unseen_r11L, -torch.inf)
    greatest, total, context = sums
    most = torch.maximum(greatest, logits_rGhL.amax(3, keepdim=True))
    weights_rGhL, kept = logits_rGhL.sub_(most).exp_(), greatest.sub_(most).exp_()
    total.mul_(kept).add_(weights_rGhL.sum(3, keepdim=True))
    context.mul_(kept).add_(torch.matmul(weights_rGhL, values))
    return most, total, context


def _begin(grouped_rGhd: Tensor, softmax: Softmax) -> _Sums:
    """Greatest logits, sums of weights and of weighted values before the first token: of sinks, if there are any."""
    shape = (*grouped_rGhd.shape[:3], 1)
    if softmax.sinks_H is None:
        greatest, total = grouped_rGhd.new_full(shape, -torch.inf), grouped_rGhd.new_zeros(shape)
    else:
        sinks_1Gh1 = softmax.sinks_H.float().view(1, *shape[1:])
        greatest, total = sinks_1Gh1.expand(shape).clone(), grouped_rGhd.new_ones(shape)
    return greatest, total, torch.zeros_like(grouped_rGhd)
