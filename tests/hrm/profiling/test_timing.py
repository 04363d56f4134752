"""One timing discipline, against a clock that the tests turn."""

import pytest

from hrm.hardware import Source
from hrm.profiling.timing import (
    MAX_SAMPLES,
    MIN_SAMPLE_S,
    MIN_SAMPLES,
    Timing,
    clock_sampler,
    measured,
    significant,
    summarise,
    time_each,
)
from tests.hrm.profiling.fakes import time_call


class Clock:
    """Time that passes only in `work`."""

    def __init__(self, *seconds: float) -> None:
        self.now_s, self.calls, self.seconds = 0.0, 0, seconds

    def __call__(self) -> float:
        return self.now_s

    def work(self) -> None:
        self.now_s += self.seconds[min(self.calls, len(self.seconds) - 1)]
        self.calls += 1

    def timed(self, budget_s: float) -> Timing:
        return time_call(self.work, budget_s=budget_s, sampler=clock_sampler(self))


def test_slow_call_is_sampled_the_least_number_of_times():
    clock = Clock(2.0)
    timing = clock.timed(budget_s=1.0)
    assert (timing.median_s, timing.samples) == (2.0, MIN_SAMPLES)
    assert clock.calls == MIN_SAMPLES + 1  # the first warms up


def test_first_call_is_not_counted():
    assert Clock(10.0, 0.1).timed(budget_s=1.0).median_s == pytest.approx(0.1)


def test_short_calls_are_timed_together():
    clock = Clock(1e-6)
    timing = clock.timed(budget_s=0.02)
    assert timing.median_s == pytest.approx(1e-6)
    assert timing.samples == pytest.approx(0.02 / MIN_SAMPLE_S, rel=0.2)


def test_slow_first_call_does_not_make_samples_too_short():
    clock = Clock(MIN_SAMPLE_S / 2, 1e-6)
    clock.timed(budget_s=10 * MAX_SAMPLES * MIN_SAMPLE_S)
    assert clock.calls > 0.9 * MAX_SAMPLES * MIN_SAMPLE_S / 1e-6


def test_budget_is_kept():
    clock = Clock(0.01)
    timing = clock.timed(budget_s=0.5)
    assert clock.now_s == pytest.approx(0.5, abs=0.03)
    assert timing.samples < MAX_SAMPLES
    assert Clock(0.01).timed(budget_s=100).samples == MAX_SAMPLES


def test_spread_and_noise():
    calm = summarise([1.0, 1.01, 1.02, 1.03, 1.04, 1.05]).duration()
    wild = summarise([1.0, 1.0, 1.0, 2.0, 2.0, 2.0]).duration()
    assert calm.spread == pytest.approx(0.03 / 1.025, rel=1e-3)
    assert not calm.is_noisy
    assert wild.is_noisy
    assert summarise([3.0]) == Timing(3.0, 3.0, 3.0, 1)


def test_median_withstands_outliers():
    assert summarise([1.0] * 9 + [100.0]).median_s == 1.0


def test_figures():
    timing = Timing(2.0, 1.9, 2.1, 7)
    rate = timing.rate(10.0, "why")
    assert (rate.value, rate.source, rate.samples) == (5.0, Source.MEASURED, 7)
    assert rate.p20 == significant(10 / 2.1)
    assert rate.p80 == significant(10 / 1.9)
    assert timing.duration().value == 2.0
    assert timing.less(0.5).median_s == pytest.approx(1.5)
    assert timing.less(5.0).median_s == pytest.approx(0.4)


def test_calls_take_turns():
    """Each gets as many samples, and a disturbance in the middle touches all of them."""
    order = []
    now = [0.0]

    def call(name, seconds):
        def run():
            order.append(name)
            now[0] += seconds * (5.0 if 2.0 < now[0] < 3.0 else 1.0)

        return run

    calls = {"a": call("a", 0.05), "b": call("b", 0.1)}
    taken = time_each(calls, budget_s=6.0, sampler=clock_sampler(lambda: now[0]))
    assert set(map(len, taken.values())) == {len(taken["a"])}
    assert now[0] == pytest.approx(6.0, abs=0.5)
    sampled = order[-2 * len(taken["a"]) :]
    assert sampled == ["a", "b"] * len(taken["a"])
    for name, seconds in (("a", 0.05), ("b", 0.1)):
        assert max(taken[name]) == pytest.approx(5 * seconds)
        assert summarise(taken[name]).median_s == pytest.approx(seconds)


def test_a_fitted_figure_lies_within_its_spread():
    figure = measured(10.0, [10.5, 10.6, 10.7], "why", samples=30)
    assert figure.p20 is not None
    assert figure.p80 is not None
    assert figure.p20 <= figure.value < figure.p80
    assert (figure.samples, figure.note) == (30, "why")
    assert measured(10.0, [8.0, 12.0]).is_noisy
    assert measured(0.0, [0.0, 1e-6]).p20 == 0.0
