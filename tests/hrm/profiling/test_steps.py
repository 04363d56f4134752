"""The runner of measurements: order, progress, interruption at any step, and going on."""

import json
from contextlib import closing
from dataclasses import replace
from math import inf
from statistics import median

import pytest

from hrm.errors import ProfileError
from hrm.hardware import Figure, Rate, Source
from hrm.profiling.environment import BUSY
from hrm.profiling.machine.journal import Journal, partial_path
from hrm.profiling.machine.steps import FEWEST_PASSES, ProfilingInterrupted, Steps
from hrm.profiling.timing import Timing
from tests.hrm.profiling.fakes import Clock

MEASURES = {"accelerator": "cpu", "mode": "quick"}
KINDS = {
    "launch": (Timing, Timing(1e-6, 0.9e-6, 1.2e-6, 30)),
    "gemm": (Rate | None, Rate(achieved=Figure(value=1e9, source=Source.MEASURED, curve=((1.0, 2.0), (4.0, 3.0))))),
    "missing": (Rate | None, None),
    "sweep": (dict[int, Timing], {1: Timing(1.0, 0.9, 1.1, 3), 16: Timing(0.1, 0.1, 0.1, 3)}),
    "words": (tuple[str, ...], ("a", "b")),
}


def steps_of(keeper=None, *, ran=None, stop_at=None, error: BaseException | None = None) -> Steps:
    """Steps of every kind of result; the one named `stop_at` is interrupted."""
    steps = Steps(inf, 10.0, keeper=keeper)
    for name, (kind, found) in KINDS.items():

        def run(seconds, name=name, found=found):
            if ran is not None:
                ran.append(name)
            if name == stop_at:
                raise error or KeyboardInterrupt
            return found

        steps.add(name, 1, run, kind)
    return steps


EXPECTED = {name: found for name, (_, found) in KINDS.items()}


def journal(path, **changes) -> closing[Journal]:
    return closing(Journal(path, MEASURES, **({"date": "today", "resume": True} | changes)))


def test_steps_run_in_order_with_their_share_of_the_time():
    steps, seconds = Steps(inf, 12.0), []
    for weight in (1, 2, 3):
        steps.add(str(weight), weight, lambda s: seconds.append(s) or s, float)
    assert steps.run() == {"1": 2.0, "2": 4.0, "3": 6.0}
    assert seconds == [2.0, 4.0, 6.0]


def test_parts_are_as_long_as_asked_for_where_there_is_time():
    for most_s, part_s in ((100.0, 2.0), (9.0, 1.5)):
        steps = Steps(2.0, most_s)
        steps.add("one", 1, lambda s: s, float)
        steps.add("five", 5, lambda s: s, float)
        assert steps.run() == {"one": part_s, "five": 5 * part_s}


def passes_of(count: int, *, most_s: float = 100.0, each_s: float = 1.0, **more) -> Steps:
    """Two steps in several passes, and one that is taken once; each finds how often it ran."""
    clock = Clock()
    steps = Steps(inf, most_s, passes=count, clock=clock, **more)
    for name, once in (("a", False), ("once", True), ("b", False)):
        ran = iter(range(100))

        def run(_seconds, ran=ran):
            clock.pass_(each_s)
            return float(next(ran))

        steps.add(name, 1, run, float, once=once)
    return steps


def test_passes_take_turns_and_are_combined():
    told = []
    steps = passes_of(3, progress=lambda *now: told.append(now[2]))
    assert steps.run() == {"a": 1.0, "once": 0.0, "b": 1.0}
    assert told == ["a (1 of 3)", "once", "b (1 of 3)", "a (2 of 3)", "b (2 of 3)", "a (3 of 3)", "b (3 of 3)", "done"]
    assert len(steps.disturbances) == 3


def test_passes_share_the_time_of_a_step():
    steps, seconds = Steps(2.0, 100.0, passes=4), []
    steps.add("each", 3, lambda s: seconds.append(s) or s, float)
    steps.add("once", 3, lambda s: seconds.append(s) or s, float, once=True)
    steps.run()
    assert seconds == [1.5, 6.0, 1.5, 1.5, 1.5]


def test_steps_see_what_was_found_in_the_same_pass():
    first, seen = iter((10.0, 30.0, 20.0)), []
    steps = Steps(inf, 1.0, passes=3)
    steps.add("first", 1, lambda _: next(first), float)
    steps.add("second", 1, lambda _: seen.append(steps.found["first"]) or 0.0, float)
    assert steps.run()["first"] == 20.0
    assert seen == [10.0, 30.0, 20.0]


def test_passes_that_would_end_too_late_are_left_out():
    """A pass takes 2 s, and the first one 3: a fourth would end at 9 s."""
    for most_s, made in ((9.5, 3), (10.0, 4), (13.0, 5), (1.0, FEWEST_PASSES)):
        steps = passes_of(5, most_s=most_s)
        steps.run()
        assert len(steps.disturbances) == made, most_s


