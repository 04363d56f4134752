"""Normalisation of hidden states, without bias.

T tokens, D hidden.
"""

import torch
from torch import Tensor
from torch.nn import functional

from executor.model.architecture import Architecture, Norm
from executor.model.workspace import Workspace
from executor.native import kernels


def normed(arch: Architecture, x_TD: Tensor, weight_D: Tensor, workspace: Workspace) -> Tensor:
    """Normalised `x_TD`, in its dtype and taken from the workspace; computed in float32."""
    out_TD = workspace.take(x_TD.shape, x_TD.dtype)
    if arch.norm is Norm.LAYER:
        return out_TD.copy_(functional.layer_norm(x_TD, weight_D.shape, weight_D, eps=arch.norm_eps))
    native = kernels()
    if native is not None and native.takes_norm(x_TD, weight_D, out_TD):
        native.rms_norm(x_TD, weight_D, arch.norm_eps, out_TD)
        return out_TD
    mark = workspace.mark()
    float_TD = x_TD
    if x_TD.dtype is not torch.float32:
        float_TD = workspace.take(x_TD.shape, torch.float32).copy_(x_TD)
    length_T1 = torch.linalg.vector_norm(float_TD, dim=-1, keepdim=True)
    scale_T1 = length_T1.square_().div_(x_TD.shape[1]).add_(arch.norm_eps).rsqrt_()
    if float_TD is x_TD:
        torch.mul(x_TD, scale_T1, out=out_TD)
    else:
        out_TD.copy_(float_TD.mul_(scale_T1))
    workspace.release(mark)
    return out_TD.mul_(weight_D)
