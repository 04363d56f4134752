"""Products with weight matrices on the CPU: by the native kernels, or by torch if it is faster.

T tokens, W width of a token, N rows of the matrix.
"""

from collections.abc import Iterator
from functools import cache
from typing import Final

import torch
from torch import Tensor

from executor import native
from executor.formats import Matrix, Packed

ALWAYS: Final = 1 << 30


@cache
def max_native_tokens(dtype: torch.dtype, *, packed: bool = False) -> int:
    """How many tokens of that dtype at most the native kernels multiply with a matrix.

    Where they and torch cross depends on what torch finds: `tests/bench/test_native.py` shows it.
    Weights of a packed matrix torch would have to write out first.
    """
    if packed:
        return 256 if native.has_amx() and dtype is torch.bfloat16 else ALWAYS  # the former is a guess
    vector_paths = native.paths()[:-1]
    if not vector_paths:
        return 8  # a guess: our portable path against a library written for that processor
    if dtype is torch.bfloat16:
        if native.has_amx():
            return 16  # a guess: torch multiplies in AMX's tiles, we do not
        if "avx512-bf16" in vector_paths:
            return 1024  # both use its dot products; within 10 % on an AMD EPYC (Zen 4)
        return ALWAYS  # torch widens as we do; measured on an Intel Xeon
    if native.is_intel():  # MKL's fast kernels are for Intel's; measured on a Xeon without AMX
        return {torch.float16: 32, torch.float32: 48}[dtype]
    return ALWAYS  # measured on an AMD EPYC up to 512


def project(x_TW: Tensor, weight_NW: Matrix, out_TN: Tensor) -> Tensor:
    """`out_TN`, made `x @ weight.T`."""
    if not _in_native(x_TW, weight_NW, out_TN, add=False):
        multiply(x_TW, weight_NW, out_TN)
    return out_TN


def add_projected(x_TW: Tensor, weight_NW: Matrix, out_TN: Tensor) -> None:
    """Add `x @ weight.T` to `out_TN`."""
    if not _in_native(x_TW, weight_NW, out_TN, add=True):
        for rows, some_nW in _in_strips(weight_NW, x_TW.dtype):
            out_TN[:, rows].addmm_(x_TW, some_nW.T)


def multiply(x_TW: Tensor, weight_NW: Matrix, out_TN: Tensor) -> None:
    """The same as `project`, by torch."""
    for rows, some_nW in _in_strips(weight_NW, x_TW.dtype):
        torch.mm(x_TW, some_nW.T, out=out_TN[:, rows])


def _in_strips(matrix_NW: Matrix, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a matrix as torch can multiply them: a plain one as it is, a packed one strip by strip."""
    if isinstance(matrix_NW, Tensor):
        yield slice(None), matrix_NW
        return
    for rows in matrix_NW.strips():
        some = matrix_NW[rows]
        room = torch.empty(some.shape, dtype=dtype, device=some.codes.device)
        yield rows, some.dequantised(room)


def _in_native(x_TW: Tensor, weight_NW: Matrix, out_TN: Tensor, *, add: bool) -> bool:
    kernels = native.kernels()
    if kernels is None or not kernels.takes_linear(x_TW, weight_NW, out_TN):
        return False
    if len(x_TW) > max_native_tokens(x_TW.dtype, packed=isinstance(weight_NW, Packed)):
        return False
    kernels.linear(x_TW, weight_NW, out_TN, add=add)
    return True
