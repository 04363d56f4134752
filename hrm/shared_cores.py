"""Lanes whose threads share cores: tasks that compute at once each go on at their share of them."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from math import inf
from typing import NamedTuple, final

from hrm.tasks import Act, Lane


class SharedCores(NamedTuple):
    """So many cores, and the threads of each lane, each of which keeps one busy while a task of the lane computes.

    Where tasks under way want more than there are, all of them take as many times longer as that is more: a thread
    gets as much of a core as any other.
    """

    cores: float
    threads: Mapping[Lane, float]

    def wanted_by(self, act: Act) -> float:
        """Cores that a task of the act keeps busy where it has all that it wants; 0 if it does not compute."""
        return self.threads[act.lane] if act.computes else 0.0


class Sequenced(NamedTuple):
    """A task by numbers: of its lane, and of the tasks of other lanes that it waits for, all listed before it.

    It takes so many seconds where it has all the cores that it wants.
    """

    lane: int
    waits: Sequence[int]
    seconds: float
    wanted: float


def times_of(tasks: Sequence[Sequenced], cores: float, hand_over_s: float = 0.0) -> tuple[list[float], list[float]]:
    """When each task starts and when it ends; what another lane has done is known `hand_over_s` later."""
    walk = _Walk(tasks, cores, hand_over_s)
    while walk.begin():
        walk.go_on()
    return walk.start_s, walk.end_s


@final
class _Walk:
    """Goes from one start or end of a task that wants cores to the next; when others end is known as they start."""

    def __init__(self, tasks: Sequence[Sequenced], cores: float, hand_over_s: float) -> None:
        self._tasks, self._cores, self._hand_over_s = tasks, cores, hand_over_s
        self.start_s, self.end_s = [inf] * len(tasks), [inf] * len(tasks)
        self._left_s = [task.seconds for task in tasks]
        self._now_s = 0.0
        self._queues: dict[int, deque[int]] = {task.lane: deque() for task in tasks}
        self._free_s = dict.fromkeys(self._queues, 0.0)
        self._computing: dict[int, int] = {}  # by lane, the task that wants cores and is under way, or will start
        for number, task in enumerate(tasks):
            self._queues[task.lane].append(number)

    def begin(self) -> bool:
        """Find when tasks start, as far as that is certain; whether any is left to compute."""
        began = list(self._queues)
        while began:
            began = [lane for lane in self._queues if lane not in self._computing and self._begin_in(lane)]
        return bool(self._computing)

    def _begin_in(self, lane: int) -> bool:
        """The same in a lane; whether anything became certain."""
        queue, began = self._queues[lane], False
        while queue and (start_s := self._ready_s(queue[0])) < inf:
            number, began = queue.popleft(), True
            self.start_s[number] = start_s
            if self._tasks[number].wanted:
                self._computing[lane] = number
                break
            self.end_s[number] = self._free_s[lane] = start_s + self._tasks[number].seconds
        return began

    def _ready_s(self, number: int) -> float:
        """When the next task of its lane can start; endless if that is not certain yet."""
        ready_s = self._free_s[self._tasks[number].lane]
        for other in self._tasks[number].waits:
            ready_s = max(ready_s, self.end_s[other] + self._hand_over_s)
        return ready_s

    def go_on(self) -> None:
        """Up to when the next one starts that wants cores, or the first of those under way ends."""
        under_way = {lane: number for lane, number in self._computing.items() if self.start_s[number] <= self._now_s}
        slower = max(1.0, sum(self._tasks[number].wanted for number in under_way.values()) / self._cores)
        least_s = min((self._left_s[number] for number in under_way.values()), default=inf)
        ends_s = self._now_s + slower * least_s
        next_s = min(self._starts_to_come(), default=inf)
        if next_s < ends_s:
            for number in under_way.values():
                self._left_s[number] -= (next_s - self._now_s) / slower
            self._now_s = next_s
            return
        for lane, number in under_way.items():
            self._left_s[number] -= least_s
            if not self._left_s[number]:
                self.end_s[number] = self._free_s[lane] = ends_s
                del self._computing[lane]
        self._now_s = ends_s

    def _starts_to_come(self) -> Iterator[float]:
        return (start_s for number in self._computing.values() if (start_s := self.start_s[number]) > self._now_s)
