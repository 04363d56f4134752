"""Links: transfers of many sizes, fitted as latency + bytes / bandwidth."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Final

import torch

from hrm.contract.pacing import PacedCopy
from hrm.hardware import Link, LinkKind, Rate
from hrm.profiling.fit import BENT, LinkFit, fit_groups, fit_link
from hrm.profiling.timing import Sampler, measured, significant, summarise, time_each
from hrm.units import KIB, MIB, format_bytes

SMALLEST_BYTES: Final = 4 * KIB
LARGEST_BYTES: Final = 512 * MIB

Transfer = Callable[[int], Callable[[], object]]  # for a size, the call that moves as much


def transfer_sizes(largest_bytes: int, *, quick: bool) -> list[int]:
    """Sizes from 4 KiB up to `largest_bytes`, each 2 (full) or 8 (quick) times the one before."""
    sizes, factor = [SMALLEST_BYTES], 8 if quick else 2
    while sizes[-1] * factor <= min(largest_bytes, LARGEST_BYTES):
        sizes.append(sizes[-1] * factor)
    return sizes if len(sizes) > 1 else [SMALLEST_BYTES // 4, SMALLEST_BYTES]


def measure_link(
    source: str,
    target: str,
    transfer: Transfer,
    *,
    sizes: Sequence[int],
    budget_s: float,
    kind: LinkKind = "pinned",
    note: str = "",
    sampler: Sampler | None = None,
) -> Link:
    """Time transfers of each size and fit them.

    Where the line misses by more than 10 %, the bandwidth is a curve over size.
    """
    taken = time_each({float(size): transfer(size) for size in sizes}, budget_s=budget_s, sampler=sampler)
    points = [(size, summarise(seconds).median_s) for size, seconds in taken.items()]
    fit, stretches = fit_link(points), fit_groups(taken)
    bent = fit.worst_miss > BENT
    swept = f"{format_bytes(sizes[0])} to {format_bytes(sizes[-1])}"
    told = f"{note}; {swept}" if note else swept
    if bent:
        told += f"; a straight line misses by up to {fit.worst_miss:.0%}"
    samples = sum(map(len, taken.values()))
    bandwidths = [one.bandwidth_bytes_per_s for one in stretches]
    bandwidth = measured(fit.bandwidth_bytes_per_s, bandwidths, told, samples)
    if bent:
        bandwidth = replace(bandwidth, curve=_curve(points, fit))
    latency = measured(fit.latency_s, [one.latency_s for one in stretches], "fitted", samples)
    return Link(
        source=source, target=target, kind=kind, latency_s=latency, bandwidth_bytes_per_s=Rate(achieved=bandwidth)
    )


def _curve(points: Sequence[tuple[float, float]], fit: LinkFit) -> tuple[tuple[float, float], ...]:
    """Bandwidth at each size, the fitted latency taken off."""
    return tuple((size, significant(size / max(seconds - fit.latency_s, 0.2 * seconds))) for size, seconds in points)


def paced_transfer(pace: PacedCopy, arena_bytes: int) -> Transfer:
    """Transfers of the emulated link: a copy between two arenas, paced."""
    source = torch.ones(arena_bytes, dtype=torch.uint8)
    target = torch.zeros(arena_bytes, dtype=torch.uint8)

    def transfer(size: int) -> Callable[[], object]:
        from_part, to_part = source[:size], target[:size]

        def copy() -> object:
            return to_part.copy_(from_part)

        return lambda: pace.run(copy, size)

    return transfer


def host_transfer(
    source_bytes: int, target: torch.Tensor, copy: Callable[[torch.Tensor, torch.Tensor], object] = torch.Tensor.copy_
) -> Transfer:
    """Staging: copies from pageable memory to `target`, pinned memory where there is any.

    `copy(target, source)` makes them. Each takes the next part of `source_bytes`, as pages of
    weights are read once and not again.
    """
    source = torch.ones(source_bytes, dtype=torch.uint8)

    def transfer(size: int) -> Callable[[], object]:
        starts = cycle(range(0, source_bytes - size + 1, size))
        to_part = target[:size]

        def stage() -> object:
            start = next(starts)
            return copy(to_part, source[start : start + size])

        return stage

    return transfer
