"""No prediction moves unless the table says so; `make predictions RECORD=1` makes it follow."""

import pytest

from tests.predictions.table import moves, predict, read_table

ENTRIES = read_table()


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry["name"] for entry in ENTRIES])
def test_a_prediction_is_what_the_table_says(entry):
    moved = [str(move) for move in moves(entry, predict(entry))]
    assert not moved, "\n".join(moved)


def test_a_moved_figure_is_told():
    """A gate that cannot close is none."""
    entry = next(entry for entry in ENTRIES if "policy" in entry)
    figures = dict(entry["predicted"])
    figures["tokens/s"] *= 1 + 1e-6
    del figures["decode s"]
    assert [move.figure for move in moves(entry, figures)] == ["tokens/s", "decode s"]


def test_the_table_covers_models_schedules_and_both_ways_of_asking():
    searches = [entry for entry in ENTRIES if "search" in entry]
    assert len(ENTRIES) >= 100
    assert 30 <= len(searches) < len(ENTRIES)
    schedules = {entry["policy"].get("schedule", "cgopipe") for entry in ENTRIES if "policy" in entry}
    assert schedules == {"cgopipe", "flexgen", "flexgen-c", "fastdecode", "deepspeed"}
