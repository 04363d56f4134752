"""How a checkpoint keeps the tensors of ours: under which names, joined how, and in which order.

A tensor of ours has the rows of one stored tensor, or of several one after the other. Where it wants
them in another order, or some of them twice or not at all, `StoredRows` says which.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, Final

import torch
from torch import Tensor

from executor.checkpoint import WeightSource
from executor.errors import CheckpointError
from executor.formats import Cut, Matrix, Packed, read_numbers
from hrm.layers import Block, RoutedExperts, Stretch, TensorShare, TensorSpec
from hrm.model_spec.quantisation import UNQUANTISED

# What only compares experts with one another is the same less its mean, which would cost narrow formats
# the digits that tell experts apart: published corrections are float32, large and nearly alike.
CENTRED: Final = ("score_correction",)


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Which rows of several stored tensors, laid one after the other, are those of ours.

    `sizes` are the stored tensors' rows: one of no rows is not stored. `order` has the number of the
    stored row for each row of ours. A row may be used twice, or not at all.
    """

    sizes: tuple[int, ...]
    order: Tensor

    @staticmethod
    def of(*orders: Tensor) -> "StoredRows":
        """All rows of each stored tensor, one tensor after the other, each in an order of its own."""
        sizes = tuple(map(len, orders))
        starts = accumulate(sizes, initial=0)
        return StoredRows(sizes, torch.cat([order + start for order, start in zip(orders, starts, strict=False)]))


# Of a block, which the tensor is a part of; a family knows which kind of block that is.
RowsOf = Callable[[Any, TensorSpec], StoredRows]


def in_order(size: int) -> Tensor:
    """So many rows as they are stored."""
    return torch.arange(size)


def grouped(groups: int, *sizes: int) -> Tensor:
    """The order that brings together what is stored group by group.

    Each of the groups has a part of each of the sizes: first come the first parts of all groups.
    """
    parts = torch.arange(groups * sum(sizes)).view(groups, -1).split(sizes, dim=1)
    return torch.cat([part.flatten() for part in parts])


