"""Normalisation of hidden states.

T tokens, D elements that are normalised together.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from executor.model.workspace import Workspace
from executor.native import kernels


class NormKind(StrEnum):
    """What a vector is divided by: its root mean square, for LAYER after subtracting its mean."""

    RMS = "rms"
    LAYER = "layer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """How vectors are normalised; `offset` is added to the weights (1 where they are stored around zero)."""

    kind: NormKind = NormKind.RMS
    eps: float = 1e-5
    offset: float = 0.0


PLAIN: Final = Norm()


def normed(norm: Norm, x_TD: Tensor, weight_D: Tensor, workspace: Workspace, bias_D: Tensor | None = None) -> Tensor:
    """Normalised `x_TD`, in its dtype and taken from the workspace; computed in float32."""
    out_TD = workspace.take(x_TD.shape, x_TD.dtype)
    norm_into(norm, x_TD, weight_D, out_TD, workspace, bias_D)
    return out_TD


def norm_into(
    norm: Norm, x_TD: Tensor, weight_D: Tensor, out_TD: Tensor, workspace: Workspace, bias_D: Tensor | None = None
) -> None:
    """The same in a place of its own, which may be that of `x_TD`."""
    if norm.kind is NormKind.LAYER:
        assert not norm.offset, norm
        out_TD.copy_(functional.layer_norm(x_TD, weight_D.shape, weight_D, bias_D, eps=norm.eps))
        return
    assert bias_D is None, "a norm by the root mean square has no bias"
    native = kernels()
    if native is not None and native.takes_norm(x_TD, weight_D, out_TD):
        native.rms_norm(x_TD, weight_D, norm.eps, out_TD, offset=norm.offset)
        return
    mark = workspace.mark()
    float_TD = x_TD
    if x_TD.dtype is not torch.float32:
        float_TD = workspace.take(x_TD.shape, torch.float32).copy_(x_TD)
    length_T1 = torch.linalg.vector_norm(float_TD, dim=-1, keepdim=True)
    scale_T1 = length_T1.square_().div_(x_TD.shape[-1]).add_(norm.eps).rsqrt_()
    scaled_TD = torch.mul(float_TD, scale_T1, out=out_TD if float_TD is x_TD else float_TD)
    if norm.offset:
        scaled_TD.mul_(weight_D.float() + norm.offset)
    if scaled_TD is not out_TD:
        out_TD.copy_(scaled_TD)
    if not norm.offset:
        out_TD.mul_(weight_D)
    workspace.release(mark)
