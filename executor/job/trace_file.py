"""trace.json as it grows: spans go to the file batch by batch, so none are held in memory."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, final

from hrm.files import create_anew, replace_durably
from hrm.trace import Span, chrome_events

SPANS_AT_ONCE: Final = 1000


@final
class TraceFile:
    """A Chrome trace, valid JSON once it has ended.

    `num_spans` counts those that it holds. If it cannot be written it is given up, as a disk that
    is full should have room for answers first: it is removed, `is_given_up`, and `tell` is called
    with a line that says so.
    """

    def __init__(self, path: Path, tell: Callable[[str], object]) -> None:
        self._path, self._tell = path, tell
        self._num_bytes = 0
        self.num_spans = 0
        self.is_given_up = False
        with self._giving_up(path):
            create_anew(path)
            self._begin()

    def _begin(self) -> None:
        names = ",\n".join(json.dumps(event) for event in chrome_events(()))
        self._append(f'{{"displayTimeUnit": "ms", "traceEvents": [\n{names}')

    def add(self, spans: Sequence[Span], *, rank: int = 0, process: str = "") -> None:
        """Append spans, those of another rank than 0 as another process, which has a name of its own or its rank's."""
        if self.is_given_up:
            return
        self.num_spans += len(spans)
        with self._giving_up(self._path):
            for first in range(0, len(spans), SPANS_AT_ONCE):
                events = chrome_events(
                    spans[first : first + SPANS_AT_ONCE], process=process or f"rank {rank}", pid=rank
                )
                # The names of the lanes come again each time, and need only once be there.
                with_names = rank > 0 and first == 0
                self._append("".join(f",\n{json.dumps(e)}" for e in events if e["ph"] == "X" or with_names))

    def end(self, to: Path) -> None:
        """Write what makes it whole, and give it its name."""
        if self.is_given_up:
            return
        with self._giving_up(to):
            self._append("\n]}\n")
            replace_durably(self._path, to)

    @contextmanager
    def _giving_up(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.is_given_up, self.num_spans = True, 0
            with suppress(OSError):
                self._path.unlink()
            self._tell(f"the trace is given up: {path} is <{error.strerror}>; the job goes on")

    def _append(self, text: str) -> None:
        data = text.encode()
        with self._path.open("r+b") as file:  # unlike "ab", fails if it is gone
            file.truncate(self._num_bytes)  # after what an interrupt may have cut short
            file.seek(self._num_bytes)
            file.write(data)
        self._num_bytes += len(data)
