"""What every accelerator offers: memory at two levels, transfers between them, lane set-up."""

import mmap
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, TypeVar, final

import torch

from hrm.hardware import Link
from hrm.profiling import environment
from hrm.tasks import Device, Lane
from hrm.units import MIB

_LARGE_BYTES: Final = 4 * MIB  # below, large pages would waste more than they speed up

T = TypeVar("T")
Copy = tuple[torch.Tensor, torch.Tensor]  # target, source


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulatedMachine:
    """The accelerator that is emulated: how much memory it has and how fast its links are."""

    gpu_memory_bytes: int
    h2d: Link
    d2h: Link


class AbstractBackend(ABC):
    """Memory, transfers and threads of one accelerator; implementations are final.

    `description` says in words what the run runs on; the paces are those that an emulated link
    is held to.
    """

    name: str
    description: str
    h2d_bytes_per_s: float | None = None
    d2h_bytes_per_s: float | None = None

    @abstractmethod
    def allocate(self, level: Device, num_bytes: int) -> torch.Tensor:
        """A flat uint8 tensor at that level; RunError if it would exceed the level's cap.

        All of a level's memory is one such arena, everything else is a view of it.
        """

    @abstractmethod
    def transfer(self, lane: Lane, copies: Sequence[Copy]) -> int:
        """Copy every source to its target in the calling lane; returns the bytes moved.

        The copies count as one transfer on the link of that lane.
        """

    @abstractmethod
    def lane_threads(self, lane: Lane) -> int:
        """How many threads of torch's the work of a lane may use."""

    @final
    def enter_lane(self, lane: Lane) -> None:
        """Called once in the lane's own thread before its first task."""
        torch.set_num_threads(self.lane_threads(lane))
        torch.set_grad_enabled(False)


def copy_all(copies: Iterable[Copy]) -> int:
    """Copy every source to its target; returns the bytes."""
    num_bytes = 0
    for target, source in copies:
        target.copy_(source)
        num_bytes += source.nbytes
    return num_bytes


def in_thread_of_its_own(work: Callable[[], T]) -> T:
    """What `work` returns or raises, done in a thread that ends with it.

    OpenMP keeps a team of threads for every thread that ever computed in parallel, and once the
    teams together have more threads than there are cores, GNU's puts all that wait to sleep at
    once: each operator of every lane then pays for waking them. So what computes beside the lanes,
    say while weights are loaded, leaves no team behind.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            done.set_exception(error)

    # A daemon: Ctrl-C in the caller's thread must not wait until, say, all weights are read.
    thread = threading.Thread(target=run, name="apart", daemon=True)
    thread.start()
    thread.join()
    return done.result()


def host_memory(num_bytes: int) -> torch.Tensor:
    """A flat uint8 tensor of zeros, in the largest pages that the system has.

    A core reads through memory a tenth faster if it need not look up a page every 4 KiB.
    """
    if num_bytes < _LARGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(num_bytes, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def usable_cores() -> int:
    """Cores that this process may keep busy, or fewer if torch was told so (OMP_NUM_THREADS)."""
    return min(environment.usable_cores(), torch.get_num_threads())
