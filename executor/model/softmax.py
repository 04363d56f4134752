"""What decides attention beside queries, keys and values: sinks, and how far back it reaches.

T queries, which are the last of L tokens, H heads, G kv heads, h = H/G query heads that share one,
d head_dim.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from executor.model.numbers import Reach
from executor.native.mixers import Logits
from hrm.contract.temporaries import MASK_BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Softmax:
    """A head's weights: of the tokens within `reach`, with `sinks_H` as one more logit without a value.

    Logits are products times `scale`, 1/sqrt(d) if it is None.
    """

    scale: float | None = None
    sinks_H: Tensor | None = None  # noqa: N815
    reach: Reach = Reach()  # noqa: RUF009 - frozen

    @property
    def logits(self) -> Logits:
        """The same but for the reach, as native kernels are told."""
        return Logits(self.scale, sinks_H=None if self.sinks_H is None else self.sinks_H.float())

    def is_plain(self, tokens: int) -> bool:
        """Whether that many tokens are attended to as if there were neither sinks nor a reach."""
        return self.sinks_H is None and self.reaches_all(tokens)

    def reaches_all(self, tokens: int) -> bool:
        """Whether the last of so many tokens attends to the first."""
        return not self.reach.rows or tokens <= self.reach.rows

    def first_seen(self, position: int) -> int:
        """The first token that the one at a position attends to."""
        return position + 1 - self.reach.length(position + 1)

    def damped(self, context_GhTd: Tensor, lse_GhT: Tensor) -> Tensor:
        """Attention without sinks as it is with them: they only add to what weights are divided by."""
        if self.sinks_H is None:
            return context_GhTd
        sinks_Gh1 = self.sinks_H.float().view(*context_GhTd.shape[:2], 1)
        return context_GhTd.mul_(torch.sigmoid(lse_GhT - sinks_Gh1).unsqueeze(-1).to(context_GhTd.dtype))


PLAIN: Final = Softmax()


def attend(q_THd: Tensor, k_LGd: Tensor, v_LGd: Tensor, out_THd: Tensor, softmax: Softmax) -> None:
    """Causal attention of the last T of L tokens, in blocks of queries that each see a stretch of keys."""
    tokens, length = len(q_THd), len(k_LGd)
    for first in range(0, tokens, MASK_BLOCK_TOKENS):
        block = slice(first, min(first + MASK_BLOCK_TOKENS, tokens))
        earlier = length - tokens
        keys = slice(softmax.first_seen(earlier + first), earlier + block.stop)
        unseen = _unseen(softmax.reach, earlier + first, earlier + block.stop, keys.start, q_THd.device)
        out_THd[block].copy_(attended(q_THd[block], k_LGd[keys], v_LGd[keys], unseen, softmax))


def attended(q_THd: Tensor, k_LGd: Tensor, v_LGd: Tensor, unseen_TL: Tensor | None, softmax: Softmax) -> Tensor:
    """Attention of each query to all keys but those `unseen`, (T, H, d)."""
    heads, head_dim = q_THd.shape[1:]
    groups = k_LGd.shape[1]
    q_GhTd = q_THd.unflatten(1, (groups, -1)).permute(1, 2, 0, 3)
    k, v = (x.permute(1, 0, 2).unsqueeze(1).expand(-1, heads // groups, -1, -1) for x in (k_LGd, v_LGd))
    if softmax.sinks_H is None:
        seen = None if unseen_TL is None else unseen_TL.logical_not()
        context = scaled_dot_product_attention(q_GhTd, k, v, attn_mask=seen, scale=softmax.scale)
    elif q_THd.is_cpu:
        bias = None
        if unseen_TL is not None:
            bias = torch.zeros(unseen_TL.shape, dtype=q_THd.dtype).masked_fill_(unseen_TL, -torch.inf)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 - which tells the sums too
        context = softmax.damped(*flash(q_GhTd, k, v, 0.0, False, attn_mask=bias, scale=softmax.scale))
    else:
        scale = head_dim**-0.5 if softmax.scale is None else softmax.scale
        logits = torch.matmul(q_GhTd.float(), k.float().transpose(-1, -2)).mul_(scale)
        if unseen_TL is not None:
            logits.masked_fill_(unseen_TL, -torch.inf)
        context = softmax.damped(torch.matmul(logits.softmax(-1), v.float()), logits.logsumexp(-1)).to(q_THd.dtype)
    return context.permute(2, 0, 1, 3).flatten(1, 2)


def _unseen(reach: Reach, start: int, end: int, first_key: int, device: torch.device) -> Tensor:
    """Which of the keys from `first_key` to `end` each of the queries from `start` to `end` does not see."""
    queries_T1 = torch.arange(start, end, device=device).unsqueeze(1)
    keys_1L = torch.arange(first_key, end, device=device).unsqueeze(0)
    unseen_TL = keys_1L > queries_T1
    if reach.chunked:
        unseen_TL |= keys_1L < queries_T1 - queries_T1 % reach.rows
    elif reach.rows:
        unseen_TL |= keys_1L <= queries_T1 - reach.rows
    return unseen_TL
