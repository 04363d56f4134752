"""Writes output lines in a thread of its own, each as soon as its request has ended."""

import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any, Final, Self, final

from executor.batching import Completion
from executor.job.outputs import RunDirectory
from executor.job.requests import Rejected

SYNC_INTERVAL_S: Final = 1.0  # after which what was written is on disk, whatever becomes of power


@final
class OutputWriter:
    """The sink of a job; a context manager that ends its thread after what is queued.

    `line_of` makes the output line, in the thread: lanes wait for `put` alone. What was written is
    in the file at once, which outlives the process, and on disk within a second.
    """

    def __init__(self, directory: RunDirectory, line_of: Callable[[Completion | Rejected], dict[str, Any]]) -> None:
        self._directory, self._line_of = directory, line_of
        self._queue: SimpleQueue[Completion | Rejected | threading.Event | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._unsynced = False
        self._thread = threading.Thread(target=self._work, name="outputs", daemon=True)

    def __enter__(self) -> Self:
        """Start the thread."""
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """End the thread when everything that was put is written."""
        self._queue.put(None)
        self._thread.join()

    def put(self, item: Completion | Rejected, /) -> None:
        """Have an item written; returns at once."""
        self._queue.put(item)

    def stops(self) -> bool:
        """Raise what kept an item from being written, if anything did, and return False."""
        if self._error is not None:
            raise self._error
        return False

    def flush(self) -> None:
        """Return when all that was put is on disk; raises what kept it from there."""
        done = threading.Event()
        self._queue.put(done)
        done.wait()
        self.stops()

    def _work(self) -> None:
        synced_s = time.monotonic()
        while True:
            item = self._next()
            try:
                if isinstance(item, Completion | Rejected):
                    # Line by line: lanes get the interpreter's lock at each write.
                    if self._error is None:
                        self._directory.append(self._line_of(item))
                        self._unsynced = True
                    if time.monotonic() - synced_s < SYNC_INTERVAL_S:
                        continue
                if self._unsynced and self._error is None:
                    self._unsynced = False
                    self._directory.sync()
            except BaseException as error:  # noqa: BLE001 - raised in the main thread
                self._error = error
            synced_s = time.monotonic()
            if isinstance(item, threading.Event):
                item.set()
            elif item is None:
                return

    def _next(self) -> Completion | Rejected | threading.Event | None:
        """The next item; an event that nobody waits for if none comes in time to sync."""
        try:
            return self._queue.get(timeout=SYNC_INTERVAL_S if self._unsynced else None)
        except Empty:
            return threading.Event()
