"""Lanes: one worker thread each, running its tasks strictly in order.

A task waits for others through latches. A latch is one raw lock, held until its task has ended;
waiting is acquiring and releasing it, which costs well under a microsecond if it is open.

A lane with a stream queues its tasks on a device. Its latch opens when the task is queued, and the
ticket then has a mark behind it: a lane with a stream of its own lets that wait for the mark, a
lane without one waits itself. A few tasks are queued ahead at most; when a task is known to be
done, its span is made of the device's own times.
"""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from time import perf_counter
from typing import TYPE_CHECKING, Final, final

from executor.backends.streams import AbstractMark, AbstractStream
from hrm.contract.pacing import Waits
from hrm.run_record import KindTotal
from hrm.tasks import Act, Lane, Phase, Task
from hrm.trace import Span

if TYPE_CHECKING:
    from _thread import LockType

Handler = Callable[[Task], int]  # runs a task; returns the bytes that it moved

RECENT_SPANS: Final = 48  # a lane's last spans, kept for the chart of a failure
# How many tasks a stream may be behind its lane. A driver holds about 1000 kernels and then has the lane wait within
# a task, which a chunk's layer of some hundred kernels reaches far sooner than a micro-batch's.
QUEUED_TASKS: Final = 8
QUEUED_LAYERS: Final = 2


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
class Recorder:
    """What one lane did: exact totals, the spans of the first steps, and the last few spans.

    `step_end_s` says when the lane's last task of each step ended.
    """

    lane: Lane
    totals: dict[str, KindTotal] = field(default_factory=lambda: defaultdict(KindTotal))
    spans: list[Span] = field(default_factory=list[Span])
    recent: deque[Span] = field(default_factory=lambda: deque(maxlen=RECENT_SPANS))
    step_end_s: dict[int, float] = field(default_factory=dict[int, float])
    spans_left_out: int = 0

    def add(self, span: Span, *, keep: bool) -> None:
        """Count a span, and keep it if asked to."""
        total = self.totals[span.id.act.name]
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
class GraphRun:
    """One graph being run: shared by all lanes, made anew for every run."""

    handlers: Mapping[Act, Handler]
    origin_s: float
    batch: int
    kept_steps: int
    recorders: dict[Lane, Recorder]
    waits: Waits
    stopped: bool = False
    failure: Failure | None = None
    failing: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, task: Task, error: BaseException, start_s: float) -> None:
        """Remember the first failure and let every lane pass over what is left."""
        with self.failing:
            if self.failure is None:
                end_s = perf_counter() - self.origin_s
                span = Span(task.id, start_s - self.origin_s, end_s)
                self.failure = Failure(task, error, span)
        self.stop()

    def stop(self) -> None:
        """Let every lane pass over what is left, and end what it sleeps for."""
        self.stopped = True
        self.waits.call_off()

    def record(self, task: Task, start_s: float, end_s: float, num_bytes: int) -> None:
        """Put down a task that was done between these times, counted from `origin_s`."""
        span = Span(task.id, start_s, end_s, self.batch, num_bytes)
        self.recorders[task.lane].add(span, keep=task.id.step < self.kept_steps)


class Ticket:
    """A task on its way through its lane, with the tickets that it waits for and its latch.

    `mark` is there once the latch is open, if the task was then queued and not yet done. `end_s` of perf_counter is
    when the task ended, until then when it was submitted.
    """

    __slots__ = ("done", "end_s", "mark", "run", "task", "waits")

    def __init__(self, run: GraphRun, task: Task, waits: "tuple[Ticket, ...]") -> None:
        self.run, self.task, self.waits = run, task, waits
        self.done = new_latch()
        self.end_s = perf_counter()
        self.mark: AbstractMark | None = None


@dataclass(frozen=True, slots=True)
class Queued:
    """A task that was handed to a stream at `queued_s` of perf_counter, between two marks."""

    task: Task
    queued_s: float
    start: AbstractMark
    end: AbstractMark
    num_bytes: int


