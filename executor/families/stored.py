"""How a checkpoint keeps the tensors of ours: under which names, joined how, and in which order.

A tensor of ours has the rows of one stored tensor, or of several one after the other. Where it wants
them in another order, or some of them twice or not at all, `Rows` says which.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Final

import torch
from torch import Tensor

from executor.checkpoint import WeightSource
from executor.errors import CheckpointError
from executor.formats import Matrix, Packed
from hrm.layers import Block, RoutedExperts, TensorSpec
from hrm.model_spec.quantisation import UNQUANTISED

# What only compares experts with one another is the same less its mean, which would cost narrow formats
# the digits that tell experts apart: published corrections are float32, large and nearly alike.
CENTRED: Final = ("score_correction",)


@dataclass(frozen=True, slots=True)
class Rows:
    """Which rows of several stored tensors, laid one after the other, are those of ours.

    `sizes` are the stored tensors' rows: one of no rows is not stored. `order` has the number of the
    stored row for each row of ours. A row may be used twice, or not at all.
    """

    sizes: tuple[int, ...]
    order: Tensor

    @staticmethod
    def of(*orders: Tensor) -> "Rows":
        """All rows of each stored tensor, one tensor after the other, each in an order of its own."""
        sizes = tuple(map(len, orders))
        starts = accumulate(sizes, initial=0)
        return Rows(sizes, torch.cat([order + start for order, start in zip(orders, starts, strict=False)]))


# Of a block, which the tensor is a part of; a family knows which kind of block that is.
RowsOf = Callable[[Any, TensorSpec], Rows]


def in_order(size: int) -> Tensor:
    """So many rows as they are stored."""
    return torch.arange(size)


def grouped(groups: int, *sizes: int) -> Tensor:
    """The order that brings together what is stored group by group.

    Each of the groups has a part of each of the sizes: first come the first parts of all groups.
    """
    parts = torch.arange(groups * sum(sizes)).view(groups, -1).split(sizes, dim=1)
    return torch.cat([part.flatten() for part in parts])


def rotary_halves(heads: int, *, rotated: int, before: int = 0) -> Tensor:
    """The order that parts the pairs of a rotary embedding into halves, in each of the heads.

    A head has `before` rows that stay where they are, and then `rotated` ones. Pairs are stored
    beside one another, and we rotate elements that lie half of `rotated` apart.
    """
    rows = torch.arange(heads * (before + rotated)).view(heads, -1)
    pairs = rows[:, before:].unflatten(1, (-1, 2)).transpose(1, 2)
    return torch.cat([rows[:, :before], pairs.flatten(1)], dim=1).flatten()


def interleaved(_: Block, tensor: TensorSpec) -> Rows:
    """A gate and what it scales, stored in turn: first all rows of the gate."""
    return Rows.of(grouped(tensor.shape[0] // 2, 1, 1))


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

    def read(self, source: WeightSource, ours: Matrix) -> None:
        """Fill ours from the source: straight to where it stays, unless it is to be sorted or centred."""
        if isinstance(ours, Packed):
            self._read_packed(source, ours)
        elif self.tensor.name in CENTRED and ours.dtype is not torch.float32:
            exact = torch.empty(ours.shape, dtype=torch.float32)
            self._read(source, exact)
            ours.copy_(exact - exact.mean())
        else:
            self._read(source, ours)

    def _read(self, source: WeightSource, ours: Tensor) -> None:
        if self.order is None:
            self._read_pieces(source, ours)
            return
        assert self.order.shape == ours.shape[:1], (self.tensor, self.order.shape)
        stored = torch.empty(self.pieces[-1].rows.stop, *ours.shape[1:], dtype=ours.dtype)
        self._read_pieces(source, stored)
        if ours.device.type == "cpu":
            torch.index_select(stored, 0, self.order, out=ours)
        else:
            ours.copy_(stored[self.order])

    def _read_packed(self, source: WeightSource, ours: Packed) -> None:
        there = ours if self.order is None else ours.with_rows(self.pieces[-1].rows.stop)
        for piece in self.pieces:
            rows = there[piece.rows]
            joined = rows.order.clone() if rows.order is not None and piece.rows.start else None
            source.read_packed_into(piece.name, rows, piece.first_row)
            if joined is not None and rows.order is not None and not joined.equal(rows.order):
                rule = f"must have its columns in the order of those of {self.pieces[0].name}, which it is joined with"
                raise CheckpointError(piece.name, "<another order of groups>", rule, UNQUANTISED)
        if self.order is None:
            return
        if not ours.keeps_groups(self.order):
            rule = f"must have whole groups of {ours.format.name} where rows are sorted"
            raise CheckpointError(self.pieces[0].name, f"<groups of {ours.format.rows} rows>", rule, UNQUANTISED)
        ours.copy_rows(there, self.order)

    def _read_pieces(self, source: WeightSource, out: Tensor) -> None:
        for piece in self.pieces:
            rows = out[piece.rows]
            source.read_into(piece.name, rows.T if piece.transposed else rows, piece.first_row)


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
