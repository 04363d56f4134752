"""What each task waits for, from what tasks read and write, whatever the order that they are issued in.

A task waits for who wrote what it reads, and before it overwrites a buffer for all who used what lies there. Tasks of a
lane run in turn, so only other lanes are waited for, and of those only what no other wait brings about already: edges
are transitively reduced.
"""

from collections.abc import Iterable, Iterator

from hrm.schedules.pipeline import Pipeline
from hrm.tasks import Lane, Task, TaskId

_NUMBER_OF = {lane: number for number, lane in enumerate(Lane)}
# A task as later ones see it: its position, lane, name, and of every lane the last position that has ended when it has.
_Issued = tuple[int, int, TaskId, tuple[int, ...]]


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
    slots: dict[object, _Slot] = {}
    ended_in = [(-1,) * len(Lane) for _ in Lane]  # of each lane after its last task
    for position, task_id in enumerate(order):
        act = task_id.act
        lane = _NUMBER_OF[act.lane]
        touch = act.touches(pipeline, task_id)
        before: list[_Issued] = []
        used: list[_Slot] = []
        for buffer, at, version, piece in touch[0]:
            slot = slots.get((buffer, at))
            if slot is None:
                slot = slots[buffer, at] = _Slot(version)
            elif slot.version != version:
                slot.turn_to(version)
            writer = slot.writers.get(piece)
            if writer is not None and writer[1] != lane:
                before.append(writer)
            used.append(slot)
        written: list[tuple[_Slot, int]] = []
        for buffer, at, version, piece in touch[1]:
            slot = slots.get((buffer, at))
            if slot is None:
                slot = slots[buffer, at] = _Slot(version)
            elif slot.version != version:
                slot.turn_to(version)
            if not buffer.grows:
                before += slot.users_before.values()
            written.append((slot, piece))
        after, ended = _least(before, ended_in[lane], lane) if before else ((), ended_in[lane])
        ended_in[lane] = ended = (*ended[:lane], position, *ended[lane + 1 :])
        issued = (position, lane, task_id, ended)
        for slot in used:
            slot.users[lane] = issued
        for slot, piece in written:
            slot.writers[piece] = slot.users[lane] = issued
        yield Task(task_id, after, touch)


def _least(before: list[_Issued], ended: tuple[int, ...], lane: int) -> tuple[tuple[TaskId, ...], tuple[int, ...]]:
    """Which of the tasks before have to be waited for, the others follow from that; and what has ended then."""
    after: list[TaskId] = []
    if len(before) > 1:
        before.sort(reverse=True)  # the last one first: it may have waited for the others
    for position, other_lane, task_id, ended_there in before:
        if other_lane != lane and ended[other_lane] < position:
            after.append(task_id)
            ended = tuple(map(max, ended, ended_there))
    return tuple(after), ended
