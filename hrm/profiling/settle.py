"""A GPU under load until its clock has settled: cards that get hot or starve run slower then."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Final

import torch

from hrm.profiling.gpu import AbstractGpu

THROTTLED: Final = 0.10  # a clock or a rate that falls by more is named
SIDE: Final = 8192
BATCH_S: Final = 0.25  # so much work is queued before the clock is read


@dataclass(frozen=True, slots=True)
class Settling:
    """What happened under load: clocks in MHz where they can be read, and GEMM rates."""

    idle_mhz: float | None
    peak_mhz: float | None
    settled_mhz: float | None
    peak_flops_per_s: float
    settled_flops_per_s: float
    slowed_by: tuple[str, ...] = ()

    @property
    def clocks_mhz(self) -> tuple[float, float] | None:
        """The highest and the settled clock; None where they cannot be read, which may be told as 0."""
        peak, settled = self.peak_mhz, self.settled_mhz
        return None if peak is None or settled is None or min(peak, settled) <= 0 else (peak, settled)

    @property
    def drop(self) -> float:
        """Share by which the clock fell under load, or the rate where no clock can be read."""
        rate = 1 - self.settled_flops_per_s / self.peak_flops_per_s
        if self.clocks_mhz is None:
            return max(0.0, rate)
        peak, settled = self.clocks_mhz
        return max(1 - settled / peak, rate)

    def warnings(self, name: str) -> list[str]:
        """That the GPU throttles, if it does."""
        if self.drop <= THROTTLED:
            return []
        clocks = ""
        if self.clocks_mhz is not None:
            peak, settled = self.clocks_mhz
            clocks = f" (clock {peak:.0f} to {settled:.0f} MHz)"
        why = f", by {' and '.join(self.slowed_by)}" if self.slowed_by else ""
        told = f"{name} throttles: it got {self.drop:.0%} slower under load{clocks}{why}"
        return [f"{told}; the figures are those after it slowed down"]


def settle(
    gpu: AbstractGpu, *, seconds: float, side: int | None = None, clock: Callable[[], float] = time.perf_counter
) -> Settling:
    """Multiply large random matrices for so long, and see what clock and rate do meanwhile."""
    side = SIDE if side is None else side
    idle_mhz = gpu.clock_mhz()
    kind = torch.float16 if gpu.device != "cpu" else torch.float32
    x = torch.randn(side, side, device=gpu.device).to(kind)
    out = torch.empty_like(x)

    def timed(count: int) -> tuple[float, float | None]:
        """Rate of so many products, and the clock while they are computed."""
        start_s = clock()
        for _ in range(count):
            torch.mm(x, x, out=out)
        mhz = gpu.clock_mhz()
        gpu.wait()
        return count * 2.0 * side**3 / max(clock() - start_s, 1e-9), mhz

    timed(1)
    first, _ = timed(1)
    count = max(1, min(1000, round(BATCH_S * first / (2.0 * side**3))))
    rates: list[float] = []
    clocks: list[float] = []
    slowed: tuple[str, ...] = ()
    end_s = clock() + seconds
    while len(rates) < 3 or clock() < end_s:
        rate, mhz = timed(count)
        rates.append(rate)
        clocks += [] if mhz is None else [mhz]
        slowed = gpu.slowed_by()
    last = -(-len(rates) // 3)
    return Settling(
        idle_mhz=idle_mhz,
        peak_mhz=max(clocks, default=None),
        settled_mhz=median(clocks[-last:]) if clocks else None,
        peak_flops_per_s=max(rates),
        settled_flops_per_s=median(rates[-last:]),
        slowed_by=slowed,
    )
