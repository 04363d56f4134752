"""Memory bandwidth: reading by a dot product (two streams, nothing written back) and copying."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch

from hrm.profiling.timing import Call, Sampler, Timing, summarise, time_each
from hrm.units import GIB, MIB, format_bytes

QUICK_BYTES: Final = 3 * GIB // 2
FULL_BYTES: Final = 4 * GIB


@dataclass(frozen=True, slots=True)
class MemoryRates:
    """Timings of reading and of copying `num_bytes`, by number of threads."""

    num_bytes: int
    read: dict[int, Timing]
    copy: dict[int, Timing]
    note: str


@dataclass(frozen=True, slots=True)
class DeviceMemoryRates:
    """Timings of reading and of copying `num_bytes` of a GPU's memory."""

    num_bytes: int
    read: Timing
    copy: Timing


def array_bytes(last_level_cache_bytes: int, available_bytes: int, *, quick: bool) -> int:
    """Four times the last-level cache, within limits of time and memory; whole MiB."""
    wanted = max(64 * MIB, 4 * last_level_cache_bytes)
    size = min(wanted, QUICK_BYTES if quick else FULL_BYTES, available_bytes // 8)
    return max(MIB, -(-size // MIB) * MIB)


def measure_memory(
    *, num_bytes: int, last_level_cache_bytes: int, threads: Iterable[int], budget_s: float
) -> MemoryRates:
    """Read and copy host memory with each number of threads."""
    note = f"over {format_bytes(num_bytes)}"
    if num_bytes < 4 * last_level_cache_bytes:
        cache = format_bytes(last_level_cache_bytes)
        note += f", less than four times the last-level cache of {cache}: part may be cached"
    before = torch.get_num_threads()

    def with_threads(count: int, call: Call) -> Call:
        def run() -> None:
            torch.set_num_threads(count)
            call()

        return run

    read, copy, per_call = _read_and_copy(num_bytes, "cpu")
    calls: dict[tuple[str, int], Call] = {}
    for count in sorted(set(threads)):
        calls["read", count] = with_threads(count, read)
        calls["copy", count] = with_threads(count, copy)
    try:
        taken = time_each(calls, budget_s=budget_s)
    finally:
        torch.set_num_threads(before)
    timings = {key: summarise([s * num_bytes / per_call[key[0]] for s in seconds]) for key, seconds in taken.items()}
    return MemoryRates(
        num_bytes,
        {count: timing for (what, count), timing in timings.items() if what == "read"},
        {count: timing for (what, count), timing in timings.items() if what == "copy"},
        note,
    )


def measure_device_memory(device: str, *, num_bytes: int, budget_s: float, sampler: Sampler) -> DeviceMemoryRates:
    """Read and copy `num_bytes` of a GPU's memory."""
    read, copy, per_call = _read_and_copy(num_bytes, device)
    taken = time_each({"read": read, "copy": copy}, budget_s=budget_s, sampler=sampler)
    reading, copying = (summarise([s * num_bytes / per_call[what] for s in taken[what]]) for what in taken)
    return DeviceMemoryRates(num_bytes, reading, copying)


def _read_and_copy(num_bytes: int, device: str) -> tuple[Call, Call, dict[str, int]]:
    """Calls that read and copy, and the bytes of each: a copy moves one of the two arrays."""
    elements = num_bytes // 8
    tile = torch.randn(min(elements, MIB), device=device)
    copies = -(-elements // len(tile))
    first = tile.repeat(copies)[:elements]
    second = first.flip(0) if elements < MIB else tile.flip(0).repeat(copies)[:elements]

    def read() -> object:
        return torch.dot(first, second)

    def copy() -> object:
        return second.copy_(first)

    return read, copy, {"read": 8 * elements, "copy": 4 * elements}
