"""Lanes: one worker thread each, running its tasks strictly in order.

A task waits for others through latches. A latch is one raw lock, held until its task has ended;
waiting is acquiring and releasing it, which costs well under a microsecond if it is open.
"""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from queue import SimpleQueue
from time import perf_counter
from typing import TYPE_CHECKING, Final, final

from hrm.tasks import Lane, Phase, Task, TaskId, TaskKind
from hrm.trace import Span

if TYPE_CHECKING:
    from _thread import LockType

Handler = Callable[[TaskId], int]  # runs a task; returns the bytes that it moved

RECENT_SPANS: Final = 48  # a lane's last spans, kept for the chart of a failure


def new_latch() -> "LockType":
    """A closed latch."""
    latch = threading.Lock()
    latch.acquire()
    return latch


def wait_for(latch: "LockType") -> None:
    """Return when the latch is open; `with` never leaves it closed if Ctrl-C strikes."""
    with latch:
        pass


@dataclass(slots=True)
class KindTotal:
    """What all tasks of one kind took together."""

    count: int = 0
    seconds: float = 0.0
    num_bytes: int = 0


@dataclass(slots=True)
class Recorder:
    """What one lane did: exact totals, the spans of the first steps, and the last few spans.

    `step_end_s` says when the lane's last task of each step ended.
    """

    lane: Lane
    totals: dict[TaskKind, KindTotal] = field(default_factory=lambda: defaultdict(KindTotal))
    spans: list[Span] = field(default_factory=list[Span])
    recent: deque[Span] = field(default_factory=lambda: deque(maxlen=RECENT_SPANS))
    step_end_s: dict[int, float] = field(default_factory=dict[int, float])
    spans_left_out: int = 0

    def add(self, span: Span, *, keep: bool) -> None:
        """Count a span, and keep it if asked to."""
        total = self.totals[span.id.kind]
        total.count += 1
        total.seconds += span.end_s - span.start_s
        total.num_bytes += span.num_bytes
        self.step_end_s[span.id.step] = span.end_s
        self.recent.append(span)
        if keep:
            self.spans.append(span)
        else:
            self.spans_left_out += 1


@dataclass(slots=True)
class Failure:
    """The first exception in any lane and the task that raised it."""

    task: Task
    error: BaseException
    span: Span


@dataclass(slots=True)
class Run:
    """One graph being run: shared by all lanes, made anew for every run."""

    handlers: Mapping[TaskKind, Handler]
    origin_s: float
    phase: Phase
    batch: int
    kept_steps: int
    recorders: dict[Lane, Recorder]
    stopped: bool = False
    failure: Failure | None = None
    failing: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, task: Task, error: BaseException, start_s: float) -> None:
        """Remember the first failure and let every lane pass over what is left."""
        self.stopped = True
        with self.failing:
            if self.failure is None:
                end_s = perf_counter() - self.origin_s
                span = Span(task.id, task.lane, start_s - self.origin_s, end_s, self.phase)
                self.failure = Failure(task, error, span)


@dataclass(frozen=True, slots=True)
class Ticket:
    """A task on its way through its lane, with the latches that it waits for and its own."""

    run: Run
    task: Task
    waits: tuple["LockType", ...]
    done: "LockType"


@final
class LaneWorker:
    """A lane's thread. `submit` never blocks; `close` ends the thread after what is queued."""

    def __init__(self, lane: Lane, enter_lane: Callable[[Lane], None]) -> None:
        self._queue: SimpleQueue[Ticket | None] = SimpleQueue()
        self._lane = lane
        self._enter_lane = enter_lane
        self._thread = threading.Thread(target=self._work, name=f"lane-{lane}", daemon=True)
        self._ready = new_latch()
        self._thread.start()
        wait_for(self._ready)

    def submit(self, ticket: Ticket) -> None:
        """Queue a task behind the lane's others."""
        self._queue.put(ticket)

    def close(self) -> None:
        """End the thread when everything submitted has passed through."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        try:
            self._enter_lane(self._lane)
        finally:
            self._ready.release()
        while (ticket := self._queue.get()) is not None:
            run, task = ticket.run, ticket.task
            for latch in ticket.waits:
                latch.acquire()
                latch.release()
            # After a failure nothing is run any more, but every latch still opens in order.
            if not run.stopped:
                start_s = perf_counter()
                try:
                    num_bytes = run.handlers[task.id.kind](task.id)
                except BaseException as error:  # noqa: BLE001 - reported by the main thread
                    run.fail(task, error, start_s)
                else:
                    origin_s = run.origin_s
                    span = Span(
                        task.id,
                        task.lane,
                        start_s - origin_s,
                        perf_counter() - origin_s,
                        run.phase,
                        run.batch,
                        num_bytes,
                    )
                    run.recorders[task.lane].add(span, keep=task.id.step < run.kept_steps)
            ticket.done.release()
