"""CUDA: one stream a lane, events for marks, pinned arenas for what crosses the link.

The lanes GPU, H2D and D2H queue their work on streams of their own, CPU and STAGE are threads. No
memory is handed to another stream by the allocator: all that streams share lies in arenas, whose
reuse follows from the task graph's own edges. Only the GPU's lane allocates, and what it allocates
are temporaries in memory that was reserved for it.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final, final

import torch

from executor.backends.base import AbstractBackend, Copy, copy_all, in_thread_of_its_own, stage, usable_cores
from executor.backends.streams import AbstractMark, AbstractStream
from executor.errors import RunError
from executor.model.gpu import GpuKernels, grouped_gemm
from executor.model.workspace import Workspace
from hrm.contract.lane_threads import lane_threads
from hrm.contract.launches import GROUPED_CAPABILITIES
from hrm.contract.libraries import settle_libraries
from hrm.profiling.pinned import CudaRegistrar, PinnableMemory, kept_bytes
from hrm.tasks import Device, Lane
from hrm.units import format_bytes

FLASH_CAPABILITY: Final = (8, 0)


@final
class CudaMark(AbstractMark):
    """An event that tells the time; who waits for it sleeps.

    Threads that wait have no device of their own: without one, the runtime makes a context on the first.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._device = stream.device
        self.event = torch.cuda.Event(enable_timing=True, blocking=True)
        self.event.record(stream)

    def synchronise(self) -> None:
        """The interpreter's lock is free meanwhile."""
        with torch.cuda.device(self._device):
            self.event.synchronize()

    def seconds_since(self, earlier: "CudaMark") -> float:
        """By the device's clock."""
        return earlier.event.elapsed_time(self.event) / 1e3


@final
class CudaStream(AbstractStream):
    """A stream of torch's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stream = torch.cuda.Stream(device=device)

    def enter(self) -> None:
        """Device and stream are the thread's own in torch."""
        torch.cuda.set_device(self._device)
        torch.cuda.set_stream(self.stream)

    def mark(self) -> CudaMark:
        """An event recorded now."""
        return CudaMark(self.stream)

    def wait(self, mark: CudaMark) -> None:
        """Nothing of the host waits."""
        self.stream.wait_event(mark.event)


