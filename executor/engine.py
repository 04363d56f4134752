"""The engine: one loop that runs any task graph, blind to what its tasks do.

Tasks go to one worker per lane in the order they are issued; a task starts when its lane is free
and all that it waits for has ended. The order is topological, so this cannot deadlock.
"""

import gc
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from time import perf_counter, sleep
from typing import Final, Self, final

from executor.backends.streams import AbstractStream
from executor.errors import RunError
from executor.lanes import QUEUED_TASKS, GraphRun, Handler, LaneWorker, Queued, Recorder, Ticket, wait_for
from hrm.contract.pacing import Waits
from hrm.run_record import KindTotal
from hrm.tasks import Act, Lane, Task, TaskId
from hrm.trace import Span, Trace, lane_chart

MOST_PENDING: Final = 1024  # tasks that are submitted before the oldest of them has ended
BURST: Final = 16  # of them that are submitted at a time: lanes need the interpreter's lock too
_BREATH_S: Final = 1e-6  # between bursts; any sleep, however short, lets the others go first
SYNCHRONISE: Final = "EXECUTOR_SYNCHRONISE"


class TaskFailedError(RunError):
    """A task raised; `chart` draws the lanes up to then with the task marked.

    `may_be_later` counts the tasks queued after it on a device that may have failed instead.
    """

    def __init__(self, task: Task, error: BaseException, chart: str, *, may_be_later: int = 0) -> None:
        self.task, self.error, self.chart, self.may_be_later = task, error, chart, may_be_later
        rule, remedy = "failed and stopped the run", "see the lane chart"
        if may_be_later:
            rule = f"or one of {may_be_later} tasks queued after it failed and stopped the run"
            remedy = f"set {SYNCHRONISE}=1 to have the one named"
        super().__init__(
            f"task {task.id} ({task.id.act.name}) in lane {task.lane}",
            f"<{type(error).__name__}: {error}>",
            rule,
            f"{remedy}; what was finished before is kept",
        )


