"""Random weights, for runs whose tokens do not matter."""

from collections.abc import Collection
from functools import cache
from math import log2
from typing import Final, final
from zlib import crc32

import torch
from torch import Tensor

from executor.formats import Cut, Packed, packed_in
from executor.formats.codes import CODES
from hrm.formats import packed_format

_ONE_E4M3: Final = 0x38


def random_packed(rows: int, width: int, name: str) -> Packed:
    """A matrix of random numbers in the packed format of that name."""
    form = packed_format(name)
    assert form is not None, name
    made = packed_in(form, rows, width, torch.empty(form.bytes_of(rows, width), dtype=torch.uint8))
    _one_pool().read_packed_into(name, made)
    return made


@final
class RandomWeights:
    """Random numbers in place of a checkpoint, equal for equal seeds; norms are ones, and biases noughts.

    With biases all tokens would be alike, and go to the same few experts.

    A matrix has a standard deviation that about keeps the size of what it is applied to. All of
    them are cut from one pool of normal numbers, which fits a cache, so large models fill at the
    speed at which memory is written.
    """

    names: Collection[str] = ()

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._pool = torch.randn(1_048_573, generator=torch.Generator().manual_seed(seed))
        self._scaled: dict[tuple[int, torch.dtype], Tensor] = {}
        self._codes: dict[str, Tensor] = {}

    def read_packed_into(self, name: str, out: Packed, first_row: int = 0, cut: Cut | None = None) -> None:
        """Fill `out` with codes that are as likely as each other, or of normal numbers; no scale is extreme."""
        form, cut = out.format, cut or Cut(out.shape)
        width, of_row = cut.width, cut.width * form.code_bits // 8
        start = crc32(f"{self._seed} {name} {first_row}".encode()) % (len(self._pool) // 2)
        code = CODES[form.code]
        if form.code not in self._codes:
            self._codes[form.code] = code.random(self._pool)
        here = Cut((cut.shape[0], of_row), cut.row, cut.column * form.code_bits // 8)
        _fill(out.codes, self._codes[form.code], start, here)
        scale = width**-0.5 / code.deviation
        if form.scale == "e8m0":
            out.scales.fill_(127 + round(log2(scale)))
        elif form.scale == "e4m3":
            out.scales.fill_(_ONE_E4M3)
        else:
            out.scales.fill_(scale)
        if out.row_scales is not None:
            out.row_scales.fill_(scale)
        if out.zeros is not None:
            out.zeros.fill_(code.centre)
        if out.order is not None:
            out.order.copy_(torch.arange(width) // form.columns)

    def read_into(self, name: str, out: Tensor, first_row: int = 0, cut: Cut | None = None) -> None:
        """Fill `out`, whatever the name."""
        if out.ndim == 1:
            out.fill_(0 if name.endswith("bias") else 1)
            return
        if not out.is_contiguous():  # a family that keeps a matrix the other way round
            dense = torch.empty(out.shape, dtype=out.dtype, device=out.device)
            self.read_into(name, dense, first_row, cut)
            out.copy_(dense)
            return
        cut = cut or Cut(tuple(out.shape))
        shape = cut.width, out.dtype
        if shape not in self._scaled:
            self._scaled[shape] = (self._pool * cut.width**-0.5).to(out.dtype)
        pool = self._scaled[shape]
        _fill(out, pool, crc32(f"{self._seed} {name} {first_row}".encode()) % len(pool), cut)


_one_pool = cache(RandomWeights)


def _fill(out: Tensor, pool: Tensor, start: int, cut: Cut) -> None:
    """Fill a contiguous tensor with its part of a matrix that is what the pool has from `start` on, again and again."""
    width, breadth, first = cut.width, out.shape[1], start + cut.row * cut.width + cut.column
    if breadth == width:
        _fill_row(out.view(-1), pool, first)
        return
    while len(out):
        first %= len(pool)
        if first + breadth > len(pool):
            count = 1
            _fill_row(out[0], pool, first)
        else:
            count = min((len(pool) - first - breadth) // width + 1, len(out))
            out[:count].copy_(pool.as_strided((count, breadth), (width, 1), first))
        out, first = out[count:], first + count * width


def _fill_row(row: Tensor, pool: Tensor, start: int) -> None:
    done, start = 0, start % len(pool)
    while done < len(row):
        piece = pool[start : start + len(row) - done]
        row[done : done + len(piece)].copy_(piece)
        done, start = done + len(piece), 0
