"""Walk a task graph in virtual time: each lane takes its tasks in order, as the executor does."""

from collections.abc import Callable, Iterable

from hrm.tasks import Lane, Phase, Task, TaskId
from hrm.trace import Span, Trace


def simulate(
    tasks: Iterable[Task],
    seconds_of: Callable[[TaskId], float],
    *,
    phase: Phase = Phase.DECODE,
    bytes_of: Callable[[TaskId], int] = lambda _: 0,
) -> Trace:
    """Run every task as soon as its lane is free and all it waits for has ended.

    Returns the trace in order of issue, starting at 0 s.
    """
    free_s = dict.fromkeys(Lane, 0.0)
    end_s: dict[TaskId, float] = {}
    spans: list[Span] = []
    for task in tasks:
        start_s = free_s[task.lane]
        for other in task.after:
            start_s = max(start_s, end_s[other])
        end = start_s + seconds_of(task.id)
        end_s[task.id] = free_s[task.lane] = end
        spans.append(Span(task.id, task.lane, start_s, end, phase, 0, bytes_of(task.id)))
    return Trace(tuple(spans))
