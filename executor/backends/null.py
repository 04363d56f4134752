"""No maths, no memory: for runs of the real loop that take the predicted time."""

import os
import time
from collections.abc import Callable, Sequence
from typing import Final, final

import torch

from executor.backends.base import AbstractBackend, Copy
from hrm.acts import ACTS
from hrm.contract.pacing import Waits
from hrm.tasks import Act, Device, Lane, Task, TaskId

_SPIN_S: Final = 100e-6  # the end of a wait is spun through: sleeping is not that precise
_give_way = getattr(os, "sched_yield", lambda: time.sleep(0))  # Linux sleeps 50 us at the least
_MAX_CREDIT_S: Final = 5e-3


@final
class NullBackend(AbstractBackend):
    """Has nothing and moves nothing; its handlers sleep."""

    def __init__(self) -> None:
        self.name = "null"
        self.description = "null: every task sleeps for its predicted time"
        self.waits = Waits()

    def allocate(self, level: Device, num_bytes: int) -> torch.Tensor:  # noqa: ARG002
        """A tensor without memory behind it."""
        return torch.empty(num_bytes, dtype=torch.uint8, device="meta")

    def transfer(self, lane: Lane, copies: Sequence[Copy]) -> int:  # noqa: ARG002
        """Move nothing; returns the bytes that would have moved."""
        return sum(source.nbytes for _, source in copies)

    def lane_threads(self, lane: Lane) -> int:  # noqa: ARG002
        """One: sleeping needs no more."""
        return 1


def null_handlers(
    seconds_of: Callable[[TaskId], float], sleep_for: Callable[[float], object] = time.sleep
) -> dict[Act, Callable[[Task], int]]:
    """Handlers that sleep for `seconds_of(task)`, precise on average over each lane's tasks."""
    paces = {lane: Pace(sleep_for) for lane in Lane}

    def sleep(task: Task) -> int:
        start_s = time.perf_counter()
        paces[task.lane].wait(start_s, seconds_of(task.id))
        return 0

    return {act: sleep for acts in ACTS.values() for act in acts}


@final
class Pace:
    """Makes waits last as long as they should on average.

    A wait that overshoots shortens the next ones by as much, so that many of them
    take as long as they should although no single one is precise.
    """

    def __init__(self, sleep: Callable[[float], object] = time.sleep) -> None:
        self._sleep = sleep
        self._credit_s = 0.0

    def wait(self, start_s: float, seconds: float) -> None:
        """Return when `seconds` have passed since `start_s` of time.perf_counter."""
        end_s = start_s + seconds - self._credit_s
        wait_until(end_s, self._sleep)
        late_s = time.perf_counter() - end_s
        self._credit_s = min(max(late_s, 0.0), _MAX_CREDIT_S)


def wait_until(end_s: float, sleep: Callable[[float], object] = time.sleep) -> None:
    """Return at `end_s` of time.perf_counter: sleep the bulk, then spin, giving way to others."""
    remaining_s = end_s - time.perf_counter()
    if remaining_s > _SPIN_S:
        sleep(remaining_s - _SPIN_S)
    while time.perf_counter() < end_s:
        _give_way()
