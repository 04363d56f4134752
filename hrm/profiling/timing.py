"""How everything is timed: warm up, take samples, keep the median and how far they spread."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf
from statistics import quantiles
from typing import Final, TypeVar

from hrm.contract.host_kernels import HostKernels
from hrm.hardware import Figure, Source

WARM_UP_SAMPLES: Final = 2
MIN_SAMPLES: Final = 3
MAX_SAMPLES: Final = 100
MIN_SAMPLE_S: Final = 1e-3  # shorter calls are timed several at a time

K = TypeVar("K")
Call = Callable[[], object]
Sampler = Callable[[Call, int], float]  # seconds that so many calls take


@dataclass(frozen=True, slots=True, kw_only=True)
class Computer:
    """What computes while it is timed: torch on a `device`, or a runtime's own `kernels` on the host.

    A `sampler` takes the times, the clock of this process if there is none, and inputs take `most_bytes` at most.
    """

    device: str = "cpu"
    most_bytes: float = inf
    sampler: Sampler | None = None
    kernels: HostKernels | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: median, 20th and 80th percentile over the samples."""

    median_s: float
    p20_s: float
    p80_s: float
    samples: int

    def less(self, seconds: float) -> "Timing":
        """The same without a fixed cost, though never less than a fifth of itself."""
        rest = max(self.median_s - seconds, 0.2 * self.median_s) / self.median_s
        return Timing(rest * self.median_s, rest * self.p20_s, rest * self.p80_s, self.samples)

    def rate(self, work: float, note: str = "") -> Figure:
        """`work` a second as a measured figure."""
        return Figure(
            value=significant(work / self.median_s),
            source=Source.MEASURED,
            note=note,
            samples=self.samples,
            p20=significant(work / self.p80_s),
            p80=significant(work / self.p20_s),
        )

    def duration(self, note: str = "") -> Figure:
        """The seconds as a measured figure."""
        return Figure(
            value=significant(self.median_s),
            source=Source.MEASURED,
            note=note,
            samples=self.samples,
            p20=significant(self.p20_s),
            p80=significant(self.p80_s),
        )


@dataclass(frozen=True, slots=True)
class Latency(Timing):
    """Seconds of one call to which others only ever add: the 20th percentile of the samples in place of their median.

    Around it are the least and the median.
    """

    @staticmethod
    def of(samples: Sequence[float]) -> "Latency":
        """That of samples in seconds."""
        middle, low, _ = middle_and_ends(samples)
        return Latency(low, min(samples), middle, len(samples))


def significant(value: float) -> float:
    """Rounded to what a measurement can tell: five digits."""
    return float(f"{value:.5g}")


def clock_sampler(clock: Callable[[], float] = time.perf_counter) -> Sampler:
    """Times calls that have done their work when they return."""

    def sample(call: Call, calls: int) -> float:
        start_s = clock()
        for _ in range(calls):
            call()
        return clock() - start_s

    return sample


def time_each(calls: Mapping[K, Call], *, budget_s: float, sampler: Sampler | None = None) -> dict[K, list[float]]:
    """Seconds of each call, sampled in turn for about `budget_s` in all, warm-up included.

    At least three samples are taken however long they last, and at most 100.
    A disturbance of a second then falls on a few samples of every call, where medians withstand
    it, and not on all samples of one. Samples are in order of time, as many of each call.
    """
    sampler = sampler or clock_sampler()
    spent_s, calls_of = 0.0, dict[K, int]()
    for key, call in calls.items():
        calls_of[key], seconds = _warm_up(call, budget_s / len(calls), sampler)
        spent_s += seconds
    samples: dict[K, list[float]] = {key: [] for key in calls}
    taken = 0
    while taken < MIN_SAMPLES or (taken < MAX_SAMPLES and spent_s < budget_s):
        for key, call in calls.items():
            seconds = sampler(call, calls_of[key])
            spent_s += seconds
            samples[key].append(max(seconds, 1e-12) / calls_of[key])
        taken += 1
    return samples


def _warm_up(call: Call, budget_s: float, sampler: Sampler) -> tuple[int, float]:
    """How many calls make a sample, and the seconds that finding it out took."""
    spent_s = first_s = sampler(call, 1)
    calls = max(1, ceil(MIN_SAMPLE_S / max(first_s, 1e-9)))
    if calls > 1:  # the first call is often much slower than the rest
        again_s = sampler(call, calls)
        spent_s += again_s
        calls = min(10_000, max(1, ceil(calls * MIN_SAMPLE_S / max(again_s, 1e-9))))
    elif first_s < budget_s / 10:
        for _ in range(WARM_UP_SAMPLES - 1):
            spent_s += sampler(call, 1)
    return calls, spent_s


def summarise(samples: Sequence[float]) -> Timing:
    """Median and percentiles of seconds."""
    return Timing(*middle_and_ends(samples), len(samples))


def middle_and_ends(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = quantiles(values, n=10, method="inclusive")
    return cuts[4], cuts[1], cuts[7]


def measured(value: float, spread: Sequence[float], note: str = "", samples: int | None = None) -> Figure:
    """A measured figure whose 20th and 80th percentile are those of repeated measurements."""
    _, low, high = middle_and_ends([*spread, value])
    low, high = min(low, value), max(high, value)
    return Figure(
        value=significant(value),
        source=Source.MEASURED,
        note=note,
        samples=len(spread) if samples is None else samples,
        p20=significant(low),
        p80=significant(high),
    )
