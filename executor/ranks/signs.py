"""What ranks tell of themselves beside their work, in the store where they met: that they live, and why they end."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import msgspec
from torch.distributed.distributed_c10d import Store

from executor.engine import TaskFailedError
from executor.errors import RunError
from executor.generate import AbstractGenerator
from executor.group import LostRankError
from executor.guard import in_a_line
from hrm.acts import waits_for_ranks
from hrm.errors import HrmError

PULSE_S: Final = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Farewell:
    """Why a rank ends, as it says itself; `lost` if that is only because another did.

    A `chart` of its lanes is there if it was at work, and an empty one if the mistake is none of the user's.
    """

    where: str
    value: str
    rule: str
    remedy: str
    chart: str | None = None
    lost: bool = False

    @staticmethod
    def of(error: BaseException) -> "Farewell":
        """What an error says."""
        cause = error.error if isinstance(error, TaskFailedError) else error
        lost = isinstance(cause, LostRankError)
        if isinstance(error, HrmError):
            chart = error.chart if isinstance(error, TaskFailedError) else None
            value = error.value if isinstance(error.value, str) else repr(error.value)
            return Farewell(
                where=error.where, value=value, rule=error.rule, remedy=error.remedy, chart=chart, lost=lost
            )
        return Farewell(
            where="its work",
            value=f"<{in_a_line(error)}>",
            rule="failed and stopped the run",
            remedy="use --resume; what was finished before is kept",
            chart="",
        )


class RankFailedError(RunError):
    """A rank ended before its time; a `chart` of its lanes, or of rank 0's, is there if they were at work."""

    def __init__(self, rank: int, farewell: Farewell) -> None:
        self.rank, self.farewell, self.chart = rank, farewell, farewell.chart
        super().__init__(f"rank {rank}: {farewell.where}", farewell.value, farewell.rule, farewell.remedy)


class Pulse(msgspec.Struct, kw_only=True):
    """A sign of life: its number, the tasks that the rank is at, and whether it waits for others in one of them.

    In tasks that `works` tells it waits for nobody. Until then it has used the CPU for `cpu_s`, which is 0 if a GPU
    computes.
    """

    number: int = 0
    tasks: tuple[str, ...] = ()
    waits: bool = False
    works: tuple[str, ...] = ()
    cpu_s: float = 0.0

    @staticmethod
    def of(number: int, generator: AbstractGenerator | None) -> "Pulse":
        """The sign of a rank that has such a generator, or none yet."""
        if generator is None:
            return Pulse(number=number)
        texts, works = list[str](), list[str]()
        for task in generator.engine.under_way:
            act = task.id.act
            texts.append(f"task {task.id} ({act.name}) in lane {task.lane}")
            if not waits_for_ranks(act, in_pipeline=True):
                works.append(texts[-1])
        return Pulse(
            number=number,
            tasks=tuple(texts),
            waits=len(works) < len(texts),
            works=tuple(works),
            cpu_s=0.0 if generator.backend.has_own_memory else time.process_time(),
        )


def keep_telling(store: Store, rank: int, generator: Callable[[], AbstractGenerator | None]) -> None:
    """Give signs of life from now on, in a thread that ends with the process; the store is nobody else's."""

    def tell() -> None:
        number = 0
        with suppress(RuntimeError):  # rank 0 is gone, and the rest of this rank will see it
            while True:
                store.set(_pulse_key(rank), msgspec.json.encode(Pulse.of(number, generator())).decode())
                number += 1
                time.sleep(PULSE_S)

    threading.Thread(target=tell, name="pulse", daemon=True).start()


def pulse_of(store: Store, rank: int) -> Pulse | None:
    """The last sign of life of a rank; None before its first."""
    key = _pulse_key(rank)
    return msgspec.json.decode(store.get(key), type=Pulse) if store.check([key]) else None


def say_farewell(store: Store, rank: int, error: BaseException) -> None:
    """Say why this rank ends."""
    with suppress(RuntimeError):
        store.set(_farewell_key(rank), msgspec.json.encode(Farewell.of(error)).decode())


def farewell_of(store: Store, rank: int) -> Farewell | None:
    """What a rank has said when it ended; None if it has said nothing."""
    key = _farewell_key(rank)
    return msgspec.json.decode(store.get(key), type=Farewell) if store.check([key]) else None


def _pulse_key(rank: int) -> str:
    return f"pulse of rank {rank}"


def _farewell_key(rank: int) -> str:
    return f"farewell of rank {rank}"
