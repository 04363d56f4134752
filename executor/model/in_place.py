"""What is written over and added up in place: by native kernels, for a tape to do it again, or else by torch."""

from torch import Tensor

from executor.native import kernels
from executor.native.compiled import DTYPES


def clear(out: Tensor) -> Tensor:
    """`out`, made zeros."""
    native = kernels()
    if native is None or not native.takes_whole(out):
        return out.zero_()
    native.clear(out)
    return out


def put(out: Tensor, x: Tensor) -> None:
    """Copy `x` to `out`."""
    native = kernels()
    if native is None or not native.takes_whole(out, x):
        out.copy_(x)
    else:
        native.put(out, x)


def add(out: Tensor, x: Tensor) -> None:
    """Add `x` to `out`."""
    native = kernels()
    if native is None or out.dtype not in DTYPES or not native.takes_whole(out, x):
        out.add_(x)
    else:
        native.add(out, x)