class Neighbour:
    """Keeps these shares of the machine in one pass after the other, and nothing afterwards."""

    def __init__(self, *shares: float) -> None:
        self.shares = iter(shares)

    def __call__(self) -> "Neighbour":
        self.now = next(self.shares, 0.0)
        return self

    def share(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("shares", "most_s", "used"),
    [
        ((0.0, 0.04, 0.0, 0.0), 99.0, [0, 1, 2, 3]),
        ((0.0, 0.5, 0.0, 0.0), 99.0, [0, 2, 3, 4]),  # a fifth pass in place of the second
        ((0.5, 0.0, 0.0, 0.0, 0.5), 99.0, [1, 2, 3, 5]),  # and a sixth in place of the fifth
        ((0.0, 0.5, 0.0, 0.0), 10.0, [0, 2, 3]),  # no time for a fifth
        ((0.0, 0.5, 0.5, 0.0), 10.0, [0, 1, 2, 3]),  # nor are the others enough
        ((0.5,) * 99, 99.0, list(range(8))),  # it never ends: twice as many, and all count
    ],
)
def test_disturbed_passes_are_made_again_and_set_aside(shares, most_s, used):
    steps = passes_of(4, most_s=most_s, watch=Neighbour(*shares))
    found = steps.run()
    assert steps.passes_used == used
    made = steps.disturbances
    assert (steps.disturbance > BUSY) is (len(used) == len(made) and max(made) > BUSY)
    assert found == {"a": median(used), "once": 0.0, "b": median(used)}


def test_one_pass_is_not_made_again():
    steps = passes_of(1, watch=Neighbour(0.5))
    assert steps.run() == {"a": 0.0, "once": 0.0, "b": 0.0}
    assert steps.passes_used == [0]


def interrupt(steps, *, turn):
    """Have the last step interrupted when it is made for the `turn`th time, from 0 on."""
    turns, real = iter(range(100)), steps.steps[2].run

    def stopped(seconds):
        if next(turns) == turn:
            raise KeyboardInterrupt
        return real(seconds)

    steps.steps[2] = replace(steps.steps[2], run=stopped)


def test_which_passes_were_disturbed_is_known_when_it_goes_on(tmp_path):
    """Interrupted in the pass in place of a disturbed one."""
    path, told = tmp_path / "partial", []
    with journal(path) as kept:
        steps = passes_of(3, keeper=kept, watch=Neighbour(0.0, 0.5))
        interrupt(steps, turn=3)
        with pytest.raises(ProfilingInterrupted) as caught:
            steps.run()
    assert caught.value.lost == ("b (1 in place of a disturbed one)",)
    with journal(path) as kept:
        steps = passes_of(3, keeper=kept, watch=Neighbour(), progress=lambda *x: told.append(x[2]))
        steps.run()
    assert told == ["b (1 in place of a disturbed one)", "done"]
    assert steps.disturbances == [0.0, 0.5, 0.0, 0.0]
    assert steps.passes_used == [0, 2, 3]


def test_a_pass_that_was_interrupted_goes_on(tmp_path):
    path = tmp_path / "partial"
    with journal(path) as kept:
        steps = passes_of(3, keeper=kept)
        interrupt(steps, turn=1)
        with pytest.raises(ProfilingInterrupted) as caught:
            steps.run()
    assert caught.value.measured == ("a (1 of 3)", "once", "b (1 of 3)", "a (2 of 3)")
    assert caught.value.lost == ("b (2 of 3)", "a (3 of 3)", "b (3 of 3)")
    with journal(path) as kept:
        steps = passes_of(3, keeper=kept)
        assert steps.run() == {"a": 0.0, "once": 0.0, "b": 0.0}  # 0 1 0, and 0 0 1
        assert steps.recalled == list(caught.value.measured)


def test_later_steps_see_what_earlier_ones_found():
    steps = Steps(inf, 1.0)
    steps.add("first", 1, lambda _: 20, int)
    steps.add("second", 1, lambda _: steps.found["first"] + 1, int)
    assert steps.run()["second"] == 21


def test_progress_grows_with_the_delay_and_ends():
    clock, told = Clock(), []
    steps = Steps(inf, 10.0, lambda *told_now: told.append(told_now), clock=clock)
    for name in "abcd":
        steps.add(name, 1, lambda _: clock.pass_(5.0), type(None))  # planned were 2.5 s
    steps.run()
    assert [text for _, _, text in told] == [*"abcd", "done"]
    assert [done for done, _, _ in told] == [0.0, 5.0, 10.0, 15.0, 20.0]
    assert [total for _, total, _ in told] == [10.0, 20.0, 20.0, 20.0, 20.0]


