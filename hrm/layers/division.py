"""Which part of every tensor each of several GPUs in tensor parallel has.

It follows from the tensor of the whole layer and that of one GPU's (`Layer.of_rank`), which says whether it
is divided: rank r has the r-th part. The last parts may be smaller than the others, or nothing at all: what a
GPU then has more room for are noughts, which add nothing to any sum. Of experts that are whole on one GPU each
tensor is whole; `RoutedExperts.experts_of` says whose they are.
"""

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import NamedTuple

from hrm.layers.base import Block, Section, Sections, TensorSpec
from hrm.layers.layer import Layer


class Stretch(NamedTuple):
    """Rows or columns of the whole, `size` of them from `start` on, where there is `room` for as many or more."""

    start: int
    size: int
    room: int


class TensorShare(NamedTuple):
    """What one GPU has of a tensor: these rows, one span after the other, and of each these columns."""

    rows: tuple[Stretch, ...]
    columns: Stretch

    @staticmethod
    def whole(tensor: TensorSpec) -> "TensorShare":
        """All of it."""
        rows, *others = tensor.shape
        columns = prod(others)
        return TensorShare((Stretch(0, rows, rows),), Stretch(0, columns, columns))

    @property
    def has_noughts(self) -> bool:
        """Whether there is more room than rows or columns."""
        return any(span.size < span.room for span in (*self.rows, self.columns))

    @property
    def is_empty(self) -> bool:
        """Whether nothing of the tensor is there."""
        return not self.columns.size or not any(span.size for span in self.rows)


def tensor_share(tensor: TensorSpec, its: TensorSpec, rank: int, ranks: int) -> TensorShare:
    """What one of `ranks` has of a tensor that lies outside blocks."""
    return _share(tensor, its, tensor.sections, its.sections, rank, ranks)


@lru_cache(maxsize=256)
def layer_shares(whole: Layer, its: Layer, rank: int, ranks: int) -> Mapping[str, TensorShare]:
    """What one of `ranks` has of every tensor of a layer, of which it has `its`; by the tensors' names."""
    return {
        tensor.name: _share_in(block, narrow, tensor, part, rank, ranks)
        for block, narrow in zip(whole.blocks, its.blocks, strict=True)
        for tensor, part in zip(block.tensors, narrow.tensors, strict=True)
    }


def _share_in(block: Block, narrow: Block, tensor: TensorSpec, part: TensorSpec, rank: int, ranks: int) -> TensorShare:
    if rank and part.name in narrow.summed_vectors:
        return TensorShare((Stretch(0, 0, part.shape[0]),), Stretch(0, 1, 1))
    return _share(tensor, part, block.sections_of(tensor), narrow.sections_of(part), rank, ranks)


def _share(tensor: TensorSpec, part: TensorSpec, whole: Sections, its: Sections, rank: int, ranks: int) -> TensorShare:
    share = TensorShare.whole(tensor)
    if whole and its:
        return share._replace(rows=_spans(whole, its, rank, ranks))
    if part.split == 1:
        (columns,) = _spans((Section(tensor.shape[1]),), (Section(part.shape[1]),), rank, ranks)
        return share._replace(columns=columns)
    return share


def _spans(whole: Sections, its: Sections, rank: int, ranks: int) -> tuple[Stretch, ...]:
    spans, end = list[Stretch](), 0
    for (count, size), (room, _) in zip(whole, its, strict=True):
        first = rank * count // ranks if count < ranks else min(rank * room, count)
        spans.append(Stretch(end + first * size, min(room, count - first) * size, room * size))
        end += count * size
    return tuple(spans)
