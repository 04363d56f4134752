"""The first run on a card, as far as it goes without one: its stages at a small scale, its gates and its report."""

from types import SimpleNamespace

import pytest

from hrm.policy import ScheduleName
from tests.bench import first_gpu_run
from tests.bench.first_run import checks
from tests.bench.first_run.figures import Figures, closed_gates, latest
from tests.bench.first_run.setting import RunSetting
from tests.bench.suite.setting import SCALES, Setting
from tests.executor.runtime.device_tensor import WithDevice
from tests.executor.runtime.fake_cuda import ACCELERATOR, TOTAL_BYTES, installed
from tests.executor.runtime.queued_backend import kernels_named
from tests.hrm.profiling.fakes import small_sizes

EMULATED = ("--scale", "small", "--accelerator", "emulated")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the stages leave that need no other engine."""
    made = tmp_path_factory.mktemp("first")
    with small_sizes():
        for name in ("facts", "host", "profile", "orders", "s4", "operators", "report"):
            assert first_gpu_run.main([*EMULATED, "--out", str(made), "--stage", name]) == 0
    return made


def test_stages_answer_their_questions_in_few_files(folder):
    known = latest(folder)
    assert closed_gates(folder) == []
    assert {"gate: native kernels", "gate: host memory", "gate: orders agree"} <= known.keys()
    orders = [f"few layers, 3 tokens: {name.value}" for name in ScheduleName if name is not ScheduleName.FLEXGEN_C]
    for name in ("few layers: cgopipe", "few layers: S4", *orders):
        row = known[name]
        assert row["tokens_per_s"] > 0
        assert row["predicted_tokens_per_s"] > 0
        assert row["memory"]["gpu"]["peak_total_bytes"] <= row["memory"]["gpu"]["planned_total_bytes"]
    assert len({tuple(known[name]["tokens_crc32"]) for name in orders}) == 1
    assert known["few layers: cgopipe"]["policy"]["resident_experts"] == known["plan"]["policy"]["resident_experts"][:2]
    files = list(folder.iterdir())
    assert len(files) <= 8 - 1, "and the log"
    assert all(file.stat().st_size < 2**20 for file in files)


def test_a_card_is_asked_rightly(tmp_path, monkeypatch):
    """What only runs with one, on one that is none, at the small scale."""
    from tests.bench.first_run import machine, operators

    setting = RunSetting(suite=Setting(accelerator=ACCELERATOR, scale=SCALES["small"], results=tmp_path))
    figures = Figures(tmp_path, "host")
    monkeypatch.setattr(operators, "REPEATS", 1)
    with installed((9, 0)), WithDevice():
        monkeypatch.setattr(operators, "kernels_of", lambda _: kernels_named("fast"))
        for stage in (machine.facts, machine.host, operators.operators):
            stage(setting, figures)
    known = latest(tmp_path)
    assert closed_gates(tmp_path) == []
    assert known["gpu"]["free_bytes"] == known["gpu"]["total_bytes"] == TOTAL_BYTES
    for name in ("link, registered", "link, cudaHostAlloc"):
        assert known[name].keys() == {"h2d", "d2h"}
    asked = {"gate: pinning", "pinning", "link, both ways at once", "wake-up", "flash prefill, 128 tokens each"}
    assert {*asked, "flash decode, 84 requests", "grouped product, 21 rows"} <= known.keys()


def test_report_says_that_nothing_is_of_a_gpu_and_tells_every_run(folder):
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "No figure here is of a GPU" in text
    assert "CGOPipe is" in text
    assert text.count("\n| few layers") == 2 + 4
    assert "pinning left out: emulated" in text


def test_a_closed_gate_ends_the_run_but_for_the_report(tmp_path, monkeypatch, capsys):
    begun = []

    def stage(command, **_):
        name = command[command.index("--stage") + 1]
        begun.append(name)
        if name in first_gpu_run.GATES:
            Figures(tmp_path, name).gate(first_gpu_run.GATES[name], is_open=name != "host", told="3 GB there")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(first_gpu_run, "run", stage)
    assert first_gpu_run.main([*EMULATED, "--out", str(tmp_path)]) == 1
    assert begun == ["facts", "host", "report"]
    assert "closed: host memory: 3 GB there" in capsys.readouterr().err
    assert first_gpu_run.main([*EMULATED, "--out", str(tmp_path)]) == 2, "figures of two runs are not mixed"


def test_without_time_the_rest_is_left_out(tmp_path, monkeypatch):
    begun = []

    def stage(command, **_):
        begun.append(command[command.index("--stage") + 1])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(first_gpu_run, "run", stage)
    assert first_gpu_run.main([*EMULATED, "--out", str(tmp_path), "--budget-seconds", "30"]) == 1
    assert begun == ["operators", "report"], "what is short and needs no other"
    assert sum(first_gpu_run.STAGES.values()) < 1.75 * first_gpu_run.BUDGET_S


@pytest.mark.parametrize("lost", first_gpu_run.GATES)
def test_a_gate_that_nobody_opened_is_closed(tmp_path, monkeypatch, capsys, lost):
    begun = []

    def stage(command, **_):
        name = command[command.index("--stage") + 1]
        begun.append(name)
        if name in first_gpu_run.GATES and name != lost:
            Figures(tmp_path, name).gate(first_gpu_run.GATES[name], is_open=True, told="")
        return SimpleNamespace(returncode=-11)

    monkeypatch.setattr(first_gpu_run, "run", stage)
    assert first_gpu_run.main([*EMULATED, "--out", str(tmp_path)]) == 1
    assert begun[-2:] == [lost, "report"]
    assert f"closed: {first_gpu_run.GATES[lost]}: the stage ended" in capsys.readouterr().err


def test_a_stage_that_fails_says_so_among_the_figures(tmp_path, capsys):
    assert first_gpu_run.main([*EMULATED, "--out", str(tmp_path), "--stage", "orders"]) == 1
    assert "KeyError" in latest(tmp_path)["orders failed"]
    assert "Traceback" in capsys.readouterr().err
    with (tmp_path / "figures.jsonl").open("a") as file:
        file.write('{"stage": "or')
    assert len(latest(tmp_path)) == 1, "what is cut off is passed over"


def test_of_the_tests_at_most_forty_are_chosen_and_each_pattern_is_of_some(tmp_path):
    """As pytest collects them, on any machine."""
    ranks = (checks.RANKS_ON_A_CARD, checks.RANKS_ELSEWHERE)
    for chosen in (checks.ON_A_CARD, checks.ELSEWHERE, *ranks):
        figures = Figures(tmp_path, "tests")
        reporter = checks.Reporter(figures, {pattern for patterns in chosen.values() for pattern in patterns})
        code = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *chosen], plugins=[reporter])
        assert code == 0
        assert len(reporter.kept) in range(4 if chosen in ranks else 9, 41)
    assert not [name for name in latest(tmp_path) if name.startswith("no test is")]


def test_mistakes_end_in_one_line(tmp_path, capsys):
    assert first_gpu_run.main([*EMULATED, "--out", str(tmp_path), "--stage", "host", "--host-memory", "much"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
