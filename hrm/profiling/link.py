"""Links: transfers of many sizes, fitted as latency + bytes / bandwidth."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import log
from typing import Final

import torch

from hrm.hardware import Figure, Link, LinkKind, Rate, Source
from hrm.profiling.pacing import PacedCopy
from hrm.profiling.timing import Sampler, Timing, significant, time_call
from hrm.units import KIB, MIB, format_bytes

SMALLEST_BYTES: Final = 4 * KIB
LARGEST_BYTES: Final = 512 * MIB
BENT: Final = 0.10  # a curve is kept if the straight line misses by more than this share
AGREES: Final = 0.25  # logarithmic error up to which a size takes part in the fit

Transfer = Callable[[int], Callable[[], object]]  # for a size, the call that moves as much


@dataclass(frozen=True, slots=True)
class LinkFit:
    """Latency and bandwidth, and the largest miss of t = latency + bytes / bandwidth."""

    latency_s: float
    bandwidth_bytes_per_s: float
    worst_miss: float


def fit_link(points: Sequence[tuple[float, float]]) -> LinkFit:
    """Fit `(bytes, seconds)`; the latency is at least 0 and the bandwidth above 0.

    Of the lines through two of the points the one with the least sum of logarithmic errors says
    which points agree with it; least squares over those do the rest. So sizes that were disturbed,
    whichever way and however much, do not move the line.
    """
    assert len(points) >= 2, points
    lines = [(0.0, seconds / size) for size, seconds in points]
    for (size_0, seconds_0), (size_1, seconds_1) in combinations(points, 2):
        slope = (seconds_1 - seconds_0) / (size_1 - size_0)
        latency = seconds_0 - slope * size_0
        if slope > 0 and latency >= 0:
            lines.append((latency, slope))
    best = min(lines, key=lambda line: sum(_error(line, point) for point in points))
    agreeing = [point for point in points if _error(best, point) < AGREES]
    fitted = _least_squares(agreeing) if len(agreeing) >= 2 else best
    worst = max(abs(fitted[0] + fitted[1] * size - t) / t for size, t in points)
    return LinkFit(fitted[0], 1 / fitted[1], worst)


def _error(line: tuple[float, float], point: tuple[float, float]) -> float:
    latency, slope = line
    size, seconds = point
    return abs(log((latency + slope * size) / seconds))


def _least_squares(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Latency and slope of least relative error; through the origin if it would be negative."""
    weighted = [(1 / seconds**2, size, seconds) for size, seconds in points]
    total = sum(w for w, _, _ in weighted)
    mean_size = sum(w * size for w, size, _ in weighted) / total
    mean_time = sum(w * t for w, _, t in weighted) / total
    slope = sum(w * (size - mean_size) * (t - mean_time) for w, size, t in weighted) / sum(
        w * (size - mean_size) ** 2 for w, size, _ in weighted
    )
    latency = mean_time - slope * mean_size
    if latency >= 0 and slope > 0:
        return latency, slope
    through_origin = sum(w * size * t for w, size, t in weighted)
    return 0.0, through_origin / sum(w * size**2 for w, size, _ in weighted)


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
    datasheet: Figure | None = None,
    sampler: Sampler | None = None,
) -> Link:
    """Time transfers of each size and fit them.

    Where the line misses by more than 10 %, the bandwidth is a curve over size.
    """
    timings = {
        size: time_call(transfer(size), budget_s=budget_s / len(sizes), sampler=sampler)
        for size in sizes
    }
    points = [(float(size), timing.median_s) for size, timing in timings.items()]
    fit = fit_link(points)
    bent = fit.worst_miss > BENT
    swept = f"{format_bytes(sizes[0])} to {format_bytes(sizes[-1])}"
    told = f"{note}; {swept}" if note else swept
    if bent:
        told += f"; a straight line misses by up to {fit.worst_miss:.0%}"
    biggest = timings[sizes[-1]].less(fit.latency_s)
    samples = sum(timing.samples for timing in timings.values())
    bandwidth = Figure(
        value=significant(fit.bandwidth_bytes_per_s),
        source=Source.MEASURED,
        note=biggest.flagged(told),
        samples=samples,
        p20=significant(sizes[-1] / biggest.p80_s),
        p80=significant(sizes[-1] / biggest.p20_s),
        curve=_curve(timings, fit) if bent else (),
    )
    latency = Figure(
        value=significant(fit.latency_s), source=Source.MEASURED, note="fitted", samples=samples
    )
    return Link(
        source=source,
        target=target,
        kind=kind,
        latency_s=latency,
        bandwidth_bytes_per_s=Rate(datasheet=datasheet, achieved=bandwidth),
    )


def _curve(timings: dict[int, Timing], fit: LinkFit) -> tuple[tuple[float, float], ...]:
    """Bandwidth at each size, the fitted latency taken off."""
    return tuple(
        (float(size), significant(size / timing.less(fit.latency_s).median_s))
        for size, timing in timings.items()
    )


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


def host_transfer(largest_bytes: int, *, pin_target: bool) -> Transfer:
    """Staging: copies from pageable to pinned memory (to pageable where nothing can be pinned)."""
    source = torch.ones(largest_bytes, dtype=torch.uint8)
    target = torch.zeros(largest_bytes, dtype=torch.uint8, pin_memory=pin_target)
    return lambda size: lambda: target[:size].copy_(source[:size])


def cuda_transfer(device: str, *, to_device: bool, pinned: bool, largest_bytes: int) -> Transfer:
    """Transfers between host and GPU; the first of each size is checked against its source."""
    host = torch.arange(largest_bytes // 8, dtype=torch.int64).view(torch.uint8)
    host = host.pin_memory() if pinned else host
    on_device = torch.empty(len(host), dtype=torch.uint8, device=device)
    if not to_device:
        on_device.copy_(host)
        host.zero_()
    source, target = (host, on_device) if to_device else (on_device, host)

    def transfer(size: int) -> Callable[[], object]:
        def copy() -> object:
            return target[:size].copy_(source[:size], non_blocking=pinned)

        copy()
        torch.cuda.synchronize(device)
        if not torch.equal(target[:size].cpu(), source[:size].cpu()):
            raise RuntimeError(f"a transfer of {size} bytes with {device} arrived changed")
        return copy

    return transfer
