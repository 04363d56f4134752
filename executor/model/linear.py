"""Products with weight matrices on the CPU: by the native kernels, or by torch if it is faster.

T tokens, W width of a token, N rows of the matrix.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Final

import torch
from torch import Tensor

from executor import native
from executor.formats import Matrix, Packed
from executor.model.crossings import TOKENS_TRIED, Trial, Work, native_up_to, past_caches, random_numbers
from executor.random_weights import random_packed

_WIDTH: Final = 2048  # of the square matrices that are tried
_PACKED_AS: Final = "int8"  # torch writes every format out before it multiplies


def max_native_tokens(dtype: torch.dtype, *, packed: bool = False) -> int:
    """How many tokens of that dtype at most the native kernels multiply with a matrix."""
    return native_up_to(PACKED_PRODUCTS if packed else PRODUCTS, dtype)


def _trial(matrices: Sequence[Matrix], dtype: torch.dtype) -> Trial:
    """Products of tokens with the next of the matrices."""
    next_of = cycle(matrices)

    def work_of(tokens: int) -> Callable[[], object]:
        x_TW, out_TN = torch.randn(tokens, _WIDTH).to(dtype), torch.empty(tokens, _WIDTH, dtype=dtype)
        return lambda: project(x_TW, next(next_of), out_TN)

    return work_of


def _plain_trial(dtype: torch.dtype) -> Trial:
    weights_MNW = random_numbers((past_caches(_WIDTH * _WIDTH, dtype), _WIDTH, _WIDTH), dtype)
    return _trial(weights_MNW.unbind(), dtype)


def _packed_trial(dtype: torch.dtype) -> Trial:
    return _trial([random_packed(_WIDTH, _WIDTH, _PACKED_AS)] * 4, dtype)


PRODUCTS: Final = Work("products", TOKENS_TRIED, _plain_trial)
PACKED_PRODUCTS: Final = Work("products with packed weights", (1, 16, 64, 256), _packed_trial)


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
    if x_TW.shape[0] > max_native_tokens(x_TW.dtype, packed=isinstance(weight_NW, Packed)):
        return False
    kernels.linear(x_TW, weight_NW, out_TN, add=add)
    return True
