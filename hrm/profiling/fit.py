"""Latency apart from bandwidth: t = latency + bytes / bandwidth through measured times.

Of the lines through two of the points, the one with the least sum of logarithmic errors says which
points agree with it; least squares over those do the rest. So sizes that were disturbed, whichever
way and however much, do not move the line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import log
from statistics import median
from typing import Any, Final

AGREES: Final = 0.25  # logarithmic error up to which a size takes part in the fit
MAX_GROUPS: Final = 7
BENT: Final = 0.10  # a curve is kept if the straight line misses by more than this share

TimedSize = tuple[float, float]  # bytes, seconds


@dataclass(frozen=True, slots=True)
class LinkFit:
    """Latency and bandwidth, and the largest miss of t = latency + bytes / bandwidth."""

    latency_s: float
    bandwidth_bytes_per_s: float
    worst_miss: float


def fit_link(points: Sequence[TimedSize]) -> LinkFit:
    """Fit `(bytes, seconds)`; the latency is at least 0 and the bandwidth above 0."""
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


def fit_groups(samples: Mapping[Any, Sequence[float]]) -> list[LinkFit]:
    """Fits of up to seven stretches of the time in which the samples were taken.

    How far these lie apart is how far the fit can be trusted; samples are in order of time.
    """
    fewest = min(map(len, samples.values()))
    count = min(MAX_GROUPS, fewest)
    return [
        fit_link(
            [
                (size, median(taken[len(taken) * g // count : len(taken) * (g + 1) // count]))
                for size, taken in samples.items()
            ]
        )
        for g in range(count)
    ]


def _error(line: TimedSize, point: TimedSize) -> float:
    latency, slope = line
    size, seconds = point
    return abs(log((latency + slope * size) / seconds))


def _least_squares(points: Sequence[TimedSize]) -> TimedSize:
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
