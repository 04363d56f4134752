"""Who computes what is measured once, kept for later runs and in profiles, or given."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from executor import native
from executor.errors import RunError
from executor.model import crossings
from executor.model.attention import PREFILL_ATTENTION
from executor.model.crossings import ALWAYS, Work, adopt, measured, native_up_to, settle
from executor.model.experts import EXPERTS
from executor.model.linear import PACKED_PRODUCTS, PRODUCTS
from tests.executor.native.support import PATHS, on_threads
from tests.hrm.support import machine

SIZES = (1, 2, 4, 8, 16)


@pytest.fixture(autouse=True)
def measuring(monkeypatch, tmp_path):
    """As users run: nothing is given, nothing is known, and the cache is the test's own."""
    monkeypatch.delenv(crossings.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("_known", "_adopted"):
        monkeypatch.setattr(crossings, name, {})
    kept_by_others(monkeypatch, 0.0)
    crossings._given.cache_clear()
    with native.using(native.Kernels("fast")):
        yield
    crossings._given.cache_clear()


def kept_by_others(monkeypatch, share):
    """While anything is measured, others keep that share of the machine busy."""
    monkeypatch.setattr(crossings, "Others", lambda: SimpleNamespace(share=lambda: share))


def sized(size):
    """Work that tells its size."""
    return lambda: size


@pytest.mark.parametrize(
    ("native_s", "expected"),
    [
        (lambda _: 1e-3, ALWAYS),
        (lambda size: 4e-3 + size * 1e-3, 0),
        (lambda size: 1e-3 if size <= 4 else 4e-3, 4),
        (lambda size: 3e-3 if size == 2 else 1e-3 if size <= 8 else 4e-3, 8),
        (lambda size: 1e-9 if size == 16 else 4e-3, 0),
    ],
    ids=["all", "none", "some", "disturbed at 2", "torch disturbed at the last"],
)
def test_all_sizes_together_decide(monkeypatch, native_s, expected):
    monkeypatch.setattr(crossings, "_seconds", lambda work: (native_s(work()), 2e-3))
    assert measured(sized, SIZES) == expected


def test_a_slow_machine_tries_fewer_sizes(monkeypatch):
    tried = []
    monkeypatch.setattr(crossings, "_seconds", lambda work: tried.append(work()) or (0.05, 0.1))
    assert measured(sized, SIZES) == ALWAYS
    assert tried == [1]


def test_what_others_disturbed_is_not_kept_for_later_runs(monkeypatch, tmp_path, measure):
    kept_by_others(monkeypatch, 0.4)
    assert settle([WORK], torch.float32, 1) == settle([WORK], torch.float32, 1) == {TEXT: 3}
    assert len(measure) == 1  # in the same process it holds
    monkeypatch.setattr(crossings, "_known", {})  # another process
    kept_by_others(monkeypatch, 0.01)
    assert settle([WORK], torch.float32, 1) == {TEXT: 3}
    assert len(measure) == 2
    assert TEXT in (tmp_path / "moe-hrm" / "native.json").read_text()


@pytest.fixture
def measure(monkeypatch):
    """Measures work, of which it keeps a list, as native up to 3."""
    made = []
    monkeypatch.setattr(crossings, "measured", lambda trial, _: made.append(trial(0)()) or 3)
    return made


WORK = Work("work", SIZES, lambda dtype: lambda _: lambda: dtype)
TEXT = "work, float32, fast, 1 thread"


def test_what_was_measured_is_kept_for_other_processes_and_by_threads_and_path(monkeypatch, tmp_path, measure):
    assert on_threads(1, lambda: native_up_to(WORK, torch.float32)) == 3
    kept = json.loads((tmp_path / "moe-hrm" / "native.json").read_text())
    assert list(kept.values()) == [{TEXT: 3}]
    monkeypatch.setattr(crossings, "_known", {})  # another process
    assert on_threads(1, lambda: native_up_to(WORK, torch.float32)) == 3
    assert len(measure) == 1
    on_threads(2, lambda: native_up_to(WORK, torch.float32))
    with native.using(native.Kernels("slow")):
        on_threads(1, lambda: native_up_to(WORK, torch.float32))
    on_threads(1, lambda: native_up_to(WORK, torch.bfloat16))
    assert measure == [torch.float32] * 3 + [torch.bfloat16]


@pytest.mark.parametrize("damage", ["{", "[1]", '{"a": 3}', "null"])
def test_a_damaged_file_is_made_anew(tmp_path, measure, damage):
    path = tmp_path / "moe-hrm" / "native.json"
    path.parent.mkdir()
    path.write_text(damage)
    assert settle([WORK], torch.float32, 1) == {TEXT: 3}
    assert measure
    assert TEXT in path.read_text()


def test_what_is_no_size_is_measured_again(monkeypatch, tmp_path, measure):
    settle([WORK], torch.float32, 1)
    path = tmp_path / "moe-hrm" / "native.json"
    for wrong in ("-1", '"3"', "true"):
        path.write_text(path.read_text().replace(": 3", f": {wrong}"))
        monkeypatch.setattr(crossings, "_known", {})
        assert on_threads(1, lambda: native_up_to(WORK, torch.float32)) == 3
    assert len(measure) == 4


def test_where_nothing_can_be_kept_it_is_measured_all_the_same(monkeypatch, tmp_path, measure):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert native_up_to(WORK, torch.float32) == 3


def test_a_profile_of_this_machine_is_believed_and_no_other(measure):
    a_machine = machine()
    level = replace(a_machine.host, processor=replace(a_machine.host.processor, native_up_to={TEXT: 7}))
    ours = replace(a_machine, levels=(a_machine.top, level), environment=dict(crossings._measured_with()))
    adopt(ours)
    assert settle([WORK], torch.float32, 1) == {TEXT: 7}
    assert not measure
    adopt(replace(ours, environment=ours.environment | {"cpu": "another"}))
    assert settle([WORK], torch.float32, 1) == {TEXT: 3}


@pytest.mark.parametrize(("text", "expected"), [("0", 0), ("64", 64), (str(1 << 40), ALWAYS)])
def test_a_size_can_be_given(monkeypatch, measure, text, expected):
    monkeypatch.setenv(crossings.VARIABLE, text)
    assert native_up_to(WORK, torch.float32) == expected
    assert settle([WORK], torch.float32, 1) == {}
    assert not measure


def test_what_is_no_number_is_the_users_mistake(monkeypatch):
    monkeypatch.setenv(crossings.VARIABLE, "all")
    with pytest.raises(RunError, match=r"EXECUTOR_NATIVE_UP_TO.*all.*whole number"):
        native_up_to(PRODUCTS, torch.float32)


def test_torch_alone_has_nothing_to_choose(measure):
    with native.using(None):
        assert native_up_to(WORK, torch.float32) == 0
        assert settle([WORK], torch.float32, 1) == {}
    assert not measure


@pytest.mark.parametrize("work", [PRODUCTS, EXPERTS, PREFILL_ATTENTION, PACKED_PRODUCTS], ids=lambda work: work.name)
@pytest.mark.parametrize("path", PATHS[:1])
def test_both_sides_of_real_work_are_tried(monkeypatch, path, work):
    """The kernels compute one time and not the other: else torch would be compared with itself."""
    calls = []
    for name in ("linear", "run_experts", "decode_attention"):
        of_path = getattr(native.Kernels, name)

        def counting(*args, of_path=of_path, **how):
            calls.append(how.get("max_tokens") != 0)
            return of_path(*args, **how)

        monkeypatch.setattr(native.Kernels, name, counting)
    with native.using(native.Kernels(path)), torch.inference_mode():
        do = work.trial_of(torch.float32)(work.sizes[0])
        for up_to, expected in ((ALWAYS, [True]), (0, [])):
            calls.clear()
            with crossings.assumed(up_to):
                do()
            assert [each for each in calls if each] == expected
