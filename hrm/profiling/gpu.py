"""GPUs as the benchmarks use them: where tensors live, streams, timers and what is known of them.

`CudaGpu` is the real one. Tests bring their own, whose tensors live on the CPU, so that everything
but these few calls of CUDA runs without a card.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, final

import torch

from hrm.contract.launches import GROUPED_CAPABILITIES
from hrm.contract.libraries import settle_libraries
from hrm.errors import ProfileError
from hrm.profiling import nvml
from hrm.profiling.nvml import GpuFacts
from hrm.profiling.pinned import CudaRegistrar, PinnableMemory
from hrm.profiling.timing import Call, Sampler, clock_sampler

FIRST_WITH_BFLOAT16: Final = 8  # major compute capability


@dataclass(frozen=True, slots=True)
class StreamWork:
    """Work for a stream of its own: `run` queues it, `wait` returns once it is done."""

    run: Call
    wait: Call


class AbstractGpu(ABC):
    """One GPU: `device` is where torch puts its tensors, `index` how CUDA counts it.

    `shares_memory` says that it has no memory of its own but works in the host's, and `has_bfloat16`
    that it computes in that and does not only emulate it. `groups_experts` says that torch has a grouped GEMM for it.
    """

    index: int
    device: str
    name: str
    shares_memory: bool
    has_bfloat16: bool
    groups_experts: bool

    @abstractmethod
    def memory_bytes(self) -> tuple[int, int]:
        """Free and total memory."""

    @abstractmethod
    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Host memory that this GPU reads and writes by itself, as a flat uint8 tensor."""

    @abstractmethod
    def sampler(self) -> Sampler:
        """Times calls that queue work on the calling thread's stream, on the GPU's own clock."""

    @abstractmethod
    def queued(self, call: Call) -> StreamWork:
        """The call on a stream of its own."""

    @abstractmethod
    def wait(self) -> None:
        """Return once everything that was queued on the GPU is done."""

    @abstractmethod
    def reaches(self, other: "AbstractGpu") -> bool:
        """Whether copies to the other GPU go straight there, not through the host's memory."""

    @abstractmethod
    def facts(self) -> GpuFacts:
        """What NVML tells of it."""

    @abstractmethod
    def clock_mhz(self) -> float | None:
        """The clock of its multiprocessors now, if it can be read."""

    @abstractmethod
    def slowed_by(self) -> tuple[str, ...]:
        """What keeps its clock down now."""

    @abstractmethod
    def busy_before(self) -> tuple[str, ...]:
        """A warning if it is at work for others; to be asked before any work of ours."""


@final
class CudaGpu(AbstractGpu):
    """A CUDA device of torch's."""

    def __init__(self, index: int) -> None:
        settle_libraries(os.environ)  # before anything is computed there
        cuda: Any = torch.cuda
        properties = cuda.get_device_properties(index)
        self.index, self.device = index, f"cuda:{index}"
        self.name = str(properties.name)
        self.shares_memory = bool(properties.is_integrated)
        self.has_bfloat16 = properties.major >= FIRST_WITH_BFLOAT16
        self.groups_experts = properties.major in GROUPED_CAPABILITIES
        self._uuid = str(properties.uuid)
        self._host = PinnableMemory(CudaRegistrar(self.device))

    def memory_bytes(self) -> tuple[int, int]:
        """As the driver counts it, so that other processes' memory is not free."""
        with torch.cuda.device(self.device):  # else it makes a context on the first card, too
            torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Memory as runs have it; ProfileError if the system does not pin so much."""
        memory = self._host.allocate(num_bytes)
        if not self._host.pin(memory):
            raise ProfileError(
                "pinned memory", f"<{num_bytes} bytes asked for>", "the system does not pin so much", "see ulimit -l"
            )
        return memory

    def sampler(self) -> Sampler:
        """By two events around the calls."""

        def sample(call: Call, calls: int) -> float:
            with torch.cuda.device(self.device):
                start = torch.cuda.Event(enable_timing=True)
                end = torch.cuda.Event(enable_timing=True)
                start.record()
                for _ in range(calls):
                    call()
                end.record()
                end.synchronize()
                return start.elapsed_time(end) / 1e3

        return sample

    def queued(self, call: Call) -> StreamWork:
        """The stream is made here, once; tensors must be whole before the first call.

        Waiting for a stream lets other threads of Python run.
        """
        stream = torch.cuda.Stream(device=self.device)

        def run() -> None:
            with torch.cuda.stream(stream):
                call()

        return StreamWork(run, stream.synchronize)

    def wait(self) -> None:
        """All streams of the device."""
        torch.cuda.synchronize(self.device)

    def reaches(self, other: AbstractGpu) -> bool:
        """As the driver says of the two devices."""
        return bool(torch.cuda.can_device_access_peer(self.index, other.index))

    def facts(self) -> GpuFacts:
        """With the version of CUDA that torch was built with."""
        told = nvml.gpu_facts(self._uuid, self.index)
        lines = {"gpu": self.name, "cuda": str(torch.version.cuda), **told.lines}
        return GpuFacts(lines, told.warnings, told.pcie_bytes_per_s)

    def clock_mhz(self) -> float | None:
        """By NVML."""
        return nvml.clock_mhz(self._uuid, self.index)

    def slowed_by(self) -> tuple[str, ...]:
        """By NVML."""
        return nvml.slowed_by(self._uuid, self.index)

    def busy_before(self) -> tuple[str, ...]:
        """By NVML."""
        return nvml.busy_before(self._uuid, self.index)


def together(gpus: Sequence[AbstractGpu]) -> Sampler:
    """Times calls that queue work on several GPUs, on the host's clock until all are done."""
    sample = clock_sampler()

    def waiting(call: Call, calls: int) -> float:
        def run() -> None:
            for _ in range(calls):
                call()
            for gpu in gpus:
                gpu.wait()

        return sample(run, 1)

    return waiting
