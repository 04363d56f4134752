"""`make predictions` prints which predictions moved and by how much; with RECORD=1 the table follows."""

import os
import sys

from tests.predictions.table import moves, predict, read_table, write_table


def main() -> int:
    """The exit code: 1 if a prediction moved and the table was not to follow."""
    entries, moved, record = read_table(), 0, os.environ.get("RECORD") == "1"
    for entry in entries:
        figures = predict(entry)
        for move in moves(entry, figures):
            moved += 1
            print(move, flush=True)
        entry["predicted"] = figures
    if record:
        write_table(entries)
    then = "the table follows" if record else "RECORD=1 makes the table follow" if moved else "none moved"
    print(f"{len(entries)} predictions, {moved} figures moved: {then}")
    return int(moved > 0 and not record)


if __name__ == "__main__":
    sys.exit(main())
