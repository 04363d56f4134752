"""Two profiles beside each other: what differs, by how much, and whether by more than noise."""

import json
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hrm.hardware import Cache, Disk, Figure, HardwareProfile, LaneThreads, MemoryLevel, Rate, Source
from hrm.machines import compose, save_profile
from hrm.profile_diff import FigureDiff, Verdict, diff_profiles, figures_of
from tests.hrm.profiling.fakes import figures_of as figures_found_otherwise
from tests.hrm.support import machine


def measured(value: float, low: float | None = None, high: float | None = None, curve=()) -> Figure:
    return Figure(value=value, source=Source.MEASURED, p20=low, p80=high, curve=curve)


def full_machine() -> HardwareProfile:
    """A machine with everything that a profile may hold."""
    profile = machine()
    figure = measured(0.5, 0.4, 0.6)
    host = replace(
        profile.host,
        caches=(Cache(name="L1", capacity_bytes=figure, read_bytes_per_s=Rate(achieved=figure)),),
        shared_bytes_per_s=Rate(achieved=figure),
    )
    return replace(
        profile,
        levels=(profile.top, host),
        lane_threads=LaneThreads(cores=2, task_s=figure),
        disk=Disk(path="/", capacity_bytes=figure, read_bytes_per_s=Rate(achieved=figure)),
    )


def with_read(profile: HardwareProfile, figure: Figure) -> HardwareProfile:
    host = replace(profile.host, read_bytes_per_s=Rate(achieved=figure))
    return replace(profile, levels=(profile.top, host))


@pytest.mark.parametrize("profile", [full_machine(), compose("4xT4")], ids=["full", "4xT4"])
def test_every_figure_is_found_under_a_name_of_its_own(profile):
    named, others = figures_of(profile), figures_found_otherwise(profile)
    assert sorted(map(repr, named.values())) == sorted(map(repr, others.values()))


def test_names_can_be_read():
    names = figures_of(full_machine())
    assert {
        "gpu.processor.compute_flops_per_s.bfloat16.achieved",
        "cpu.read_bytes_per_s.achieved",
        "cpu.caches.L1.read_bytes_per_s.achieved",
        "cpu->gpu pinned.bandwidth_bytes_per_s.achieved",
        "cpu->gpu pinned.latency_s",
        "disk.read_bytes_per_s.achieved",
        "lane_threads.task_s",
    } <= set(names)


def test_a_profile_does_not_differ_from_itself():
    diff = diff_profiles(full_machine(), full_machine())
    assert diff.different == []
    assert diff.only_first == diff.only_second == ()
    assert diff.environment == {}
    assert len(diff.figures) == len(figures_of(full_machine()))


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        ((10, 9, 11), (12, 11, 13), Verdict.WITHIN),
        ((10, 9, 11), (12.4, 11.4, 13), Verdict.WITHIN),
        ((10, 9, 11), (12.5, 11.5, 13), Verdict.BEYOND),
        ((12.5, 11.5, 13), (10, 9, 11), Verdict.BEYOND),
        ((10, 1, 11), (12.5, 11.5, 99), Verdict.BEYOND),  # the sides towards each other count
        ((10, 9, 11), (11.7, None, None), Verdict.WITHIN),
        ((10, 9, 11), (11.8, None, None), Verdict.BEYOND),
        ((0, 0, 1e-6), (1e-6, 0.5e-6, 2e-6), Verdict.WITHIN),
        ((0, None, None), (1e-6, 0.9e-6, 2e-6), Verdict.BEYOND),
        ((10, None, None), (12, None, None), Verdict.UNKNOWN),
        ((10, 10.2, 10.4), (10.1, None, None), Verdict.WITHIN),
    ],
)
def test_verdicts(first, second, verdict):
    diff = FigureDiff(name="x", first=measured(*first), second=measured(*second))
    assert diff.verdict is verdict
    expected = second[0] / first[0] - 1 if first[0] else float("inf")
    assert diff.change == pytest.approx(expected)


spreads = st.tuples(st.floats(1, 10), st.floats(0, 1), st.floats(0, 1)).map(
    lambda x: measured(x[0], x[0] - x[1], x[0] + x[2])
)


@given(spreads, spreads)
def test_verdicts_are_those_of_either_order(first, second):
    one = FigureDiff(name="x", first=first, second=second)
    other = FigureDiff(name="x", first=second, second=first)
    assert one.verdict is other.verdict
    assert (1 + one.change) * (1 + other.change) == pytest.approx(1)
    if one.verdict is Verdict.BEYOND:
        assert max(first.p20, second.p20) > min(first.p80, second.p80), "spreads do not overlap"


@given(spreads, st.floats(0.01, 0.5))
def test_what_would_be_told_is_told(figure, change):
    """A figure that is a share higher, and spreads as much, differs just if that would be told."""
    factor = 1 + change
    changed = measured(figure.value * factor, figure.p20 + change * figure.value, figure.p80 * factor)
    diff = FigureDiff(name="x", first=figure, second=changed)
    assume(abs(diff.apart - change * figure.value) > 1e-9)
    assert diff.tells(change) is (diff.verdict is Verdict.BEYOND)