@dataclass(frozen=True, slots=True)
class PhaseResult:
    """What one run of a graph did: kept spans, exact totals per kind and lane, and its length.

    `moved_bytes` are those of each lane that moved any, and `step_s` what each step took, steps in
    which nothing was left to do included.
    """

    spans: tuple[Span, ...]
    spans_left_out: int
    start_s: float
    end_s: float
    by_kind: dict[str, KindTotal]
    busy_s: dict[Lane, float]
    moved_bytes: dict[Lane, int]
    step_s: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Wall-clock length."""
        return self.end_s - self.start_s


@final
class Engine:
    """Runs graphs, one at a time, on a worker thread per lane; a context manager.

    `seconds` in all spans count from `origin_s`, when the engine was made. Lanes that have a stream
    queue their tasks there; with EXECUTOR_SYNCHRONISE=1 in the environment they wait for each, so
    that an error is known to be of the task that it comes out in. `is_of_device` tells the errors
    that come out late from those of the task under way. `waits` are what handlers sleep in: they
    are called off when a run is cut short.
    """

    def __init__(
        self,
        enter_lane: Callable[[Lane], None],
        streams: Mapping[Lane, AbstractStream] | None = None,
        is_of_device: Callable[[BaseException], bool] = lambda _: False,
        waits: Waits | None = None,
    ) -> None:
        self._enter_lane, self._streams, self._is_of_device = enter_lane, streams or {}, is_of_device
        self.waits = waits or Waits()
        self._queued_tasks = 0 if os.environ.get(SYNCHRONISE, "0") != "0" else QUEUED_TASKS
        self._workers: dict[Lane, LaneWorker] = {}
        self._recorders: dict[Lane, Recorder] = {}
        self._past_busy_s = dict.fromkeys(Lane, 0.0)
        self._start_s = 0.0
        self.origin_s = perf_counter()

    def __enter__(self) -> Self:
        """Start the lanes; those that compute come last: torch's settings follow the last.

        What is there by now, modules for the most part, is kept out of garbage collection until
        the lanes end: going through it would stop all of them for a tenth of a second.
        """
        for lane in sorted(Lane, key=lambda lane: lane.computes):
            self._workers[lane] = LaneWorker(lane, self._enter_lane, self._streams.get(lane), self._queued_tasks)
        gc.collect(1)
        gc.freeze()
        return self

    def __exit__(self, *exception: object) -> None:
        """End every lane's thread."""
        gc.unfreeze()
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    @property
    def busy_s(self) -> dict[Lane, float]:
        """Seconds each lane has been at work in the current run, in tasks that have ended."""
        return {
            lane: sum(total.seconds for total in tuple(recorder.totals.values()))
            for lane, recorder in self._recorders.items()
        }

    @property
    def busy_now_s(self) -> dict[Lane, float]:
        """Seconds each lane has been at work in all runs, the task under way included.

        For live displays, from any thread.
        """
        workers, run_s = dict(self._workers), self.busy_s
        return {
            lane: past_s + run_s.get(lane, 0.0) + (workers[lane].under_way_s if lane in workers else 0.0)
            for lane, past_s in self._past_busy_s.items()
        }

    @property
    def under_way(self) -> tuple[Task, ...]:
        """The tasks that lanes are at, for whoever looks from another thread."""
        tasks = (worker.under_way for worker in tuple(self._workers.values()))
        return tuple(task for task in tasks if task is not None)

    @property
    def seconds(self) -> float:
        """Since the current run began."""
        return perf_counter() - self.origin_s - self._start_s

    def count(self, act: Act) -> int:
        """Tasks of that act's name that have ended in the current run."""
        recorders = tuple(self._recorders.values())
        return sum(recorder.totals[act.name].count for recorder in recorders if act.name in recorder.totals)

    def run(
        self,
        tasks: Iterable[Task],
        handlers: Mapping[Act, Handler],
        *,
        batch: int = 0,
        kept_steps: int = 2**62,
        finished: Callable[[], bool] = lambda: False,
    ) -> PhaseResult:
        """Run a graph to its end, or until `finished()` says that the rest would do nothing.

        Keeps the spans of the first `kept_steps` steps. Raises TaskFailedError if a task raises;
        no lane is at work any more when this returns or raises.
        """
        for lane, busy_s in self.busy_s.items():
            self._past_busy_s[lane] += busy_s
        self._recorders = {lane: Recorder(lane) for lane in Lane}
        self.waits.resume()
        run = GraphRun(handlers, self.origin_s, batch, kept_steps, self._recorders, self.waits)
        for worker in self._workers.values():
            worker.start_clock(self.origin_s)
        self._start_s = perf_counter() - self.origin_s
        pending: deque[Ticket] = deque()
        try:
            self._feed(tasks, run, pending, finished)
            self._drain(run, pending)
        except BaseException:  # Ctrl-C, or an error of the graph's own
            run.stop()
            self._drain(run, pending)
            raise
        if run.failure is not None:
            raise self._task_failed(run) from run.failure.error
        return self.result()

    def _task_failed(self, run: GraphRun) -> TaskFailedError:
        """The failure with its chart; a device's error is that of the first task not known done."""
        failure = run.failure
        assert failure is not None
        task, span, later = failure.task, failure.span, 0
        queued = [worker.queued for worker in self._workers.values() if worker.queued]
        if self._is_of_device(failure.error) and queued:
            # Kernels fail, copies hardly ever do.
            first = min((of_lane[0] for of_lane in queued), key=_is_no_kernel)
            task, start_s = first.task, first.queued_s - self.origin_s
            later = sum(map(len, queued)) if self._queued_tasks else 0
            span = Span(task.id, start_s, span.end_s)
        recent = [span for recorder in self._recorders.values() for span in recorder.recent]
        chart = failure_chart(recent, span)
        return TaskFailedError(task, failure.error, chart, may_be_later=later)

    def _feed(self, tasks: Iterable[Task], run: GraphRun, pending: deque[Ticket], finished: Callable[[], bool]) -> None:
        tickets: dict[TaskId, Ticket] = {}  # of tasks that may not have ended
        for number, task in enumerate(tasks):
            if number % BURST == 0:
                if len(pending) >= MOST_PENDING:
                    self._forget_oldest(run, pending, tickets)
                sleep(_BREATH_S)
            if run.stopped or finished():
                break
            waits = tuple(tickets[other] for other in task.after if other in tickets)
            ticket = tickets[task.id] = Ticket(run, task, waits)
            # Submitted before it is listed: Ctrl-C in between must not leave a latch to wait for
            # that no lane will open.
            self._workers[task.lane].submit(ticket)
            pending.append(ticket)

    @staticmethod
    def _forget_oldest(run: GraphRun, pending: deque[Ticket], tickets: dict[TaskId, Ticket]) -> None:
        """Return when nothing has to wait for any of the oldest burst any more."""
        for ticket in _wait_for_oldest(pending):
            if ticket.mark is not None:
                queued_s = perf_counter()
                try:
                    ticket.mark.synchronise()
                except RuntimeError as error:  # a device's
                    run.fail(ticket.task, error, queued_s)
            del tickets[ticket.task.id]

    def _drain(self, run: GraphRun, pending: deque[Ticket]) -> None:
        while pending:
            _wait_for_oldest(pending)
        for worker in self._workers.values():
            worker.settle(run)

    def result(self) -> PhaseResult:
        """What the last run did, also if it was cut short."""
        end_s = perf_counter() - self.origin_s
        by_kind: dict[str, KindTotal] = {}
        for recorder in self._recorders.values():
            add_totals(by_kind, dict(recorder.totals))
        spans = [span for recorder in self._recorders.values() for span in recorder.spans]
        return PhaseResult(
            tuple(sorted(spans, key=lambda span: span.start_s)),
            sum(recorder.spans_left_out for recorder in self._recorders.values()),
            self._start_s,
            end_s,
            by_kind,
            {lane: busy_s for lane, busy_s in self.busy_s.items() if busy_s > 0},
            self._moved_bytes(),
            self._step_s(),
        )

    def _moved_bytes(self) -> dict[Lane, int]:
        moved = {
            lane: sum(total.num_bytes for total in recorder.totals.values())
            for lane, recorder in self._recorders.items()
        }
        return {lane: num_bytes for lane, num_bytes in moved.items() if num_bytes}

    def _step_s(self) -> tuple[float, ...]:
        """A step ends with its last task on the GPU, which chooses tokens."""
        ends_s = self._recorders[Lane.GPU].step_end_s.values()
        return tuple(end - start for start, end in pairwise([self._start_s, *ends_s]))


