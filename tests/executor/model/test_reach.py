"""Which rows of a cache tokens have, against a list of who wrote each row last."""

import itertools

import pytest

from executor.model import Reach


@pytest.mark.parametrize("reach", [Reach(), Reach(1), Reach(5), Reach(5, chunked=True)])
@pytest.mark.parametrize("cuts", [[0, 23], [0, 1, 4, 5, 6, 17, 23], [0, 12, 23]])
def test_rows_hold_what_attention_reaches(reach, cuts):
    rows = [-1] * reach.capacity(23)
    for start, end in itertools.pairwise(cuts):
        for token, row, count in reach.spans(start, end):
            rows[row : row + count] = range(token, token + count)
        last = end - 1
        first = last // 5 * 5 if reach.chunked else max(0, end - (reach.rows or end))
        reached = rows[: reach.length(end)]
        assert sorted(reached) == list(range(first, end))
        assert rows[reach.row(last)] == last


def test_rows_in_turn_are_overwritten_one_by_one():
    reach, rows = Reach(3), [-1] * 3
    for token in range(8):
        rows[reach.row(token)] = token
        assert sorted(rows[: reach.length(token + 1)]) == list(range(max(0, token - 2), token + 1))
