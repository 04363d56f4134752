"""What workers get together, from rates that are known, and threads that always end."""

import threading
import time

import pytest

from hrm.hardware import Figure, Rate, Source
from hrm.profiling import contention
from hrm.profiling.contention import WINDOW_S, BusyLane, bytes_together, run_together, shared_roof

NOTHING = BusyLane(lambda: None, lambda: None)


def sleeper(seconds: float, host_bytes: float = 0.0) -> BusyLane:
    return BusyLane(lambda: time.sleep(seconds), lambda: None, host_bytes)


def test_bytes_are_the_sums_of_the_workers_in_every_round(monkeypatch):
    """Rounds of 100 and 10 calls a second, then twice and half as many."""
    rates = iter([{"a": 100.0, "b": 10.0}, {"a": 200.0, "b": 5.0}])
    monkeypatch.setattr(contention, "run_together", lambda _workers, _seconds: next(rates))
    workers = {"a": BusyLane(NOTHING.call, NOTHING.enter, 3.0), "b": BusyLane(NOTHING.call, NOTHING.enter, 1000.0)}
    found = bytes_together(workers, budget_s=2.5 * WINDOW_S)
    sums = (100 * 3 + 10 * 1000, 200 * 3 + 5 * 1000)
    assert found.value == pytest.approx(sum(sums) / 2, rel=1e-4)
    assert found.spread > 0
    assert (found.samples, found.source) == (2, Source.MEASURED)
    assert found.note.startswith("a, b at once")


@pytest.mark.parametrize(("together", "is_roof"), [(40e9, True), (33e9, True), (32e9, False)])
def test_a_roof_is_one_only_where_it_was_reached(together, is_roof):
    def figure(value):
        return Figure(value=value, source=Source.MEASURED)

    roof = shared_roof(figure(together), Rate(achieved=figure(33e9)))
    assert (roof is not None) is is_roof
    assert roof is None or roof.planned.value == together


def test_each_thread_enters_once_and_works_at_least_once():
    entered, worked = [], []
    workers = {
        name: BusyLane(lambda name=name: worked.append(name), lambda name=name: entered.append(name)) for name in "ab"
    }
    rates = run_together(workers, 0.0)
    assert sorted(entered) == ["a", "b"]
    assert set(worked) == {"a", "b"}
    assert all(rate > 0 for rate in rates.values())


def test_what_a_worker_raises_is_raised_and_ends_the_others():
    def fail():
        raise RuntimeError("no")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="no"):
        run_together({"a": NOTHING, "b": BusyLane(fail, lambda: None)}, 60.0)
    turns = iter(range(3))

    def fail_later():
        if next(turns) == 2:
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        run_together({"a": NOTHING, "b": BusyLane(fail_later, lambda: None)}, 60.0)
    assert threading.active_count() == before


def test_interrupted_it_leaves_no_thread_behind(monkeypatch):
    before = threading.active_count()
    join, calls = threading.Thread.join, []

    def interrupted(thread, timeout=None):
        calls.append(thread)
        if len(calls) == 1:
            raise KeyboardInterrupt
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_together({"a": NOTHING, "b": sleeper(0.001)}, 60.0)
    assert threading.active_count() == before
