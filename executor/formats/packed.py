"""A packed matrix in memory: its codes and scales where they lie, and the weights that they mean.

N rows, W columns, E experts.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import lcm
from typing import final

import torch
from torch import Tensor

from executor.formats.codes import CODES
from executor.formats.cut import Cut
from hrm.contract.dequantising import weights_at_once
from hrm.formats import PackedFormat, aligned


@final
@dataclass(frozen=True, slots=True)
class Packed:
    """Matrices of `shape` (N, W), or several of them (E, N, W), in `hrm.formats.PackedFormat`'s parts.

    Every part has the axes of the shape before its own two.
    """

    format: PackedFormat
    shape: tuple[int, ...]
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    row_scales: Tensor | None = None
    order: Tensor | None = None

    def __len__(self) -> int:
        """Rows of a matrix, or how many matrices there are."""
        return self.shape[0]

    @property
    def parts(self) -> Mapping[str, Tensor]:
        """Its parts by their names in `PackedFormat.parts`."""
        every = {
            "codes": self.codes,
            "scales": self.scales,
            "zeros": self.zeros,
            "row_scales": self.row_scales,
            "order": self.order,
        }
        return {name: part for name, part in every.items() if part is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, without what aligns them."""
        return sum(part.nbytes for part in self.parts.values())

    def _with(self, shape: tuple[int, ...], change: Callable[[str, Tensor], Tensor]) -> "Packed":
        return Packed(self.format, shape, **{name: change(name, part) for name, part in self.parts.items()})

    def __getitem__(self, index: int | slice) -> "Packed":
        """One of several matrices, some of them, or rows of a matrix from and to bounds of groups."""
        if len(self.shape) > 2:
            count = () if isinstance(index, int) else (len(range(*index.indices(len(self)))),)
            shape = (*count, *self.shape[1:])
            return self._with(shape, lambda _, part: part[index])
        assert isinstance(index, slice), index
        start, stop, step = index.indices(len(self))
        assert step == 1, index
        rows = self.format.rows
        assert start % rows == 0, (index, self.format)
        assert stop % rows == 0 or stop == len(self), (index, self.format)
        of_groups = slice(start // rows, -(-stop // rows))
        spans = {"codes": slice(start, stop), "row_scales": slice(start, stop), "order": slice(None)}
        return self._with((stop - start, *self.shape[1:]), lambda name, part: part[spans.get(name, of_groups)])

    def with_shape(self, num_rows: int, width: int) -> "Packed":
        """Room for a matrix of another shape in the same format."""
        return packed_in(
            self.format, num_rows, width, torch.empty(self.format.bytes_of(num_rows, width), dtype=torch.uint8)
        )

    def clear(self) -> None:
        """Have all weights be noughts."""
        nought = CODES[self.format.code].centre if self.zeros is None else 0
        for name, part in self.parts.items():
            part.fill_(nought | nought << 4 if name == "codes" else 0)

    def copy_columns(self, source: "Packed") -> None:
        """Fill the first columns with a narrower matrix of as many rows."""
        for name, part in source.parts.items():
            self.parts[name][:, : part.shape[1]].copy_(part)

    def keeps_groups(self, order: Tensor) -> bool:
        """Whether rows in that order are still in groups with the same others."""
        rows = self.format.rows
        of_groups = order[::rows] // rows
        return torch.equal(of_groups.repeat_interleave(rows)[: len(order)], order // rows)

    def copy_rows(self, source: "Packed", order: Tensor) -> None:
        """Fill it with rows of another matrix, one for each of its own; rows of a group stay together."""
        assert self.keeps_groups(order), "rows of a group part"
        of_groups = order[:: self.format.rows] // self.format.rows
        orders = {"codes": order, "row_scales": order, "order": torch.zeros(1, dtype=torch.int64)}
        for name, part in self.parts.items():
            part.copy_(source.parts[name].index_select(0, orders.get(name, of_groups)))

    def dequantised(self, out: Tensor) -> Tensor:
        """Fill `out`, of this shape, with the weights that are meant, computed in float32 and rounded once."""
        assert out.shape == self.shape, (out.shape, self.shape)
        if len(self.shape) > 2:
            for matrix, there in zip(self, out, strict=True):
                matrix.dequantised(there)
            return out
        for rows in self.strips():
            some = self[rows]
            if some.is_whole:
                some.write_to(out[rows])
            else:
                out[rows].copy_(some.weights())
        return out

    @property
    def is_whole(self) -> bool:
        """Whether all groups are as large, and their columns beside one another."""
        form, (rows, width) = self.format, self.shape
        return not form.ordered and rows % form.rows == 0 and width % (form.columns or width) == 0

    def write_to(self, out: Tensor) -> None:
        """`dequantised` where groups are whole: every dtype has codes exactly, and scales are put on them there."""
        form, (rows, width) = self.format, self.shape
        if (dtype := CODES[form.code].dtype) is not None:
            out.copy_(self.codes.view(dtype))
        else:
            pairs = _pairs(form.code, not form.zeros, out.dtype, out.device)
            torch.index_select(pairs, 0, self.codes.flatten().int(), out=out.view(-1, 2))
        groups = rows // form.rows, 1, form.groups(width), 1
        grouped = out.view(groups[0], form.rows, groups[2], -1)
        if self.zeros is not None:
            grouped.sub_(self.zeros.view(groups))
        scales = _scales(form.scale, self.scales)
        if self.row_scales is not None:
            scales = scales * self.row_scales
        grouped.mul_(scales.view(groups))

    def strips(self) -> Iterator[slice]:
        """Its rows, at most `weights_at_once`, or one row of groups."""
        rows, width = self.format.rows, self.shape[-1]
        strip = max(weights_at_once(self.format) // width // rows, 1) * rows
        for first in range(0, len(self), strip):
            yield slice(first, min(first + strip, len(self)))

    def __iter__(self) -> Iterator["Packed"]:
        """Each of several matrices."""
        return (self[e] for e in range(len(self)))

    def weights(self) -> Tensor:
        """The weights that are meant, in float32."""
        width, form, code = self.shape[-1], self.format, CODES[self.format.code]
        values = code.widened(self.codes)
        scales = _scales(form.scale, self.scales)
        if self.order is not None:
            columns = self.order.long().expand(*values.shape[:-2], scales.shape[-2], width)
            spread = {"scales": scales.gather(-1, columns)}
            if self.zeros is not None:
                spread["zeros"] = self.zeros.float().gather(-1, columns)
        else:
            spread = {"scales": self._spread(scales)}
            if self.zeros is not None:
                spread["zeros"] = self._spread(self.zeros.float())
        if code.centre or self.zeros is not None:
            values -= spread.get("zeros", float(code.centre))
        values *= spread["scales"]
        return values if self.row_scales is None else values.mul_(self.row_scales)

    def _spread(self, of_groups: Tensor) -> Tensor:
        """A number for each weight, from one for each group."""
        rows, columns = self.shape[-2:]
        if self.format.columns:
            of_groups = of_groups.repeat_interleave(self.format.columns, dim=-1)[..., :columns]
        if self.format.rows > 1:
            of_groups = of_groups.repeat_interleave(self.format.rows, dim=-2)[..., :rows, :]
        return of_groups


# What a weight matrix may be in the executor: plain numbers, or packed ones.
Matrix = Tensor | Packed


def packed_in(form: PackedFormat, num_rows: int, width: int, memory: Tensor) -> Packed:
    """The matrix (N, W) that lies in `memory`, bytes, or the several (E, N, W) if it has rows of bytes."""
    before, start = tuple(memory.shape[:-1]), 0
    parts: dict[str, Tensor] = {}
    for part in form.parts(num_rows, width):
        dtype: torch.dtype = getattr(torch, part.dtype)
        there = memory[..., start : start + part.num_bytes].view(dtype)
        parts[part.name] = there.unflatten(-1, part.shape)
        start += aligned(part.num_bytes)
    assert start == memory.shape[-1], (form, num_rows, width, memory.shape)
    return Packed(form, (*before, num_rows, width), **parts)


def read_numbers(form: PackedFormat, cut: Cut, out: Tensor, read: Callable[[Packed, Cut], None]) -> None:
    """Fill `out` with the numbers that a part of a packed matrix means: `read` fills the groups that they are in."""
    (rows, width), (height, breadth) = cut.shape, out.shape
    step = lcm(form.columns or 1, 8 // form.code_bits)
    top, left = cut.row // form.rows * form.rows, 0 if form.ordered else cut.column // step * step
    bottom = min(-(-(cut.row + height) // form.rows) * form.rows, rows)
    right = width if form.ordered else min(-(-(cut.column + breadth) // step) * step, width)
    memory = torch.empty(form.bytes_of(bottom - top, right - left), dtype=torch.uint8)
    packed = packed_in(form, bottom - top, right - left, memory)
    read(packed, Cut(cut.shape, top, left))
    if packed.shape == out.shape and out.device.type == "cpu":
        packed.dequantised(out)
        return
    meant = packed.dequantised(torch.empty(packed.shape, dtype=out.dtype))
    out.copy_(meant[cut.row - top :, cut.column - left :][:height, :breadth])


@cache
def _pairs(code: str, around_zero: bool, dtype: torch.dtype, device: torch.device) -> Tensor:  # noqa: FBT001 - a key
    """The two numbers that each byte means in half-byte codes, which are taken off zero points or are around zero."""
    centre = CODES[code].centre if around_zero else 0
    numbers = [number - centre for number in CODES[code].numbers]
    return torch.tensor([[numbers[byte & 15], numbers[byte >> 4]] for byte in range(256)], dtype=dtype, device=device)


def _scales(scale: str, stored: Tensor) -> Tensor:
    if scale == "e8m0":  # the exponent of a float32; 0 is the power of two below the least normal one, 255 no number
        bits = (stored.int() << 23).masked_fill_(stored == 0, 1 << 22)
        return bits.view(torch.float32).masked_fill_(stored == 255, torch.nan)
    if scale == "e4m3":
        return stored.view(torch.float8_e4m3fn).float()
    return stored.float()
