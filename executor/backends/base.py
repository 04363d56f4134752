"""What every accelerator offers: memory at two levels, transfers between them, lane set-up."""

import mmap
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeVar, final

import torch

from executor.backends.streams import AbstractStream
from executor.model.kernels import AbstractKernels, CpuKernels
from executor.model.workspace import Workspace
from executor.native import kernels
from hrm.contract.pacing import Waits
from hrm.hardware import Link
from hrm.profiling import environment
from hrm.profiling.pinned import Told, nobody, touched
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

    `description` says in words what the run runs on. Where it `is_emulated`, its link is held to a pace that may be
    asked for; and where it `has_own_memory`, the GPU's level is a device's and not the host's, which a policy for two
    levels needs. `library_bytes` are what libraries hold of the GPU's memory beside all that is planned; the paces are
    those that an emulated link is held to.
    `streams` are of the lanes whose tasks are queued on a device, and `gpu_kernels` compute on the
    GPU's level. `waits` are what lanes sleep in where time is emulated. `told` is called with the bytes of every piece
    of the host's memory that `allocate` has touched or `pin` has pinned, see `telling`.
    """

    name: str
    description: str
    is_emulated: bool = False
    has_own_memory: bool = False
    library_bytes: int = 0
    h2d_bytes_per_s: float | None = None
    d2h_bytes_per_s: float | None = None
    streams: Mapping[Lane, AbstractStream] = MappingProxyType({})
    gpu_kernels: AbstractKernels = CpuKernels()
    waits: Waits | None = None
    told: Told = staticmethod(nobody)

    @abstractmethod
    def allocate(self, level: Device, num_bytes: int) -> torch.Tensor:
        """A flat uint8 tensor at that level; RunError if it would exceed the level's cap."""

    def allocate_host(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Memory of the host's for a run, of these sizes; zeros only where it was never used."""
        return [self.allocate(Device.CPU, size) for size in sizes]

    def kept_host_bytes(self) -> int:
        """How much of the host's memory is kept from a run before, for `allocate_host`."""
        return 0

    def check_room(self, num_bytes: int) -> None:  # noqa: B027 - the others have no more than they were given
        """Raise RunError if so much memory of the GPU's is not left; nothing is allocated."""

    def pin(self, memory: torch.Tensor) -> bool:  # noqa: ARG002
        """Let a device read and write memory of the host's by itself; just allocated, as a whole.

        Returns whether the system pins all of it; if not, it stays as it was.
        """
        return True

    def unpin(self, memory: torch.Tensor) -> None:  # noqa: B027 - there is no device
        """Undo `pin`; nothing may be using the memory."""

    @abstractmethod
    def transfer(self, lane: Lane, copies: Sequence[Copy]) -> int:
        """Copy every source to its target in the calling lane; returns the bytes moved.

        The copies count as one transfer on the link of that lane. In a lane with a stream they are
        queued there.
        """

    @abstractmethod
    def lane_threads(self, lane: Lane) -> int:
        """How many threads of torch's the work of a lane may use."""

    def workspace(self, *num_bytes: int) -> tuple[Workspace, ...]:
        """Workspaces on the GPU's level that are never in use at the same time."""
        memory = self.allocate(Device.GPU, max(num_bytes))
        return tuple(Workspace(memory[:size]) for size in num_bytes)

    def synchronise(self) -> None:  # noqa: B027 - the host has done its work when it returns
        """Return when all that was queued by the calling thread is done."""

    def ready(self) -> None:  # noqa: B027 - arenas are all that the others have
        """Called once all memory is allocated and filled, in the thread that did it."""

    def check_dtype(self, dtype: str) -> None:  # noqa: B027 - torch computes in all on a CPU
        """Raise RunError for a dtype that the accelerator does not compute in."""

    def is_of_device(self, error: BaseException) -> bool:  # noqa: ARG002
        """Whether an error may be of work that was queued before what raised it."""
        return False

    def peak_gpu_bytes(self) -> int | None:
        """The most that was ever allocated on the GPU; None where arenas are all there is."""
        return None

    @final
    @contextmanager
    def telling(self, told: Told) -> Generator[None]:
        """Within it, `told` is called while large memory is made ready."""
        self.told = told
        try:
            yield
        finally:
            self.told = nobody

    @final
    def enter_lane(self, lane: Lane) -> None:
        """Called once in the lane's own thread before its first task."""
        torch.set_num_threads(self.lane_threads(lane))
        torch.set_grad_enabled(False)


def copy_all(copies: Iterable[Copy], copy: Callable[[torch.Tensor, torch.Tensor], object] = torch.Tensor.copy_) -> int:
    """Copy every source to its target, by `copy(target, source)`; returns the bytes."""
    num_bytes = 0
    for target, source in copies:
        copy(target, source)
        num_bytes += source.nbytes
    return num_bytes


def stage(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy within the host's memory: a large page natively if the kernels are there."""
    native = kernels()
    if native is not None and native.takes_copy(target, source):
        native.copy(target, source)
    else:
        target.copy_(source)


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


def host_memory(num_bytes: int, told: Told = nobody) -> torch.Tensor:
    """A flat uint8 tensor of zeros, in the largest pages that the system has, all of which are there.

    A core reads through memory a tenth faster if it need not look up a page every 4 KiB.
    """
    if num_bytes < _LARGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return touched(torch.zeros(num_bytes, dtype=torch.uint8), told)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return touched(torch.frombuffer(memory, dtype=torch.uint8), told)


def usable_cores() -> int:
    """Cores that this process may keep busy, or fewer if torch was told so (OMP_NUM_THREADS)."""
    return min(environment.usable_cores(), torch.get_num_threads())
