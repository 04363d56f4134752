"""A figure of a profile that is added from outside, as CONTRIBUTING says: a field, a benchmark, a step."""

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest

from hrm.decoding import read_yaml
from hrm.errors import ProfileError
from hrm.hardware import Figure, HardwareProfile, MemoryLevel, Source
from hrm.machines import compose, save_profile
from hrm.profile_diff import diff_profiles
from hrm.profiling.machine.steps import Steps
from hrm.profiling.timing import Timing, clock_sampler
from hrm.strict import decode_strictly
from tests.hrm.profiling.fakes import Clock, time_call


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultingLevel(MemoryLevel):
    """Memory of which the first touch of a page costs something."""

    page_fault_s: Figure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultingProfile(HardwareProfile):
    """A machine of such levels, which takes so much power where it does nothing."""

    levels: tuple[FaultingLevel, ...]
    idle_w: Figure | None = None


def fields_of(node: Any) -> dict[str, Any]:
    return {item.name: getattr(node, item.name) for item in fields(node)}


def faulting(old: HardwareProfile, page_fault_s: Figure) -> FaultingProfile:
    levels = tuple(FaultingLevel(**fields_of(level), page_fault_s=page_fault_s) for level in old.levels)
    return FaultingProfile(**{**fields_of(old), "levels": levels})


def measured() -> Figure:
    """What the step finds in three passes, on a machine that takes 2 us for a page."""
    clock, steps = Clock(), Steps(part_s=1.0, most_s=1.0, passes=3)
    sampler = clock_sampler(clock)
    steps.add(
        "page faults", 1, lambda s: time_call(lambda: clock.pass_(2e-6), budget_s=s / 100, sampler=sampler), Timing
    )
    return steps.run()["page faults"].duration("first touch of 4 KiB")


def test_a_figure_is_measured_saved_loaded_checked_and_compared(tmp_path):
    figure, path = measured(), tmp_path / "machine.yaml"
    assert figure.value == pytest.approx(2e-6, rel=1e-3)
    assert figure.source is Source.MEASURED
    profile = faulting(compose("1xL4"), figure)
    save_profile(path, profile)
    assert decode_strictly(read_yaml(path, "profile", ProfileError), FaultingProfile, str(path)) == profile
    slower = faulting(compose("1xL4"), replace(figure, value=4e-6, p20=4e-6, p80=4e-6))
    different = diff_profiles(profile, slower).different
    assert [found.name for found in different] == ["gpu.page_fault_s", "cpu.page_fault_s"]
    with pytest.raises(ProfileError, match="page_fault_s"):
        faulting(compose("1xL4"), replace(figure, value=-1.0))


def test_a_figure_of_the_whole_machine_is_compared_like_one_of_a_level():
    idle = Figure(value=60.0, source=Source.MEASURED)
    quiet = replace(faulting(compose("1xL4"), measured()), idle_w=idle)
    found = diff_profiles(quiet, replace(quiet, idle_w=replace(idle, value=90.0))).different
    assert [one.name for one in found] == ["idle_w"]


def test_old_profiles_still_load(tmp_path):
    save_profile(tmp_path / "old.yaml", compose("1xL4"))
    old = decode_strictly(read_yaml(tmp_path / "old.yaml", "profile", ProfileError), FaultingProfile, "old.yaml")
    assert [level.page_fault_s for level in old.levels] == [None, None]
