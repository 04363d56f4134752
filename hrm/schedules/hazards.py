"""What each task waits for, from what tasks read and write, whatever the order that they are issued in.

A task waits for who wrote what it reads, and before it overwrites a buffer for all who used what lies there. Tasks of a
lane run in turn, so only other lanes are waited for, and of those only what no other wait brings about already: edges
are transitively reduced.
"""

from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Any

from hrm.schedules.pipeline import Pipeline
from hrm.tasks import Lane, Task, TaskId, Touch

_NUMBER_OF = {lane: number for number, lane in enumerate(Lane)}
# A task as later ones see it: its position, lane and name, and the last position of each lane that ends before
# it does.
_Issued = list[Any]


class _Slot:
    """Who wrote the pieces of the version in a slot, and who in each lane was the last to use it and the one before."""

    __slots__ = ("users", "users_before", "version", "writers")

    def __init__(self, version: int) -> None:
        self.version = version
        self.writers: dict[int, _Issued] = {}
        self.users: dict[int, _Issued] = {}
        self.users_before: dict[int, _Issued] = {}

    def turn_to(self, version: int) -> None:
        assert version > self.version, "a slot holds one version at a time"
        self.version = version
        self.users_before = self.users
        self.writers, self.users = {}, {}


def with_waits(pipeline: Pipeline, order: Iterable[TaskId]) -> Iterator[Task]:
    """The tasks of an order with what each waits for, one by one: a long job never holds them all."""
    ended_in = [[-1] * len(Lane) for _ in Lane]  # of each lane after its last task
    for issued, touch, before in _issued(pipeline, order):
        lane: int
        position, lane, task_id, _ = issued
        ended = ended_in[lane]
        after: list[TaskId] = []
        if len(before) > 1:
            before.sort(key=itemgetter(0), reverse=True)  # the last one first: it may have waited for the others
        for other_position, other_lane, other_id, ended_there in before:
            if other_lane != lane and ended[other_lane] < other_position:
                after.append(other_id)
                ended = list(map(max, ended, ended_there))
        ended_in[lane] = issued[3] = ended = ended.copy()
        ended[lane] = position
        yield Task(task_id, tuple(after), touch)


def with_positions(pipeline: Pipeline, order: Iterable[TaskId]) -> Iterator[tuple[TaskId, tuple[int, ...]]]:
    """The tasks of an order with the positions of what each waits for, one by one.

    Quicker than `with_waits`, as waits that others bring about already are among them.
    """
    for issued, _, before in _issued(pipeline, order):
        lane = issued[1]
        yield issued[2], tuple([other[0] for other in before if other[1] != lane])


def _issued(pipeline: Pipeline, order: Iterable[TaskId]) -> Iterator[tuple[_Issued, Touch, list[_Issued]]]:
    """Every task with what it touches and those that must end before it, some of them more than once."""
    slots: dict[object, _Slot] = {}
    for position, task_id in enumerate(order):
        act = task_id.act
        lane = _NUMBER_OF[act.lane]
        issued: _Issued = [position, lane, task_id, None]
        touch = act.touches(pipeline, task_id)
        before: list[_Issued] = []
        for buffer, at, version, piece in touch[0]:
            slot = slots.get((buffer, at))
            if slot is None:
                slot = slots[buffer, at] = _Slot(version)
            elif slot.version != version:
                slot.turn_to(version)
            elif (writer := slot.writers.get(piece)) is not None:
                before.append(writer)
            slot.users[lane] = issued
        for buffer, at, version, piece in touch[1]:
            slot = slots.get((buffer, at))
            if slot is None:
                slot = slots[buffer, at] = _Slot(version)
            elif slot.version != version:
                slot.turn_to(version)
            if slot.users_before and not buffer.grows:
                before += slot.users_before.values()
            slot.writers[piece] = slot.users[lane] = issued
        yield issued, touch, before