def test_a_quick_start_does_not_promise_an_early_end():
    clock, told = Clock(), []
    steps = Steps(inf, 10.0, lambda *told_now: told.append(told_now), clock=clock)
    for name in "ab":
        steps.add(name, 1, lambda _: clock.pass_(1.0), type(None))
    steps.run()
    assert told[1][:2] == (1.0, 6.0)


@pytest.mark.parametrize("stop_at", KINDS)
def test_interrupted_anywhere_it_goes_on_and_finds_the_same(tmp_path, stop_at):
    path = tmp_path / "machine.yaml.partial"
    names = list(KINDS)
    before, after = [], []
    with journal(path) as kept, pytest.raises(ProfilingInterrupted) as caught:
        steps_of(kept, ran=before, stop_at=stop_at).run()
    index = names.index(stop_at)
    assert caught.value.measured == tuple(names[:index])
    assert caught.value.lost == tuple(names[index:])
    assert f"not measured: {stop_at}" in str(caught.value)
    assert path.exists() is (index > 0), "an empty journal is not left behind"

    with journal(path) as kept:
        steps = steps_of(kept, ran=after)
        assert steps.run() == EXPECTED
    assert before == names[: index + 1]
    assert after == names[index:], "what was measured is not measured again"
    assert steps.recalled == names[:index]


def test_interrupted_twice_it_still_goes_on(tmp_path):
    path = tmp_path / "partial"
    for stop_at in ("gemm", "sweep"):
        with journal(path) as kept, pytest.raises(ProfilingInterrupted):
            steps_of(kept, stop_at=stop_at).run()
    ran = []
    with journal(path) as kept:
        assert steps_of(kept, ran=ran).run() == EXPECTED
    assert ran == ["sweep", "words"]


def test_what_fails_keeps_what_was_measured(tmp_path):
    path = tmp_path / "partial"
    with journal(path) as kept, pytest.raises(RuntimeError, match="out of luck"):
        steps_of(kept, stop_at="words", error=RuntimeError("out of luck")).run()
    ran = []
    with journal(path) as kept:
        steps_of(kept, ran=ran).run()
    assert ran == ["words"]


def test_a_torn_last_line_is_measured_again(tmp_path):
    path = tmp_path / "partial"
    with journal(path) as kept:
        steps_of(kept).run()
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])  # the process was killed while it wrote
    ran = []
    with journal(path) as kept:
        assert steps_of(kept, ran=ran).run() == EXPECTED
    assert ran == ["words"]
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()[1:]] == list(KINDS)


def test_without_resume_the_file_is_begun_anew(tmp_path):
    path = tmp_path / "partial"
    with journal(path) as kept:
        steps_of(kept).run()
    ran = []
    with journal(path, resume=False) as kept:
        steps_of(kept, ran=ran).run()
    assert ran == list(KINDS)


def test_seconds_and_date_of_before_are_known(tmp_path):
    path, clock = tmp_path / "partial", Clock()
    with journal(path, date="yesterday") as kept:
        steps = Steps(inf, 1.0, keeper=kept, clock=clock)
        steps.add("slow", 1, lambda _: clock.pass_(7.0), type(None))
        steps.run()
    with journal(path) as kept:
        assert kept.seconds == 7.0
        assert kept.date == "yesterday"


def test_figures_of_another_kind_are_measured_again(tmp_path):
    path = tmp_path / "partial"
    with journal(path) as kept:
        kept.keep("launch", 1.0, {"seconds": "of another version"})
    ran = []
    with journal(path) as kept:
        steps_of(kept, ran=ran).run()
    assert ran[0] == "launch"


@pytest.mark.parametrize(
    ("measures", "message"),
    [
        ({"mode": "full"}, r"partial: mode is 'quick': differs from full, which is measured now"),
        ({"--disk": "/"}, r"partial: --disk is 'not given': differs from /"),
    ],
)
def test_other_measurements_are_not_mixed(tmp_path, measures, message):
    path = tmp_path / "partial"
    with journal(path) as kept:
        kept.keep("launch", 1.0, None)
    with pytest.raises(ProfileError, match=message):
        Journal(path, MEASURES | measures, date="", resume=True)


def test_a_file_that_is_none_of_ours_is_refused(tmp_path):
    path = tmp_path / "partial"
    path.write_text("schema: 1\n")
    with pytest.raises(ProfileError, match="must be what hrm profile has left there"):
        journal(path)
    assert path.read_text() == "schema: 1\n"
    with pytest.raises(ProfileError, match="must be writable"):
        journal(tmp_path)


def test_partial_lies_beside_the_profile(tmp_path):
    assert partial_path(tmp_path / "a.yaml") == tmp_path / "a.yaml.partial"
