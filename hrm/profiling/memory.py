"""Memory bandwidth: reading by a dot product (two streams, nothing written back) and copying."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch

from hrm.profiling.timing import Sampler, Timing, time_call
from hrm.units import GIB, MIB, format_bytes

QUICK_BYTES: Final = 256 * MIB
FULL_BYTES: Final = GIB


@dataclass(frozen=True, slots=True)
class MemoryRates:
    """Timings of reading and of copying `num_bytes`, by number of threads."""

    num_bytes: int
    read: dict[int, Timing]
    copy: dict[int, Timing]
    note: str


def array_bytes(last_level_cache_bytes: int, available_bytes: int, *, quick: bool) -> int:
    """Four times the last-level cache, within limits of time and memory; whole MiB."""
    wanted = max(64 * MIB, 4 * last_level_cache_bytes)
    size = min(wanted, QUICK_BYTES if quick else FULL_BYTES, available_bytes // 8)
    return max(MIB, size // MIB * MIB)


def measure_memory(
    *, num_bytes: int, last_level_cache_bytes: int, threads: Iterable[int], budget_s: float
) -> MemoryRates:
    """Read and copy host memory with each number of threads."""
    sweep = sorted(set(threads))
    note = f"over {format_bytes(num_bytes)}"
    if num_bytes < 4 * last_level_cache_bytes:
        cache = format_bytes(last_level_cache_bytes)
        note += f", less than four times the last-level cache of {cache}: part may be cached"
    rates = MemoryRates(num_bytes, {}, {}, note)
    before = torch.get_num_threads()
    try:
        for count in sweep:
            torch.set_num_threads(count)
            read, copy = _read_and_copy(num_bytes, "cpu", budget_s / len(sweep), None)
            rates.read[count], rates.copy[count] = read, copy
    finally:
        torch.set_num_threads(before)
    return rates


def measure_device_memory(
    device: str, *, num_bytes: int, budget_s: float, sampler: Sampler
) -> tuple[Timing, Timing]:
    """Timings of reading and of copying `num_bytes` of a GPU's memory."""
    return _read_and_copy(num_bytes, device, budget_s, sampler)


def _read_and_copy(
    num_bytes: int, device: str, budget_s: float, sampler: Sampler | None
) -> tuple[Timing, Timing]:
    elements = num_bytes // 8
    first = torch.full((elements,), 0.5, device=device)
    second = torch.full((elements,), 0.25, device=device)
    half_s = budget_s / 2
    both = num_bytes / (8 * elements)
    read = time_call(lambda: torch.dot(first, second), budget_s=half_s, sampler=sampler)
    copy = time_call(lambda: second.copy_(first), budget_s=half_s, sampler=sampler)
    # The dot product reads both arrays; the copy moves one of them, half as much.
    return _scaled(read, both), _scaled(copy, 2 * both)


def _scaled(timing: Timing, factor: float) -> Timing:
    return Timing(
        timing.median_s * factor, timing.p20_s * factor, timing.p80_s * factor, timing.samples
    )
