"""Attention of many requests at once over a quantised cache, in torch and in bounded memory.

R requests, r of them at once, C rows of a cache, B bytes of a row, L of a request's tokens at once, H heads,
G kv heads, h = H/G query heads that share one, d head_dim.
"""

import torch
from torch import Tensor

from executor.model.kv_rows import dequantised, gathered
from executor.model.numbers import RowViews
from executor.model.softmax import Softmax
from hrm.layers import GroupedQueryAttention


def attend_to_codes(
    block: GroupedQueryAttention,
    query_RHd: Tensor,
    cache_CB: Tensor,
    numbers: RowViews,
    longest: int,
    out_RQ: Tensor,
    softmax: Softmax,
    *,
    spare_bytes: int,
) -> None:
    """Decode attention in float32 over what the codes mean.

    As many requests, and of one as many tokens, are gathered and widened at a time as fit `spare_bytes`;
    softmaxes over parts of a context are merged. At most `longest` tokens are a request's.
    """
    # The row, its place, keys and values in float32, and of each head a logit and what it becomes.
    of_token = cache_CB.shape[1] + 16 + 4 * block.cached_elements + 12 * block.num_heads
    tokens = max(1, min(longest, spare_bytes // of_token))
    requests = max(1, spare_bytes // (longest * of_token))
    for first in range(0, len(query_RHd), requests):
        some = slice(first, first + requests)
        grouped_rGhd = query_RHd[some].unflatten(1, (block.num_kv_heads, -1)).float()
        grouped_rGhd.mul_(block.head_dim**-0.5 if softmax.scale is None else softmax.scale)
        starts_r1, lengths_r1 = numbers.starts[:-1][some].unsqueeze(1), numbers.lengths_R[some].unsqueeze(1)
        greatest, total, context = _begin(grouped_rGhd, softmax)
        for token in range(0, longest, tokens):
            tokens_1L = torch.arange(token, min(token + tokens, longest), device=cache_CB.device).unsqueeze(0)
            rows_rLB = gathered(cache_CB, starts_r1 + torch.minimum(tokens_1L, lengths_r1 - 1))
            kv_rL2Gd = dequantised(rows_rLB, block.cached_parts, torch.float32).unflatten(2, block.cached_shape)
            keys, values = kv_rL2Gd.permute(2, 0, 3, 1, 4).unbind()
            logits_rGhL = torch.matmul(grouped_rGhd, keys.transpose(2, 3))
            logits_rGhL.masked_fill_((tokens_1L >= lengths_r1)[:, None, None, :], -torch.inf)
            most = torch.maximum(greatest, logits_rGhL.amax(3, keepdim=True))
            weights_rGhL, kept = logits_rGhL.sub_(most).exp_(), greatest.sub_(most).exp_()
            total = total.mul_(kept).add_(weights_rGhL.sum(3, keepdim=True))
            context = context.mul_(kept).add_(torch.matmul(weights_rGhL, values))
            greatest = most
        out_RQ[some].copy_(context.div_(total).flatten(1))


def _begin(grouped_rGhd: Tensor, softmax: Softmax) -> tuple[Tensor, Tensor, Tensor]:
    """Greatest logits, sums of weights and of weighted values before the first token: of sinks, if there are any."""
    shape = (*grouped_rGhd.shape[:3], 1)
    if softmax.sinks_H is None:
        greatest, total = grouped_rGhd.new_full(shape, -torch.inf), grouped_rGhd.new_zeros(shape)
    else:
        sinks_1Gh1 = softmax.sinks_H.float().view(1, *shape[1:])
        greatest, total = sinks_1Gh1.expand(shape).clone(), grouped_rGhd.new_ones(shape)
    return greatest, total, torch.zeros_like(grouped_rGhd)