def test_the_largest_change_comes_first():
    first, second = machine(cpu_read=100e9, link=10e9), machine(cpu_read=90e9, link=30e9)
    changes = {figure.name: figure.change for figure in diff_profiles(first, second).different}
    assert changes["cpu.read_bytes_per_s.achieved"] == pytest.approx(-0.1)
    assert changes["cpu->gpu pinned.bandwidth_bytes_per_s.achieved"] == pytest.approx(2.0)
    sizes = [abs(change) for change in changes.values()]
    assert sizes == sorted(sizes, reverse=True)


def test_curves_are_compared_where_both_have_points():
    first = with_read(machine(), measured(100, curve=((1, 10), (2, 20), (4, 40))))
    second = with_read(machine(), measured(100, curve=((1, 10.5), (2, 10), (8, 80))))
    (only,) = diff_profiles(first, second).different
    assert only.change == 0
    assert only.curve_change == (2, -0.5)


def test_what_only_one_has_is_named():
    diff = diff_profiles(machine(), full_machine())
    assert diff.only_first == ()
    assert "disk.capacity_bytes" in diff.only_second
    assert diff_profiles(full_machine(), machine()).only_first == diff.only_second


def test_from_nothing_is_infinitely_more():
    diff = diff_profiles(machine(latency_s=0.0), machine(latency_s=1e-6))
    assert {figure.change for figure in diff.different} == {float("inf")}
    assert diff_profiles(machine(), machine()).count(Verdict.UNKNOWN) == 0


def test_the_environment_is_compared_but_not_the_run():
    first = replace(machine(), environment={"torch": "1", "date": "monday", "gpu": "a"})
    second = replace(machine(), environment={"torch": "2", "date": "tuesday", "cpu": "b"})
    assert diff_profiles(first, second).environment == {"torch": ("1", "2"), "gpu": ("a", "–"), "cpu": ("–", "b")}


# ------------------------------------------------------------------------ hrm profiles diff


@pytest.fixture
def files(tmp_path):
    """Reads of 100 and 90 GB/s that spread little, and a launch that differs within its spread."""

    def processor(level: MemoryLevel, launch: Figure) -> MemoryLevel:
        return replace(level, processor=replace(level.processor, launch_latency_s=launch))

    paths = []
    for name, read, launch in (
        ("before", measured(100e9, 99e9, 101e9), measured(1e-6, 0.9e-6, 1.2e-6)),
        ("after", measured(90e9, 89e9, 91e9), measured(1.15e-6, 1e-6, 1.3e-6)),
    ):
        profile = with_read(machine(), read)
        levels = (processor(profile.top, launch), profile.host)
        environment = {"date": name, "torch": name, "warnings": f"busy {name}"}
        paths.append(tmp_path / f"{name}.yaml")
        save_profile(paths[-1], replace(profile, levels=levels, environment=environment))
    return paths


def test_diff_shows_what_differs_beyond_the_spread(hrm, files):
    code, out, err = hrm("profiles", "diff", *files)
    assert (code, err) == (0, "")
    assert "cpu.read_bytes_per_s.achieved" in out
    assert "100 GB/s" in out
    assert "90.0 GB/s" in out
    assert "-10.0%" in out
    assert "beyond the spread" in out
    assert "launch_latency_s" not in out
    assert "torch: before → after" in out
    assert "warnings: busy before" in out
    assert "a change of 10% would be told in 1 of the 2 with spreads (!: over 8%)" in out
    assert "1 differ within the spread, 1 differ beyond the spread" in out
    assert "0 differ with no spread recorded" in out


def test_diff_shows_all_if_asked(hrm, files):
    _, out, _ = hrm("profiles", "diff", "--all", *files)
    assert "gpu.processor.launch_latency_s" in out
    assert "1.00 µs" in out


def test_diff_as_json(hrm, files):
    _, out, _ = hrm("profiles", "diff", *files, "--json")
    diff = json.loads(out)
    assert [(x["name"], x["verdict"]) for x in diff["figures"]] == [
        ("gpu.processor.launch_latency_s", "within"),
        ("cpu.read_bytes_per_s.achieved", "beyond"),
    ]
    assert diff["figures"][1]["change"] == pytest.approx(-0.1)
    assert diff["counts"] == {"within": 1, "beyond": 1, "unknown": 0}
    assert (diff["tell_10_percent"], diff["judged"]) == (1, 2)
    assert diff["figures"][1]["apart"] == pytest.approx(2.45e9)
    assert diff["environment"]["torch"] == ["before", "after"]


def test_diff_of_the_same_file_is_empty(hrm, files):
    code, out, _ = hrm("profiles", "diff", files[0], files[0])
    assert code == 0
    assert "0 differ within the spread, 0 differ beyond the spread" in out


def test_diff_takes_machines_of_the_catalog(hrm):
    code, out, _ = hrm("profiles", "diff", "T4", "2xT4")
    assert code == 0
    assert "gpu.read_bytes_per_s.datasheet" in out
    assert "×2" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["diff", "4xT4"], "hrm profiles is 'diff 4xT4': takes one name, or diff and two names"),
        (["diff"], "hrm profiles is 'diff'"),
        (["4xT4", "L4"], "takes one name, or diff and two names"),
        (["diff", "4xT4", "nowhere.yaml"], "nowhere.yaml is <No such file"),
    ],
)
def test_mistakes_are_one_line(hrm, args, message):
    code, out, err = hrm("profiles", *args)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
