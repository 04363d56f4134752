"""Figures of a run: a line of JSON each, written and printed as soon as it is known."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

import msgspec

FIGURES: Final = "figures.jsonl"


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one folder; `stage` is who adds to them, and `out` where they are printed."""

    folder: Path
    stage: str
    out: TextIO = field(default_factory=lambda: sys.stdout)

    def put(self, name: str, value: Any) -> None:
        """Print a figure and add it to the file; either is tried if the other fails."""
        plain = msgspec.to_builtins(value, str_keys=True)
        line = json.dumps({"stage": self.stage, "figure": name, "value": plain, "at": round(time.time(), 1)})
        with suppress(OSError):  # whoever read it is gone
            print(line, file=self.out, flush=True)
        try:
            with (self.folder / FIGURES).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            with suppress(OSError):
                print(f"not in {FIGURES}: {error}", file=sys.stderr)

    def leave_out(self, name: str, reason: str) -> None:
        """Say why there is no such figure."""
        self.put(name, {"left_out": reason})

    def gate(self, name: str, *, is_open: bool, told: str) -> None:
        """Put down whether the run may go on; with a closed gate it ends before the next stage."""
        self.put(f"gate: {name}", {"open": is_open, "told": told})


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """All lines; none if nothing was measured. What a process that was killed left of its last is passed over."""
    path = folder / FIGURES
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def latest(folder: Path) -> dict[str, Any]:
    """The last value of every figure by its name."""
    return {line["figure"]: line["value"] for line in read(folder)}


def closed_gates(folder: Path) -> list[str]:
    """What keeps the run from going on: every gate that was ever closed."""
    gates = {line["figure"].removeprefix("gate: "): line["value"] for line in read(folder) if _is_closed(line)}
    return [f"{name}: {value['told']}" for name, value in gates.items()]


def _is_closed(line: dict[str, Any]) -> bool:
    return line["figure"].startswith("gate: ") and not line["value"]["open"]
