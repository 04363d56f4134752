"""Links: sweeps over sizes, and a link that is paced."""

import time

import pytest
import torch

from hrm.contract.pacing import BACK_TO_BACK_S, CATCH_UP_S, PacedCopy
from hrm.hardware import Source
from hrm.profiling.link import host_transfer, measure_link, transfer_sizes
from hrm.units import KIB, MIB

SIZES = transfer_sizes(64 * MIB, quick=False)


def test_sizes():
    assert SIZES[0] == 4 * KIB
    assert SIZES[-1] == 64 * MIB
    assert transfer_sizes(64 * MIB, quick=True) == [4096, 32768, 262144, 2097152, 16777216]
    assert transfer_sizes(1, quick=True) == [1024, 4096]
    assert transfer_sizes(10**12, quick=False)[-1] == 512 * MIB


class Line:
    """A sampler by which a transfer of n bytes takes `seconds(n)`."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.size = 0

    def transfer(self, size):
        def call():
            self.size = size

        return call

    def sample(self, call, calls):
        call()
        return calls * self.seconds(self.size)


def test_straight_link_has_no_curve():
    line = Line(lambda size: 1e-5 + size / 1e10)
    link = measure_link("cpu", "gpu", line.transfer, sizes=SIZES, budget_s=0.1, sampler=line.sample)
    figure = link.bandwidth_bytes_per_s.planned
    assert figure.value == pytest.approx(1e10, rel=1e-3)
    assert figure.curve == ()
    assert figure.source is Source.MEASURED
    assert link.latency_s.value == pytest.approx(1e-5, rel=1e-3)
    assert link.seconds(MIB) == pytest.approx(1e-5 + MIB / 1e10, rel=1e-3)


def test_bent_link_keeps_its_curve():
    line = Line(lambda size: 1e-5 + size / (2e10 if size < MIB else 5e9))
    link = measure_link("cpu", "gpu", line.transfer, sizes=SIZES, budget_s=0.1, sampler=line.sample)
    figure = link.bandwidth_bytes_per_s.planned
    assert "a straight line misses" in figure.note
    assert figure.at(64 * MIB) == pytest.approx(5e9, rel=0.05)
    assert figure.at(512 * KIB) > 1.5e10


def test_spreads_are_those_of_fits_over_time():
    """A link whose every fourth transfer takes half as long again: medians keep to the rest."""
    turns = iter(range(10**6))
    line = Line(lambda size: (1e-5 + size / 1e10) * (1.5 if next(turns) % 4 == 0 else 1.0))
    link = measure_link("cpu", "gpu", line.transfer, sizes=SIZES, budget_s=10.0, sampler=line.sample)
    bandwidth = link.bandwidth_bytes_per_s.planned
    assert bandwidth.value == pytest.approx(1e10, rel=0.02)
    for figure in (bandwidth, link.latency_s):
        assert figure.p20 is not None
        assert figure.p80 is not None
        assert figure.p20 <= figure.value <= figure.p80
    assert "noisy" not in bandwidth.note


def test_staging_copies_what_it_says():
    target = torch.zeros(MIB, dtype=torch.uint8)
    copy = host_transfer(MIB, target)(64 * KIB)
    copy()
    assert int(target.count_nonzero()) == 64 * KIB


def test_staging_reads_something_else_each_time(monkeypatch):
    """What is read again comes out of a cache, which staging does not."""
    source = torch.arange(256, dtype=torch.uint8)
    monkeypatch.setattr(torch, "ones", lambda *_args, **_rest: source)
    target = torch.zeros(64, dtype=torch.uint8)
    copy, first = host_transfer(256, target)(60), []
    for _ in range(5):
        copy()
        first.append(int(target[0]))
    assert first == [0, 60, 120, 180, 0]


# ------------------------------------------------------------------------------------- pacing


class Clock:
    """A clock whose sleeps overshoot."""

    def __init__(self, overshoot_s=0.0):
        self.now_s, self.overshoot_s = 100.0, overshoot_s

    def __call__(self):
        self.now_s += 1e-7
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds + self.overshoot_s

    def paced(self, latency_s=1e-5, bandwidth=1e9):
        return PacedCopy(latency_s=latency_s, bandwidth_bytes_per_s=bandwidth, clock=self, sleep=self.sleep)


@pytest.mark.parametrize(
    ("overshoot_s", "queued"),
    [(0.0, True), (0.0, False), (BACK_TO_BACK_S / 2, True), (BACK_TO_BACK_S / 2, False), (1e-3, True)],
)
def test_late_wake_ups_do_not_add_up(overshoot_s, queued):
    clock = Clock(overshoot_s)
    pace = clock.paced()
    start_s = clock.now_s
    for _ in range(100):
        pace.run(lambda: None, MIB, ready_s=start_s if queued else None)
    assert clock.now_s - start_s == pytest.approx(100 * pace.seconds(MIB), rel=0.02)


def test_link_that_was_idle_starts_afresh():
    clock = Clock()
    pace = clock.paced()
    pace.run(lambda: None, MIB)
    clock.now_s += 1.0
    start_s = clock.now_s
    pace.run(lambda: None, MIB)
    assert clock.now_s - start_s == pytest.approx(pace.seconds(MIB), rel=0.01)


def test_copy_slower_than_the_link_is_not_caught_up_with():
    clock = Clock()
    pace = clock.paced()
    pace.run(lambda: clock.sleep(1.0), MIB)
    start_s = clock.now_s
    pace.run(lambda: None, 100 * MIB, ready_s=0.0)
    assert clock.now_s - start_s >= pace.seconds(100 * MIB) - CATCH_UP_S - 1e-6


def test_a_real_clock_never_sees_it_faster_than_stated():
    pace = PacedCopy(latency_s=20e-6, bandwidth_bytes_per_s=2e9)
    size, count = 4 * MIB, 20
    source, target = bytes(range(256)) * (size // 256), bytearray(size)

    def copy():
        target[:] = source

    start_s = time.perf_counter()
    for _ in range(count):
        pace.run(copy, size, ready_s=start_s)
    assert time.perf_counter() - start_s >= count * pace.seconds(size)
    assert target == source