@final
class CudaBackend(AbstractBackend):
    """One CUDA device; `gpu_memory_bytes` caps what is allocated on it, by arenas and by torch.

    Raises RunError if there is no such device or it has less memory free than that.
    """

    def __init__(self, index: int, gpu_memory_bytes: int | None = None) -> None:
        settle_libraries(os.environ)
        cuda: Any = torch.cuda
        count = cuda.device_count() if cuda.is_available() else 0
        if index >= count:
            raise RunError(
                "--accelerator",
                f"cuda:{index}",
                "needs a CUDA device and torch finds none"
                if not count
                else f"must name one of the {count} CUDA devices, counted from 0",
                "use --accelerator emulated or cpu" if not count else "correct it",
            )
        self.name = "cuda"
        self.has_own_memory = True
        self._device = torch.device("cuda", index)
        properties = cuda.get_device_properties(self._device)
        self.gpu_name = str(properties.name)
        self.capability: tuple[int, int] = (properties.major, properties.minor)
        total_bytes = int(properties.total_memory)
        if gpu_memory_bytes is not None and gpu_memory_bytes > total_bytes:
            raise RunError(
                "--gpu-memory",
                f"<{format_bytes(gpu_memory_bytes)}>",
                f"{self.gpu_name} has {format_bytes(total_bytes)}",
                "lower it",
            )
        capped = f", {format_bytes(gpu_memory_bytes)} of it used" if gpu_memory_bytes is not None else ""
        self.description = f"cuda:{index}, {self.gpu_name}{capped}"
        self._streams = {lane: CudaStream(self._device) for lane in (Lane.GPU, Lane.H2D, Lane.D2H)}
        self.streams: Mapping[Lane, AbstractStream] = self._streams
        self.gpu_kernels = kernels_of(self.capability)
        self._cores = usable_cores()
        self._host = PinnableMemory(CudaRegistrar(self._device))
        self._workspace_bytes = 0
        # In a thread that ends: the next that computes, the lane's, takes over its handle.
        self.library_bytes = in_thread_of_its_own(self._warm_up)
        self._before_bytes = self._allocated("current")
        with cuda.device(self._device):
            cuda.empty_cache()  # what a run before this one in the process has given back is torch's until then
        self._free_bytes = cuda.mem_get_info(self._device)[0]
        if gpu_memory_bytes is not None:
            self._free_bytes = min(self._free_bytes, gpu_memory_bytes)
        cuda.reset_peak_memory_stats(self._device)

    def check_dtype(self, dtype: str) -> None:
        """Raise RunError for bfloat16 on a GPU that only emulates it."""
        if dtype == "bfloat16" and self.capability < FLASH_CAPABILITY:
            raise RunError(
                "policy: dtype",
                dtype,
                f"must be one that {self.gpu_name} computes in",
                "solve the policy again with --dtype float16",
            )

    def allocate(self, level: Device, num_bytes: int) -> torch.Tensor:
        """A flat uint8 tensor on the device or in the host's memory."""
        if level is Device.CPU:
            return self._host.allocate(num_bytes, self.told)
        self._take(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def allocate_host(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """The same memory, already pinned, for runs one after the other that it is kept for."""
        return self._host.allocate_together(sizes, self.told)

    def kept_host_bytes(self) -> int:
        """What no run has any more."""
        return kept_bytes()

    def pin(self, memory: torch.Tensor) -> bool:
        """Register the memory with the driver."""
        pinned = self._host.pin(memory, self.told)
        if not pinned:
            with suppress(RuntimeError):  # the next kernel reports CUDA's last error, once
                torch.zeros(1, device=self._device)
        return pinned

    def unpin(self, memory: torch.Tensor) -> None:
        """Undo that."""
        self._host.unpin(memory)

    def check_room(self, num_bytes: int) -> None:
        """RunError if so much is not left of what was free at the start and may be used."""
        if num_bytes > self._free_bytes:
            raise RunError(
                f"memory of {self.gpu_name}",
                f"<{format_bytes(num_bytes)} asked for>",
                f"only {format_bytes(self._free_bytes)} are left",
                "close what else uses it, or lower --gpu-memory and solve the policy again",
            )

    def _take(self, num_bytes: int) -> None:
        """Count memory of the device as allocated."""
        self.check_room(num_bytes)
        self._free_bytes -= num_bytes

    def workspace(self, *num_bytes: int) -> tuple[Workspace, ...]:
        """Of torch's own memory; `ready` reserves it."""
        self._take(max(num_bytes))
        self._workspace_bytes += max(num_bytes)
        nothing = torch.empty(0, dtype=torch.uint8, device=self._device)
        return tuple(Workspace(nothing, of_torch=size) for size in num_bytes)

    def ready(self) -> None:
        """Give back what loading took besides, and have torch hold the workspace in one piece.

        It is allocated for the stream that computes, so that stream alone gets it from then on.
        """
        self.synchronise()
        # Leaving a stream sets the device that was current before: it must not be another one.
        with torch.cuda.device(self._device), torch.cuda.stream(self._streams[Lane.GPU].stream):
            torch.cuda.empty_cache()
            reserved = torch.empty(self._workspace_bytes, dtype=torch.uint8, device=self._device)
        del reserved
        torch.cuda.reset_peak_memory_stats(self._device)

    def transfer(self, lane: Lane, copies: Sequence[Copy]) -> int:
        """Queue every copy on the calling thread's stream; in STAGE the host copies."""
        if lane is Lane.STAGE and all(target.is_cpu and source.is_cpu for target, source in copies):
            return copy_all(copies, stage)
        if not all(side.is_contiguous() for pair in copies for side in pair):
            # Pieces with gaps go through memory of torch's, which may not be given up too early.
            return copy_all(copies)
        if copies:  # one by one, but without the interpreter's lock: there may be one a request
            targets, sources = zip(*self._host.split(copies), strict=True)
            copy_each: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
            copy_each(targets, sources, non_blocking=True)
        return sum(source.nbytes for _, source in copies)

    def lane_threads(self, lane: Lane) -> int:
        """One for lanes that queue, some for staging, and the rest for the CPU's."""
        return lane_threads("cuda", lane, self._cores)

    def synchronise(self) -> None:
        """Wait, asleep, for the calling thread's stream."""
        CudaMark(torch.cuda.current_stream(self._device)).synchronise()

    def is_of_device(self, error: BaseException) -> bool:
        """Errors of CUDA's come out at any later call; running out of memory does not."""
        return isinstance(error, RuntimeError) and "CUDA error" in str(error)

    def peak_gpu_bytes(self) -> int:
        """By the allocator's statistics, without what was there before, cuBLAS's among it."""
        return self._allocated("peak") - self._before_bytes

    def _allocated(self, when: str) -> int:
        """Bytes asked for of torch's allocator, which rounds each piece up to 512."""
        return torch.cuda.memory_stats(self._device).get(f"requested_bytes.all.{when}", 0)

    def _warm_up(self) -> int:
        """Have cuBLAS take its workspace on the stream that computes; returns its bytes.

        It is the same for every run, and belongs to what `hrm` reserves for CUDA.
        """
        before_bytes = self._allocated("current")
        with torch.cuda.device(self._device), torch.cuda.stream(self._streams[Lane.GPU].stream):
            dtypes = [torch.float32, torch.float16]
            if self.capability >= FLASH_CAPABILITY:
                dtypes.append(torch.bfloat16)
            for dtype in dtypes:
                square = torch.ones(64, 64, dtype=dtype, device=self._device)
                torch.addmm(square, square, square)
                del square
        self._streams[Lane.GPU].stream.synchronize()
        return self._allocated("current") - before_bytes


def kernels_of(capability: tuple[int, int]) -> GpuKernels:
    """What torch has for GPUs of that compute capability."""
    flash = grouped = None
    if capability >= FLASH_CAPABILITY and torch.backends.cuda.is_flash_attention_available():
        flash = torch.ops.aten._flash_attention_forward  # noqa: SLF001 - the op of varlen_attn
    if capability[0] in GROUPED_CAPABILITIES:
        grouped = grouped_gemm()
    return GpuKernels(flash, grouped)
