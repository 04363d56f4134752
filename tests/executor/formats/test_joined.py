"""Packed matrices that are joined of several stored ones, or whose rows are sorted."""

import pytest
import torch

from executor.errors import CheckpointError
from executor.families.stored import Joined, Stored, StoredRows
from executor.formats import Cut, Packed, packed_in
from hrm.formats import PackedFormat, packed_format
from hrm.layers import TensorSpec, Unit

ROWS, WIDTH = 16, 8


class Numbered:
    """A source whose matrices have rows numbered from 1 on, and columns in orders that are told."""

    names = ()

    def __init__(self, orders: dict[str, list[int]]) -> None:
        self._orders = orders

    def read_packed_into(self, name: str, out: Packed, first_row: int = 0, cut: Cut | None = None) -> None:
        assert not first_row
        out.codes.copy_(torch.arange(1, len(out) + 1, dtype=torch.uint8)[:, None].expand(out.codes.shape))
        out.scales.fill_(1)
        if out.order is not None:
            out.order.copy_(torch.tensor(self._orders[name])[None])

    def read_into(self, name: str, out: torch.Tensor, first_row: int = 0, cut: Cut | None = None) -> None:
        raise AssertionError((name, out.shape, first_row))


def room(name: str) -> tuple[PackedFormat, Packed]:
    form = packed_format(name)
    assert form is not None
    return form, packed_in(form, ROWS, WIDTH, torch.zeros(form.bytes_of(ROWS, WIDTH), dtype=torch.uint8))


def joined(form: PackedFormat, how: Stored) -> Joined:
    tensor = TensorSpec("qkv", (ROWS, WIDTH), Unit.MIXER, 0, (8, 8), form)
    return Joined.of(tensor, how, None, 0, None)


@pytest.mark.parametrize("alike", [True, False])
def test_matrices_are_joined_if_their_columns_are_in_one_order(*, alike: bool) -> None:
    form, ours = room("int4-g4-o")
    orders = {"a": [0, 1] * 4, "b": [0, 1] * 4 if alike else [1, 0] * 4}
    if alike:
        joined(form, Stored(("a", "b"))).read(Numbered(orders), ours)
        assert ours.codes[:, 0].tolist() == [*range(1, 9)] * 2
        assert ours.order is not None
        assert ours.order[0].tolist() == orders["a"]
    else:
        with pytest.raises(CheckpointError, match="b is <another order of groups>: must have its columns in the order"):
            joined(form, Stored(("a", "b"))).read(Numbered(orders), ours)


@pytest.mark.parametrize("whole", [True, False])
def test_rows_are_sorted_if_their_groups_stay_whole(*, whole: bool) -> None:
    form, ours = room("fp8-b4")
    order = torch.arange(ROWS).view(-1, 4).flip(0).flatten() if whole else torch.arange(ROWS).roll(2)
    how = Stored(("a",), rows=lambda *_: StoredRows.of(order))
    if whole:
        joined(form, how).read(Numbered({}), ours)
        assert ours.codes[:, 0].equal((order + 1).to(torch.uint8))
    else:
        with pytest.raises(CheckpointError, match="a is <groups of 4 rows>: must have whole groups of fp8-b4"):
            joined(form, how).read(Numbered({}), ours)
