"""What comes after the layers.

R requests, D hidden, V vocab.
"""

import torch
from torch import Tensor

from executor.model.layout import HeadWeights
from executor.model.linear import project
from executor.model.norm import Norm, normed
from executor.model.workspace import Workspace


def logits(norm: Norm, hidden_RD: Tensor, head: HeadWeights, workspace: Workspace) -> Tensor:
    """Logits of the next token, float32 and taken from the workspace."""
    shape = (len(hidden_RD), len(head.lm_head))
    logits_RV = workspace.take(shape, torch.float32)
    mark = workspace.mark()
    x_RD = normed(norm, hidden_RD, head.final_norm, workspace)
    if x_RD.dtype is torch.float32:
        project(x_RD, head.lm_head, logits_RV)
    else:
        narrow_RV = workspace.take(shape, x_RD.dtype)
        logits_RV.copy_(project(x_RD, head.lm_head, narrow_RV))
    workspace.release(mark)
    return logits_RV
