"""What comes before the layers, and what comes after them.

T tokens, R requests, D hidden, V vocab.
"""

import torch
from torch import Tensor

from executor.model.layout import HeadWeights
from executor.model.linear import project
from executor.model.norm import Norm, normed
from executor.model.workspace import Workspace


def embed(
    embedding_VD: Tensor, tokens_T: Tensor, out_TD: Tensor, *, scale: float = 1.0, first_token: int | None = None
) -> None:
    """Write the embeddings of tokens, multiplied by `scale`.

    Where there are those of a part of the vocabulary from `first_token` on, other tokens have zeros.
    """
    if first_token is None:
        torch.index_select(embedding_VD, 0, tokens_T, out=out_TD)
    else:
        rows_T = tokens_T - first_token
        torch.index_select(embedding_VD, 0, rows_T.clamp(0, embedding_VD.shape[0] - 1), out=out_TD)
        out_TD[(rows_T < 0) | (rows_T >= embedding_VD.shape[0])] = 0
    if scale != 1:
        out_TD.mul_(scale)


def logits(
    norm: Norm,
    hidden_RD: Tensor,
    head: HeadWeights,
    workspace: Workspace,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    may_be_narrow: bool = False,
) -> Tensor:
    """Logits of the next token multiplied by `scale`, float32 and taken from the workspace.

    With a `softcap` c they become c * tanh(logit / c). If nothing is done to them and they `may_be_narrow`, they are
    left as they are projected, in the dtype of hidden states, whose numbers are the same.
    """
    shape = (hidden_RD.shape[0], head.lm_head.shape[0])
    if may_be_narrow and head.lm_head_bias is None and scale == 1 and softcap is None:
        narrow_RV = workspace.take(shape, hidden_RD.dtype)
        mark = workspace.mark()
        x_RD = normed(norm, hidden_RD, head.final_norm, workspace, head.final_norm_bias)
        project(x_RD, head.lm_head, narrow_RV)
        workspace.release(mark)
        return narrow_RV
    logits_RV = workspace.take(shape, torch.float32)
    mark = workspace.mark()
    x_RD = normed(norm, hidden_RD, head.final_norm, workspace, head.final_norm_bias)
    if x_RD.dtype is torch.float32:
        project(x_RD, head.lm_head, logits_RV)
    else:
        narrow_RV = workspace.take(shape, x_RD.dtype)
        logits_RV.copy_(project(x_RD, head.lm_head, narrow_RV))
    if head.lm_head_bias is not None:
        logits_RV.add_(head.lm_head_bias)
    if scale != 1:
        logits_RV.mul_(scale)
    if softcap is not None:
        logits_RV.div_(softcap).tanh_().mul_(softcap)
    workspace.release(mark)
    return logits_RV