def _wait_for_oldest(pending: deque[Ticket]) -> list[Ticket]:
    """Take the oldest burst off the list when all of it has passed through its lanes."""
    oldest = list(islice(pending, BURST))
    # The last first: most others are through by then, and do not wake this thread one by one.
    for ticket in reversed(oldest):
        wait_for(ticket.done)
    for _ in oldest:  # only now: Ctrl-C while waiting must leave them to be waited for
        pending.popleft()
    return oldest


def _is_no_kernel(queued: Queued) -> tuple[bool, float]:
    return queued.task.lane is not Lane.GPU, queued.queued_s


def add_totals(into: dict[str, KindTotal], more: Mapping[str, KindTotal]) -> None:
    """Add totals per kind to others."""
    for kind, total in more.items():
        into.setdefault(kind, KindTotal()).add(total)


def in_turns_of(result: PhaseResult, turns: int) -> PhaseResult:
    """A run whose steps were taken in turns, as one of steps that each take all turns."""
    if turns == 1:
        return result
    step_s = result.step_s
    return replace(result, step_s=tuple(sum(step_s[first : first + turns]) for first in range(0, len(step_s), turns)))


def joined(results: Sequence[PhaseResult]) -> PhaseResult:
    """Runs that followed one another, as one of one step."""
    if len(results) == 1:
        return results[0]
    by_kind: dict[str, KindTotal] = {}
    for result in results:
        add_totals(by_kind, result.by_kind)
    lanes = dict.fromkeys(lane for result in results for lane in result.busy_s)
    moving = dict.fromkeys(lane for result in results for lane in result.moved_bytes)
    start_s, end_s = results[0].start_s, results[-1].end_s
    return PhaseResult(
        tuple(span for result in results for span in result.spans),
        sum(result.spans_left_out for result in results),
        start_s,
        end_s,
        by_kind,
        {lane: sum(result.busy_s.get(lane, 0.0) for result in results) for lane in lanes},
        {lane: sum(result.moved_bytes.get(lane, 0) for result in results) for lane in moving},
        (end_s - start_s,),
    )


def failure_chart(recent: Iterable[Span], failed: Span) -> str:
    """The lanes just before a failure as text, the failed task marked by `!` and named below."""
    spans = [*sorted(recent, key=lambda span: span.start_s), failed]
    last_s = max(span.end_s for span in spans)
    width = 72
    chart = lane_chart(Trace(tuple(spans)), width=width)
    lines: list[str] = []
    for line in chart.splitlines():
        lane, bar, cells = line.partition("│")
        if bar and lane.strip() == failed.lane.value:
            first_s = min(span.start_s for span in spans)
            cell_s = max((last_s - first_s) / width, 1e-12)
            first = min(int((failed.start_s - first_s) / cell_s), width - 1)
            last = max(min(int((failed.end_s - first_s) / cell_s), width), first + 1)
            line = lane + bar + cells[:first] + "!" * (last - first) + cells[last:]  # noqa: PLW2901
        lines.append(line)
    return "\n".join([*lines, f"      ! is {failed.id}, which failed in lane {failed.lane}"])
