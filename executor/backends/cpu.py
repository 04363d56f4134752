"""Backends on the CPU: plain, and with an accelerator that is emulated.

Emulated means a capped arena for the GPU's memory, threads of its own for the GPU's lane, and
links that are memory copies paced to a stated bandwidth and latency.
"""

import time
from collections.abc import Callable, Sequence
from typing import final

import torch

from executor.backends.base import AbstractBackend, Copy, EmulatedMachine, copy_all, host_memory, stage, usable_cores
from executor.errors import RunError
from hrm.contract.lane_threads import lane_threads
from hrm.contract.pacing import PacedCopy, Waits
from hrm.tasks import Device, Lane
from hrm.units import format_bandwidth, format_bytes


@final
class CpuBackend(AbstractBackend):
    """One level, no link: both arenas lie in the host's memory and copies run as they can."""

    def __init__(self) -> None:
        self.name = "cpu"
        self.description = "CPU, one memory level"
        self._cores = usable_cores()

    def allocate(self, level: Device, num_bytes: int) -> torch.Tensor:  # noqa: ARG002
        """A flat uint8 tensor; there is no cap besides the machine's."""
        return host_memory(num_bytes, self.told)

    def transfer(self, lane: Lane, copies: Sequence[Copy]) -> int:  # noqa: ARG002
        """Copy within the host's memory."""
        return copy_all(copies)

    def lane_threads(self, lane: Lane) -> int:
        """All cores for computing on either lane, one for the others."""
        return lane_threads("cpu", lane, self._cores)


@final
class EmulatedBackend(AbstractBackend):
    """An accelerator emulated on the CPU, for runs and timings on any machine.

    `clock` and `sleep` are what its links keep time with; by default sleeps can be called off.
    """

    def __init__(
        self,
        machine: EmulatedMachine,
        *,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], object] | None = None,
    ) -> None:
        self.name = "emulated"
        self.is_emulated = True
        self.waits = self._waits = Waits()
        self.description = (
            f"emulated on the CPU: {format_bytes(machine.gpu_memory_bytes)}, host to device "
            f"{format_bandwidth(machine.h2d.bandwidth_bytes_per_s.at())}"
        )
        self.h2d_bytes_per_s = machine.h2d.bandwidth_bytes_per_s.at()
        self.d2h_bytes_per_s = machine.d2h.bandwidth_bytes_per_s.at()
        self._links = {
            lane: PacedCopy(
                latency_s=link.latency_s.value,
                bandwidth_bytes_per_s=link.bandwidth_bytes_per_s.at(),
                clock=clock,
                sleep=sleep or self.waits.sleep,
            )
            for lane, link in ((Lane.H2D, machine.h2d), (Lane.D2H, machine.d2h))
        }
        self._free_bytes = machine.gpu_memory_bytes
        self._cores = usable_cores()

    def allocate(self, level: Device, num_bytes: int) -> torch.Tensor:
        """A flat uint8 tensor; on the GPU's level it comes out of the emulated memory."""
        if level is Device.GPU:
            if num_bytes > self._free_bytes:
                raise RunError(
                    "emulated GPU memory",
                    f"<{format_bytes(num_bytes)} asked for>",
                    f"only {format_bytes(self._free_bytes)} are left",
                    "lower the policy's needs or raise --gpu-memory",
                )
            self._free_bytes -= num_bytes
        return host_memory(num_bytes, self.told)

    def transfer(self, lane: Lane, copies: Sequence[Copy]) -> int:
        """Copy, and take as long as the lane's link would, or the copy if that is longer."""
        num_bytes = sum(source.nbytes for _, source in copies)
        link = self._links.get(lane)
        if link is None:
            copy_all(copies, stage)
        elif num_bytes:
            link.run(lambda: copy_all(copies), num_bytes, ready_s=self._waits.ready_s)
        return num_bytes

    def lane_threads(self, lane: Lane) -> int:
        """Half of the cores for the GPU, the rest for the CPU, one for each other lane."""
        return lane_threads("emulated", lane, self._cores)
