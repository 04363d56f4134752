"""Rows of a quantised KV cache as torch makes and reads them: the oracle of the native kernels.

Their dtype says what the codes in them are, and which are a byte each, as no plain number is; how a row is laid out
is `hrm.formats.KvFormat`'s. A part is what one head has of keys or values.

T tokens, W numbers of a token, B bytes of its row, P parts of a size.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final, NamedTuple

import torch
from torch import Tensor

from hrm.formats import KV_SCALES, KvFormat, scales_at

SCALE: Final[torch.dtype] = getattr(torch, KV_SCALES)
PIECES: Final = 4  # in which tokens are quantised, so that float32 copies fit beside what prefill keeps


class _Group(NamedTuple):
    """Parts of one size that lie side by side: their numbers, and their scales."""

    size: int
    columns: slice
    scales: slice


def is_quantised(cache: Tensor) -> bool:
    """Whether these are rows of codes and scales."""
    return cache.dtype.itemsize == 1


def row_dtype(format_: KvFormat, dtype: torch.dtype) -> torch.dtype:
    """The dtype that rows of a cache have: that of codes, or the one that is computed in."""
    return getattr(torch, format_.codes) if format_.is_scaled else dtype


def quantise(kv_TW: Tensor, parts: Sequence[int], rows_TB: Tensor) -> None:
    """Write the rows of numbers: every part by the scale with which its greatest magnitude just fits.

    A number is rounded to the nearest code. What is not finite makes its whole part so.
    """
    step = max(1, -(-len(kv_TW) // PIECES))
    for first in range(0, len(kv_TW), step):
        some = slice(first, first + step)
        _quantise(kv_TW[some], parts, rows_TB[some])


def _quantise(kv_TW: Tensor, parts: Sequence[int], rows_TB: Tensor) -> None:
    whole, scales = not rows_TB.dtype.is_floating_point, _scales(rows_TB, parts)
    greatest = (torch.iinfo if whole else torch.finfo)(rows_TB.dtype).max
    for group in _groups(parts):
        part_TPw = kv_TW[:, group.columns].unflatten(1, (-1, group.size))
        low_TP, high_TP = torch.aminmax(part_TPw, dim=2)
        scale_TP = torch.maximum(high_TP, low_TP.neg_()).float().div_(greatest).to(SCALE)
        scale_TP.clamp_(min=torch.finfo(SCALE).tiny)  # zeros are divided by something
        scales[:, group.scales].copy_(scale_TP)
        codes_TPw = part_TPw / scale_TP.float().unsqueeze(2)
        if whole:
            codes_TPw.round_()
        rows_TB[:, group.columns].unflatten(1, (-1, group.size)).copy_(codes_TPw.clamp_(-greatest, greatest))


def dequantise(rows_TB: Tensor, parts: Sequence[int], out_TW: Tensor) -> Tensor:
    """Fill `out_TW` with the numbers that rows mean, rounded once; there may be axes before both."""
    scales = _scales(rows_TB, parts)
    for group in _groups(parts):
        numbers = out_TW[..., group.columns].unflatten(-1, (-1, group.size))
        numbers.copy_(rows_TB[..., group.columns].unflatten(-1, (-1, group.size)))
        numbers.mul_(scales[..., group.scales].unsqueeze(-1))
    return out_TW


def dequantised(rows_TB: Tensor, parts: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The numbers that rows mean, as a tensor of their own."""
    return dequantise(rows_TB, parts, rows_TB.new_empty((*rows_TB.shape[:-1], sum(parts)), dtype=dtype))


def gathered(rows_CB: Tensor, indices: Tensor) -> Tensor:
    """Some of the rows, in the shape of the indices."""
    return rows_CB.view(torch.uint8)[indices].view(rows_CB.dtype)  # codes themselves are no numbers to torch


def _groups(parts: Sequence[int]) -> Iterator[_Group]:
    start = index = 0
    for size, alike in groupby(parts):
        count = sum(1 for _ in alike)
        yield _Group(size, slice(start, start + count * size), slice(index, index + count))
        start, index = start + count * size, index + count


def _scales(rows_TB: Tensor, parts: Sequence[int]) -> Tensor:
    first = scales_at(parts) // SCALE.itemsize
    return rows_TB.view(SCALE)[..., first : first + len(parts)]