def interleaved(_: Block, tensor: TensorSpec) -> StoredRows:
    """A gate and what it scales, stored in turn: first all rows of the gate."""
    return StoredRows.of(grouped(tensor.shape[0] // 2, 1, 1))


@dataclass(frozen=True, slots=True)
class Stored:
    """How a checkpoint keeps a tensor of ours, or one of each expert.

    Several `names` have its rows one after the other, or as `rows` says of the block. A name without
    {expert} has all experts' tensors, along an axis more or, if `flat`, one below the other. Matrices
    may be stored `transposed`; rows are then columns.
    """

    names: tuple[str, ...]
    transposed: bool = False
    flat: bool = False
    rows: RowsOf | None = None


Names = Mapping[str, str | tuple[str, ...] | Stored]


def stored_as(names: Names, name: str, prefix: str) -> Stored | None:
    """How `names` say that a tensor is stored, with its full names; None if they do not."""
    how = names.get(name)
    if how is None:
        return None
    how = how if isinstance(how, Stored) else Stored((how,) if isinstance(how, str) else how)
    return replace(how, names=tuple(prefix + each for each in how.names))


@dataclass(frozen=True, slots=True)
class Piece:
    """A stored tensor of that shape, and the `rows` of what is joined that it has from `first_row` on.

    `first_row` counts as WeightSource.read_into does.
    """

    name: str
    shape: tuple[int, ...]
    first_row: int
    rows: slice
    transposed: bool


@dataclass(frozen=True, slots=True)
class Joined:
    """A tensor of ours as stored pieces, whose rows lie one after the other until `order` sorts them."""

    tensor: TensorSpec
    pieces: tuple[Piece, ...]
    order: Tensor | None

    @staticmethod
    def of(tensor: TensorSpec, how: Stored, block: Block | None, layer: int, expert: int | None) -> "Joined":
        """The stored tensors that have one of a block's, in a layer and of an expert if it is of one."""
        rows = how.rows(block, tensor) if how.rows is not None else None
        sizes = rows.sizes if rows is not None else _sizes(tensor, how, block)
        pieces = _pieces(tensor, how, sizes, block, layer, expert)
        return Joined(tensor, tuple(pieces), rows.order if rows is not None else None)

    def read(self, source: WeightSource, ours: Matrix, share: TensorShare | None = None) -> None:
        """Fill ours with the tensor, or with a share of it: straight to where it stays, unless sorted or centred."""
        share = share or TensorShare.whole(self.tensor)
        if share.has_noughts:
            _clear(ours)
        if share.is_empty:
            return
        if isinstance(ours, Packed):
            self._read_packed(source, ours, share)
        elif self.tensor.name in CENTRED and ours.dtype is not torch.float32:
            exact = torch.empty(ours.shape, dtype=torch.float32)
            self._read(source, exact, share)
            ours.copy_(exact - exact.mean())
        else:
            self._read(source, ours[:, : share.columns.size] if ours.ndim > 1 else ours, share)

    def _read_packed(self, source: WeightSource, ours: Packed, share: TensorShare) -> None:
        columns = share.columns
        if columns.size == columns.room:
            self._read(source, ours, share)
            return
        there = ours.with_shape(len(ours), columns.size)
        self._read(source, there, share)
        ours.copy_columns(there)

    def _read(self, source: WeightSource, ours: Matrix, share: TensorShare) -> None:
        starts = accumulate((span.room for span in share.rows), initial=0)
        places = [slice(start, start + span.size) for start, span in zip(starts, share.rows, strict=False)]
        if self.order is None:
            for span, place in zip(share.rows, places, strict=True):
                self._read_rows(source, span.start, ours[place], share.columns)
            return
        wanted = torch.cat([self.order[span.start : span.start + span.size] for span in share.rows])
        group = ours.format.rows if isinstance(ours, Packed) else 1
        if isinstance(ours, Packed) and not ours.keeps_groups(wanted):
            rule = f"must have whole groups of {ours.format.name} where rows are sorted"
            raise CheckpointError(self.pieces[0].name, f"<groups of {group} rows>", rule, UNQUANTISED)
        spans, sources = _stored_spans(wanted, group, self.pieces[-1].rows.stop)
        stored, end = _as_wide_as(ours, sum(stop - first for first, stop in spans)), 0
        for first, stop in spans:
            end += stop - first
            self._read_rows(source, first, stored[end - (stop - first) : end], share.columns)
        for place, of_place in zip(places, sources.split([span.size for span in share.rows]), strict=True):
            _copy_rows(stored, of_place, ours[place])

    def _read_rows(self, source: WeightSource, first: int, out: Matrix, columns: Stretch) -> None:
        """Fill `out` with what is joined, from a row on."""
        for piece in self.pieces:
            start, stop = max(first, piece.rows.start), min(first + len(out), piece.rows.stop)
            if start < stop:
                cut = Cut(self._shape_of(piece), start - piece.rows.start, columns.start)
                self._read_piece(source, piece, out[start - first : stop - first], cut)

    def _shape_of(self, piece: Piece) -> tuple[int, ...]:
        return (piece.rows.stop - piece.rows.start, *self.tensor.shape[1:])

    def _read_piece(self, source: WeightSource, piece: Piece, out: Matrix, cut: Cut) -> None:
        if isinstance(out, Packed):
            joined = out.order.clone() if out.order is not None and piece.rows.start else None
            source.read_packed_into(piece.name, out, piece.first_row, cut)
            if joined is not None and out.order is not None and not joined.equal(out.order):
                rule = f"must have its columns in the order of those of {self.pieces[0].name}, which it is joined with"
                raise CheckpointError(piece.name, "<another order of groups>", rule, UNQUANTISED)
        elif self.tensor.packed is not None:  # and what we have of it is not, for its groups are not whole
            read_numbers(
                self.tensor.packed,
                cut,
                out,
                lambda packed, of: source.read_packed_into(piece.name, packed, piece.first_row, of),
            )
        elif piece.transposed:
            rows, width = cut.shape
            source.read_into(piece.name, out.T, piece.first_row, Cut((width, rows), cut.column, cut.row))
        else:
            source.read_into(piece.name, out, piece.first_row, cut)


def _clear(ours: Matrix) -> None:
    if isinstance(ours, Packed):
        ours.clear()
    else:
        ours.zero_()


def _as_wide_as(ours: Matrix, num_rows: int) -> Matrix:
    """Room for so many rows."""
    if isinstance(ours, Packed):
        return ours.with_shape(num_rows, ours.shape[-1])
    return torch.empty(num_rows, *ours.shape[1:], dtype=ours.dtype)


def _stored_spans(rows: Tensor, group: int, num_rows: int) -> tuple[list[tuple[int, int]], Tensor]:
    """From where to where `num_rows` are to be read for some of them, in whole groups; and where each then is."""
    groups, places = (rows // group).unique(return_inverse=True)
    ends = ((groups.diff() != 1).nonzero().flatten() + 1).tolist()
    bounds = pairwise([0, *ends, len(groups)])
    spans = [(int(groups[a]) * group, min((int(groups[b - 1]) + 1) * group, num_rows)) for a, b in bounds]
    return spans, places * group + rows % group


def _copy_rows(stored: Matrix, order: Tensor, ours: Matrix) -> None:
    """Fill ours with stored rows in that order."""
    if isinstance(ours, Packed):
        assert isinstance(stored, Packed)
        ours.copy_rows(stored, order)
        return
    assert isinstance(stored, Tensor)
    assert order.shape == ours.shape[:1], (order.shape, ours.shape)
    if ours.device.type == "cpu" and ours.is_contiguous():
        torch.index_select(stored, 0, order, out=ours)
    else:
        ours.copy_(stored[order])


def _sizes(tensor: TensorSpec, how: Stored, block: Block | None) -> tuple[int, ...]:
    """Rows of each of the stored tensors that are joined; a bias is joined as its matrix is.

    Of names beyond the parts nothing is stored: values that are made from keys have no matrix.
    """
    if len(how.names) == 1:
        return tensor.shape[:1]
    parts = tensor.parts
    if not parts and block is not None:
        parts = next(other.parts for other in block.tensors if other.parts and other.shape[0] == tensor.shape[0])
    return (*parts, *(0,) * (len(how.names) - len(parts)))


def _pieces(
    tensor: TensorSpec, how: Stored, sizes: tuple[int, ...], block: Block | None, layer: int, expert: int | None
) -> Iterator[Piece]:
    ends = accumulate(sizes)
    for name, size, end in zip(how.names, sizes, ends, strict=True):
        if not size:
            continue
        shape = (size, *tensor.shape[1:])
        shape, first_row = shape[::-1] if how.transposed else shape, 0
        if expert is not None and "{expert}" not in name:
            assert isinstance(block, RoutedExperts), block
            first_row, count = expert * shape[0], block.num_experts
            shape = (count * shape[0], *shape[1:]) if how.flat else (count, *shape)
        theirs = name.format(layer=layer, expert=expert)
        yield Piece(theirs, shape, first_row, slice(end - size, end), how.transposed)


def is_stored(how: Stored, stored: Collection[str], layer: int, expert: int | None) -> bool:
    """Whether a checkpoint with those names has the first tensor of it."""
    return how.names[0].format(layer=layer, expert=expert) in stored
