"""What is kept beside other work, from rates that are known, and threads that always end."""

import threading
import time

import pytest

from hrm.hardware import Figure, Rate, Source
from hrm.profiling.contention import (
    Worker,
    every_pair_and_all,
    measure_contention,
    run_together,
    shared_memory,
    shared_roof,
)

NOTHING = Worker(lambda: None, lambda: None)


def sleeper(seconds: float, host_bytes: float = 0.0) -> Worker:
    return Worker(lambda: time.sleep(seconds), lambda: None, host_bytes)


def test_groups_are_all_pairs_and_all():
    assert every_pair_and_all("ab") == [("a", "b")]
    assert every_pair_and_all("abc") == [("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")]


def test_shares_and_sums_of_known_rates():
    """Alone a does 100 a second and b 10; together they keep half and four fifths."""
    workers = {"a": sleeper(0, 3.0), "b": sleeper(0, 1000.0)}
    rounds = [
        {("a",): {"a": 100.0}, ("b",): {"b": 10.0}, ("a", "b"): {"a": 50.0, "b": 8.0}},
        {("a",): {"a": 200.0}, ("b",): {"b": 20.0}, ("a", "b"): {"a": 100.0, "b": 16.0}},
        {("a",): {"a": 100.0}, ("b",): {"b": 10.0}, ("a", "b"): {"a": 52.0, "b": 8.0}},
    ]
    found = shared_memory(workers, [("a", "b")], rounds)
    kept = {(entry.work, entry.beside): entry.kept for entry in found.kept}
    assert kept["a", ("b",)].value == pytest.approx((0.5 + 0.5 + 0.52) / 3, rel=1e-4)
    assert kept["b", ("a",)].value == 0.8
    assert kept["a", ("b",)].samples == 3
    assert kept["a", ("b",)].source is Source.MEASURED
    sums = (50 * 3 + 8 * 1000, 100 * 3 + 16 * 1000, 52 * 3 + 8 * 1000)
    assert found.together_bytes_per_s.value == pytest.approx(sum(sums) / 3, rel=1e-4)
    assert found.together_bytes_per_s.note.startswith("a, b at once")


def test_a_share_is_of_the_same_round():
    """A machine that turns twice as slow for a round changes no share."""
    rounds = [
        {("a",): {"a": r}, ("b",): {"b": r}, ("a", "b"): {"a": 0.7 * r, "b": 0.9 * r}} for r in (100.0, 50.0, 100.0)
    ]
    found = shared_memory({"a": NOTHING, "b": NOTHING}, [("a", "b")], rounds)
    for entry in found.kept:
        assert entry.kept.p20 == pytest.approx(entry.kept.p80)


@pytest.mark.parametrize(("together", "is_roof"), [(40e9, True), (33e9, True), (32e9, False)])
def test_a_roof_is_one_only_where_it_was_reached(together, is_roof):
    def figure(value):
        return Figure(value=value, source=Source.MEASURED)

    roof = shared_roof(figure(together), Rate(achieved=figure(33e9)))
    assert (roof is not None) is is_roof
    assert roof is None or roof.planned.value == together


def test_sleepers_take_nothing_from_one_another():
    workers = {name: sleeper(0.002, 8.0) for name in "abc"}
    groups = [*every_pair_and_all("ab"), ("b", "c")]
    found = measure_contention(workers, groups, budget_s=0.3)
    assert [(x.work, x.beside) for x in found.kept] == [("a", ("b",)), ("b", ("a",)), ("b", ("c",)), ("c", ("b",))]
    assert all(0 < entry.kept.value < 3 for entry in found.kept), found.kept


def test_each_thread_enters_once_and_works_at_least_once():
    entered, worked = [], []
    workers = {
        name: Worker(lambda name=name: worked.append(name), lambda name=name: entered.append(name)) for name in "ab"
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
        run_together({"a": NOTHING, "b": Worker(fail, lambda: None)}, 60.0)
    turns = iter(range(3))

    def fail_later():
        if next(turns) == 2:
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        run_together({"a": NOTHING, "b": Worker(fail_later, lambda: None)}, 60.0)
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
