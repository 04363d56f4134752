"""The actor: holds one engine, runs its share in a thread, and hands over what has ended."""

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, final

from executor.batching import Completion, Request
from executor.guard import in_a_line
from hrm.errors import HrmError


@dataclass(frozen=True, slots=True)
class Ready:
    """An engine that is loaded: requests of a whole batch, and its node."""

    batch_size: int
    node: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Why there is no engine: a mistake of the user's, which another try would meet again."""

    message: str


@dataclass(frozen=True, slots=True)
class Ended:
    """Completions since the last look; `is_last` if the share is at its end, with what broke it, if anything."""

    completions: list[Completion]
    is_last: bool
    error: str | None = None


@final
class _Outlet:
    """The sink of an engine in a worker: a queue."""

    def __init__(self, queue: "SimpleQueue[Completion | Ended]") -> None:
        self._queue = queue

    def put(self, completion: Completion, /) -> None:
        self._queue.put(completion)

    def stops(self) -> bool:
        return False


@final
class Worker:
    """One engine in an actor's process."""

    def __init__(self, **engine: Any) -> None:
        self._given = engine
        self._queue: SimpleQueue[Completion | Ended] = SimpleQueue()

    def load(self) -> Ready | Refused:
        """Load the engine; what is not a mistake of the user's is raised."""
        from executor.ray.engine import Engine

        try:
            self._engine = Engine(**self._given)
        except HrmError as error:
            return Refused(str(error))
        return Ready(self._engine.batch_size, os.uname().nodename)

    def begin(self, requests: Sequence[Request]) -> None:
        """Begin to answer requests."""
        threading.Thread(target=self._run, args=(requests,), name="share", daemon=True).start()

    def _run(self, requests: Sequence[Request]) -> None:
        error: str | None = None
        try:
            self._engine.run(requests, _Outlet(self._queue))
        except BaseException as raised:  # noqa: BLE001 - told to who looks
            error = in_a_line(raised)
        self._queue.put(Ended([], is_last=True, error=error))

    def look(self, at_most_s: float) -> Ended:
        """What has ended since the last look; waits so long for the first."""
        found: list[Completion] = []
        try:
            item = self._queue.get(timeout=at_most_s)
            while not isinstance(item, Ended):
                found.append(item)
                item = self._queue.get_nowait()
        except Empty:
            return Ended(found, is_last=False)
        return Ended(found, is_last=True, error=item.error)