@final
class LaneWorker:
    """A lane's thread. `submit` never blocks; `close` ends the thread after what is queued.

    With a `stream` its tasks are queued there, at most `queued_tasks` ahead of what is known to be
    done; 0 waits for each before the next.
    """

    def __init__(
        self,
        lane: Lane,
        enter_lane: Callable[[Lane], None],
        stream: AbstractStream | None = None,
        queued_tasks: int = QUEUED_TASKS,
    ) -> None:
        self._queue: SimpleQueue[Ticket | None] = SimpleQueue()
        self._lane = lane
        self._enter_lane = enter_lane
        self._stream, self._queued_tasks = stream, queued_tasks
        self.queued: deque[Queued] = deque()
        self._reached: tuple[AbstractMark, float] | None = None
        self._since_s: float | None = None
        self._last: Task | None = None
        self._origin_s = 0.0
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

    def start_clock(self, origin_s: float) -> None:
        """Tie the stream's clock to the host's, before a run and while nothing is queued."""
        self._origin_s = origin_s
        if self._stream is not None:
            self.queued.clear()
            before_s = perf_counter()
            mark = self._stream.mark()
            mark.synchronise()
            self._reached = mark, (before_s + perf_counter()) / 2 - origin_s

    @property
    def under_way_s(self) -> float:
        """Seconds that the task under way has taken until now, 0 if there is none.

        For live displays, from any thread: of what is queued on a device it is about right.
        """
        since_s = self._since_s
        with suppress(IndexError):  # the lane may take the last one off meanwhile
            queued_s = self.queued[0].queued_s
            if self._reached is not None:
                queued_s = max(queued_s, self._reached[1] + self._origin_s)
            since_s = queued_s if since_s is None else min(since_s, queued_s)
        return 0.0 if since_s is None else max(perf_counter() - since_s, 0.0)

    @property
    def under_way(self) -> Task | None:
        """The task under way, of what is queued on a device the first; None if there is none. From any thread."""
        with suppress(IndexError):  # the lane may take the last one off meanwhile
            return self.queued[0].task
        return None if self._since_s is None else self._last

    def settle(self, run: GraphRun, left: int = 0) -> None:
        """Wait until no more than `left` of the tasks that were queued can still be going on.

        From the lane's own thread, or any other while the lane has nothing to do. A task that
        failed stays queued, and so do all after it.
        """
        while len(self.queued) > left:
            one = self.queued[0]
            try:
                one.end.synchronise()
                self._record(run, one)
            except BaseException as error:  # noqa: BLE001 - reported by the main thread
                run.fail(one.task, error, one.queued_s)
                return
            self.queued.popleft()

    def _record(self, run: GraphRun, one: Queued) -> None:
        # Times count from the last mark known: a device tells spans of time as float32.
        assert self._reached is not None
        before, before_s = self._reached
        start_s = before_s + one.start.seconds_since(before)
        end_s = start_s + one.end.seconds_since(one.start)
        self._reached = one.end, end_s
        run.record(one.task, start_s, end_s, one.num_bytes)

    def _work(self) -> None:
        stream = self._stream
        try:
            self._enter_lane(self._lane)
            if stream is not None:
                stream.enter()
        finally:
            self._ready.release()
        while (ticket := self._queue.get()) is not None:
            if stream is None:
                self._do(ticket)
            else:
                self._hand_over(ticket, stream)
            # What is done need not keep alive what came before it.
            ticket.waits = ()
            ticket.done.release()

    def _do(self, ticket: Ticket) -> None:
        run, task, ready_s = ticket.run, ticket.task, ticket.end_s
        for other in ticket.waits:
            latch = other.done
            latch.acquire()
            latch.release()
            if other.end_s > ready_s:  # noqa: PLR1730 - a call of max takes twice as long
                ready_s = other.end_s
            if other.mark is not None:
                try:
                    other.mark.synchronise()
                except BaseException as error:  # noqa: BLE001 - reported by the main thread
                    run.fail(other.task, error, perf_counter())
        # After a failure nothing is run any more, but every latch still opens in order.
        if not run.stopped:
            self._last = task
            run.waits.begin(ready_s)
            start_s = self._since_s = perf_counter()
            try:
                num_bytes = run.handlers[task.id.act](task)
            except BaseException as error:  # noqa: BLE001 - reported by the main thread
                self._since_s = None
                run.fail(task, error, start_s)
            else:
                origin_s = run.origin_s
                ticket.end_s, self._since_s = perf_counter(), None
                run.record(task, start_s - origin_s, ticket.end_s - origin_s, num_bytes)

    def _hand_over(self, ticket: Ticket, stream: AbstractStream) -> None:
        run, task = ticket.run, ticket.task
        for other in ticket.waits:
            wait_for(other.done)
        if run.stopped:
            return
        self._last = task
        queued_s = self._since_s = perf_counter()
        try:
            for other in ticket.waits:
                if other.mark is not None and other.task.lane is not self._lane:
                    stream.wait(other.mark)
            start = stream.mark()
            num_bytes = run.handlers[task.id.act](task)
            end = stream.mark()
        except BaseException as error:  # noqa: BLE001 - reported by the main thread
            self._since_s = None
            run.fail(task, error, queued_s)
            return
        self._since_s = None
        ticket.mark = end
        self.queued.append(Queued(task, queued_s, start, end, num_bytes))
        of_chunk = self._lane is Lane.GPU and task.id.phase is Phase.PREFILL
        ahead = QUEUED_LAYERS if of_chunk else QUEUED_TASKS
        self.settle(run, min(ahead, self._queued_tasks))
