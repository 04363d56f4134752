"""What stands in for hardware in the tests of profiling: small sizes, clocks and GPUs."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from hrm.hardware import Figure
from hrm.profiling.gpu import AbstractGpu, StreamWork
from hrm.profiling.nvml import GpuFacts
from hrm.profiling.timing import Call, Sampler, Timing, clock_sampler, summarise, time_each
from hrm.profiling.topology import CacheFacts
from hrm.units import KIB, MIB
from tests.hrm.support import tiny_spec

TINY = tiny_spec(num_layers=2, vocab_size=100)
CACHES = (
    CacheFacts(level=1, each_bytes=32 * KIB, instances=2, cpus_each=1),
    CacheFacts(level=2, each_bytes=256 * KIB, instances=2, cpus_each=1),
)


@contextmanager
def small_sizes(*, passes: int = 1) -> Iterator[pytest.MonkeyPatch]:
    """Arrays that take no time, in few passes; what is measured with them is never looked at."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "machine.PASSES": passes,
            "machine.options.MOST_QUICK_S": 0.03,
            "memory.QUICK_BYTES": 8 * MIB,
            "machine.host.QUICK_SOURCE_BYTES": 2 * MIB,
            "gemm.POOL_BYTES": MIB,
            "gemm.QUICK_WEIGHTS": 2**15,
            "gemm.QUICK_SQUARES": (128,),
            "attention.QUICK_BYTES": 2 * MIB,
            "attention.QUICK_CONTEXTS": (32, 128),
            "caches.BYTES_A_CALL": 64 * KIB,
            "topology.caches": lambda _: CACHES,
            "disk.QUICK_BYTES": 16 * MIB,
            "timing.MIN_SAMPLE_S": 1e-6,
            "settle.SIDE": 64,
            "settle.BATCH_S": 1e-5,
        }.items():
            patch.setattr(f"hrm.profiling.{name}", value)
        # A process that begins with torch takes longer than all the rest; test_processes starts the real one.
        patch.setattr("executor.model.host_kernels.seconds_a_task", lambda _ranks: [1e-5] * 3)
        yield patch


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def pass_(self, seconds: float) -> None:
        self.now_s += seconds


def time_call(call: Call, *, budget_s: float, sampler: Sampler | None = None) -> Timing:
    """What a call alone takes, timed as several are in turn."""
    return summarise(time_each({None: call}, budget_s=budget_s, sampler=sampler)[None])


class FakeGpu(AbstractGpu):
    """A GPU whose tensors live on the CPU; what is queued has then been done."""

    def __init__(
        self,
        index: int = 0,
        *,
        name: str = "a GPU",
        free_bytes: int = 8 * MIB,
        total_bytes: int = 1200 * MIB,
        facts: GpuFacts | None = None,
        clocks: tuple[float, ...] = (),
        slowed: tuple[str, ...] = (),
        busy: tuple[str, ...] = (),
        shares_memory: bool = False,
        has_bfloat16: bool = True,
        groups_experts: bool = False,
    ) -> None:
        self.index, self.device, self.name = index, "cpu", name
        self.shares_memory, self.has_bfloat16 = shares_memory, has_bfloat16
        self.groups_experts = groups_experts
        self.sizes = (free_bytes, total_bytes)
        self.told = facts or GpuFacts({"gpu": name, "driver": "1.2"})
        self.clocks, self.slowed, self.busy = list(clocks), slowed, busy
        self.queued_calls = 0

    def memory_bytes(self):
        return self.sizes

    def pinned(self, num_bytes):
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def sampler(self):
        return clock_sampler()

    def queued(self, call):
        self.queued_calls += 1
        return StreamWork(call, lambda: None)

    def wait(self):
        pass

    def reaches(self, other):
        return abs(self.index - other.index) == 1

    def facts(self):
        return self.told

    def clock_mhz(self):
        return (self.clocks.pop(0) if len(self.clocks) > 1 else self.clocks[0]) if self.clocks else None

    def slowed_by(self):
        return self.slowed

    def busy_before(self):
        return self.busy


def figures_of(node, path="") -> dict[str, Figure]:
    """Every figure in a tree of dataclasses, found without hrm's own walk."""
    if isinstance(node, Figure):
        return {path: node}
    found: dict[str, Figure] = {}
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, tuple):
        items = enumerate(node)
    else:
        names = getattr(node, "__dataclass_fields__", {})
        items = ((name, getattr(node, name)) for name in names)
    for key, value in items:
        found |= figures_of(value, f"{path}.{key}")
    return found
