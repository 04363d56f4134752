"""Walk a task graph in virtual time: each lane takes its tasks in order, as the executor does."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from hrm.shared_cores import Sequenced, SharedCores, times_of
from hrm.tasks import Lane, Task, TaskId
from hrm.trace import Span, Trace

_NUMBERS: Final = {lane: number for number, lane in enumerate(Lane)}


def simulate(
    tasks: Iterable[Task],
    seconds_of: Callable[[TaskId], float],
    hand_over_s: float = 0.0,
    shared: SharedCores | None = None,
) -> Trace:
    """Run every task as soon as its lane is free and all it waits for has ended.

    What another lane has done is known `hand_over_s` later. Tasks that compute at once on cores that are `shared` take
    longer. Returns the trace in order of issue, starting at 0 s.
    """
    if shared is not None:
        return _on_shared(list(tasks), seconds_of, hand_over_s, shared)
    free_s = dict.fromkeys(Lane, 0.0)
    end_s: dict[TaskId, float] = {}
    spans: list[Span] = []
    for task in tasks:
        start_s = free_s[task.lane]
        for other in task.after:
            if other.act.lane is not task.lane:
                start_s = max(start_s, end_s[other] + hand_over_s)
        end = start_s + seconds_of(task.id)
        end_s[task.id] = free_s[task.lane] = end
        spans.append(Span(task.id, start_s, end))
    return Trace(tuple(spans))


def _on_shared(
    tasks: Sequence[Task], seconds_of: Callable[[TaskId], float], hand_over_s: float, shared: SharedCores
) -> Trace:
    number_of = {task.id: number for number, task in enumerate(tasks)}
    sequenced = [
        Sequenced(
            _NUMBERS[task.lane],
            [number_of[other] for other in task.after if other.act.lane is not task.lane],
            seconds_of(task.id),
            shared.wanted_by(task.id.act),
        )
        for task in tasks
    ]
    times = zip(tasks, *times_of(sequenced, shared.cores, hand_over_s), strict=True)
    return Trace(tuple(Span(task.id, start_s, end_s) for task, start_s, end_s in times))


@dataclass(frozen=True, slots=True)
class Order:
    """A graph by positions, to be walked many times with other durations.

    Task i runs in lane `lanes[i]`, after the tasks of other lanes at `waits[i]`, for as long as the task
    `distinct[alike[i]]`. `layer_ends` are the positions of what comes last of each step and layer among the tasks that
    depend on the layer's FFN.
    """

    lanes: Sequence[int]
    waits: Sequence[Sequence[int]]
    alike: Sequence[int]
    distinct: Sequence[TaskId]
    layer_ends: Mapping[tuple[int, int], int]


def in_order(
    tasks: Iterable[tuple[TaskId, Sequence[int]]],
    alike: Callable[[TaskId], Hashable],
    *,
    until: tuple[int, int] | None = None,
    micro_batches: int = 0,
) -> Order:
    """The order of tasks, each with the positions of what it waits for in other lanes; if `alike`, they take as long.

    It ends when so many micro-batches have gone through the layer `until` which it is asked for, of a step: what comes
    later cannot delay them.
    """
    lanes: list[int] = []
    waits: list[Sequence[int]] = []
    classes: list[int] = []
    first_of: dict[Hashable, int] = {}
    distinct: list[TaskId] = []
    layer_ends: dict[tuple[int, int], int] = {}
    left = micro_batches
    for position, (task_id, waits_for) in enumerate(tasks):
        act = task_id.act
        waits.append(waits_for)
        lanes.append(_NUMBERS[act.lane])
        number = first_of.setdefault(alike(task_id), len(distinct))
        if number == len(distinct):
            distinct.append(task_id)
        classes.append(number)
        if act.by_ffn:
            where = task_id.step, task_id.layer
            layer_ends[where] = position
            if where == until:
                left -= 1
                if not left:
                    break
    return Order(lanes, waits, classes, distinct, layer_ends)


def end_times(
    order: Order, seconds: Sequence[float], hand_over_s: float = 0.0, shared: SharedCores | None = None
) -> list[float]:
    """When every task ends, as `simulate` has it; `seconds` are those of `order.distinct`."""
    if shared is not None:
        wanted = [shared.wanted_by(task_id.act) for task_id in order.distinct]
        tasks = [
            Sequenced(lane, waits, seconds[alike], wanted[alike])
            for lane, waits, alike in zip(order.lanes, order.waits, order.alike, strict=True)
        ]
        return times_of(tasks, shared.cores, hand_over_s)[1]
    free_s = [0.0] * len(Lane)
    end_s: list[float] = []
    for lane, waits, alike in zip(order.lanes, order.waits, order.alike, strict=True):
        end = free_s[lane]
        for other in waits:
            known_s = end_s[other] + hand_over_s
            if known_s > end:  # noqa: PLR1730 - a call of max takes twice as long
                end = known_s
        end += seconds[alike]
        free_s[lane] = end
        end_s.append(end)
    return end_s
