"""Host memory on machines with several NUMA nodes: what each node's cores read of each memory.

Without libnuma: a thread is kept on a node's cores before it touches its memory for the first time,
which places the memory there; torch's own threads inherit the cores of the thread that starts them.
"""

import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from hrm.profiling.timing import Call, Timing, summarise, time_each
from hrm.profiling.topology import physical_cores
from hrm.units import format_bandwidth

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NumaRead:
    """Bytes a second at which the cores of one node read the memory of another, or their own."""

    cores_of: int
    memory_of: int
    bytes_per_s: float

    @property
    def is_local(self) -> bool:
        """Whether the memory is the cores' own."""
        return self.cores_of == self.memory_of


def measure_numa(nodes: Mapping[int, frozenset[int]], *, num_bytes: int, budget_s: float) -> tuple[NumaRead, ...]:
    """What the cores of each node read of each node's memory; `nodes` maps them to their CPUs."""
    elements = num_bytes // 8

    def allocate() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((elements,), 0.5), torch.full((elements,), 0.25)

    arrays = {node: on_cpus(cpus, allocate) for node, cpus in nodes.items()}

    def read() -> dict[int, Timing]:
        calls: dict[int, Call] = {node: partial(torch.dot, *pair) for node, pair in arrays.items()}
        taken = time_each(calls, budget_s=budget_s / len(nodes))
        return {node: summarise(seconds) for node, seconds in taken.items()}

    return tuple(
        NumaRead(node, of, 8 * elements / timing.median_s)
        for node, cpus in nodes.items()
        for of, timing in on_cpus(cpus, read).items()
    )


def describe_numa(reads: tuple[NumaRead, ...]) -> str:
    """In one line: each node's cores on their own memory and on the others'."""
    return "; ".join(
        f"cores of node {read.cores_of} read "
        f"{'their own memory' if read.is_local else f'that of node {read.memory_of}'} at "
        f"{format_bandwidth(read.bytes_per_s)}"
        for read in reads
    )


def on_cpus(cpus: frozenset[int], work: Callable[[], T]) -> T:
    """What `work` returns in a thread of its own that stays on these CPUs, with torch's threads."""
    found: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            os.sched_setaffinity(0, cpus)  # 0 is the calling thread
            torch.set_num_threads(physical_cores(cpus))
            found.append(work())
        except Exception as error:  # noqa: BLE001 - raised below, in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return found[0]
