"""trace.json as it grows: spans go to the file batch by batch, so none are held in memory."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final, final

from hrm.files import create_anew
from hrm.trace import Span, chrome_events

SPANS_AT_ONCE: Final = 1000


@final
class TraceFile:
    """A Chrome trace, valid JSON once it has ended; OSError if it cannot be written.

    `num_spans` counts those that it holds.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._num_bytes = 0
        self.num_spans = 0
        create_anew(path)
        names = ",\n".join(json.dumps(event) for event in chrome_events(()))
        self._append(f'{{"displayTimeUnit": "ms", "traceEvents": [\n{names}')

    def add(self, spans: Sequence[Span]) -> None:
        """Append spans."""
        self.num_spans += len(spans)
        for first in range(0, len(spans), SPANS_AT_ONCE):
            events = chrome_events(spans[first : first + SPANS_AT_ONCE])
            # The names of the lanes come again each time and are there already.
            self._append("".join(f",\n{json.dumps(e)}" for e in events if e["ph"] == "X"))

    def end(self) -> None:
        """Write what makes it whole."""
        self._append("\n]}\n")

    def _append(self, text: str) -> None:
        data = text.encode()
        with self._path.open("r+b") as file:  # unlike "ab", fails if it is gone
            file.truncate(self._num_bytes)  # after what an interrupt may have cut short
            file.seek(self._num_bytes)
            file.write(data)
        self._num_bytes += len(data)
