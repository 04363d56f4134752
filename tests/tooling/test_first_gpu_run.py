"""The first run on a card, as far as it goes without one: its stages at a small scale, its gates and its report."""

import io
import os
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest

from hrm.policy import ScheduleName
from hrm.units import MIB
from tests.bench import first_gpu_run
from tests.bench.first_run import checks, machine, report
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
    from tests.bench.first_run import operators

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

    def stage(command, *_):
        name = command[command.index("--stage") + 1]
        begun.append(name)
        if name in first_gpu_run.GATES:
            Figures(tmp_path, name).gate(first_gpu_run.GATES[name], is_open=name != "host", told="3 GB there")
        return ""

    monkeypatch.setattr(first_gpu_run, "ended", stage)
    assert first_gpu_run.main([*EMULATED, "--out", str(tmp_path)]) == 1
    assert begun == ["facts", "host", "report"]
    assert "closed: host memory: 3 GB there" in capsys.readouterr().err
    assert first_gpu_run.main([*EMULATED, "--out", str(tmp_path)]) == 2, "figures of two runs are not mixed"


def test_without_time_the_rest_is_left_out(tmp_path, monkeypatch):
    begun = []

    def stage(command, *_):
        begun.append(command[command.index("--stage") + 1])
        return ""

    monkeypatch.setattr(first_gpu_run, "ended", stage)
    assert first_gpu_run.main([*EMULATED, "--out", str(tmp_path), "--budget-seconds", "45"]) == 1
    assert begun == ["operators", "report"], "what is short and needs no other"
    assert sum(first_gpu_run.STAGES.values()) < 1.8 * first_gpu_run.BUDGET_S


def test_no_run_outlasts_its_budget_whatever_its_stages_do(tmp_path, monkeypatch):
    """Each of which here is ended by force, and does not go even then."""
    now_s, grace_s = [0.0], first_gpu_run.GRACE_S

    def stage(command, _, seconds):
        now_s[0] += seconds + grace_s
        name = command[command.index("--stage") + 1]
        if name in first_gpu_run.GATES:
            Figures(tmp_path, name).gate(first_gpu_run.GATES[name], is_open=True, told="")
        return "by force, but it is still there"

    monkeypatch.setattr(first_gpu_run, "ended", stage)
    monkeypatch.setattr(first_gpu_run.time, "monotonic", lambda: now_s[0])
    assert first_gpu_run.main([*EMULATED, "--out", str(tmp_path)]) == 1
    assert 0.9 * first_gpu_run.BUDGET_S < now_s[0] <= first_gpu_run.BUDGET_S
    assert latest(tmp_path)["orders ended"] == "by force, but it is still there"


IN_A_CHILD = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])"


@pytest.mark.parametrize(
    ("code", "seconds", "told"),
    [
        ("", 60, ""),
        ("raise SystemExit(3)", 60, "with exit code 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 60, "by SIGKILL"),
        (f"{IN_A_CHILD}; print(p.pid, flush=True); p.wait()", 2, "by force after 2 s"),
        (f"{IN_A_CHILD}; print(p.pid, flush=True)", 60, ""),
    ],
)
def test_how_a_stage_ended_is_told_and_nothing_of_it_is_left(code, seconds, told, capfd):
    assert first_gpu_run.ended([sys.executable, "-S", "-c", code], sys.stderr, seconds) == told
    for child in capfd.readouterr().out.split():
        wait_until(lambda child=child: not is_running(int(child)))


def is_running(process: int) -> bool:
    """Not if all that is left is for its parent to look at."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until(holds) -> None:
    end_s = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_where_no_file_can_be_written_figures_are_printed_all_the_same(tmp_path, capsys):
    for name in ("figures.jsonl", "report.md"):
        (tmp_path / name).symlink_to("/dev/full")
    Figures(tmp_path, "facts").put("n", 1)
    told = capsys.readouterr()
    assert '"figure": "n", "value": 1' in told.out
    assert "not in figures.jsonl: [Errno 28]" in told.err
    report.write(tmp_path)


def test_a_gate_that_could_not_be_written_down_ends_the_run_as_well(tmp_path, monkeypatch, capsys):
    """The disk is full by now: no figure is in the file, and the next stages would lack those they need."""
    begun = []

    def stage(command, log, _):
        begun.append(command[command.index("--stage") + 1])
        monkeypatch.setattr(Path, "open", full)
        os.dup2(os.open("/dev/full", os.O_WRONLY), log.fileno())
        return ""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(first_gpu_run, "ended", stage)
    assert first_gpu_run.main([*EMULATED, "--out", str(tmp_path)]) == 1
    assert begun == ["facts", "report"]
    told = capsys.readouterr()
    assert '"gate: native kernels", "value": {"open": false' in told.out
    assert "closed: native kernels: the stage ended before it was known" in told.err


def test_without_room_for_the_files_nothing_is_begun(tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "free")  # noqa: PYI024 - as shutil's
    monkeypatch.setattr(first_gpu_run.shutil, "disk_usage", lambda _: usage(10**7))
    assert first_gpu_run.main([*EMULATED, "--out", str(tmp_path)]) == 2
    assert "must have 67.1 MB free and has 10.0 MB" in capsys.readouterr().err


@pytest.mark.parametrize("lost", first_gpu_run.GATES)
def test_a_gate_that_nobody_opened_is_closed(tmp_path, monkeypatch, capsys, lost):
    begun = []

    def stage(command, *_):
        name = command[command.index("--stage") + 1]
        begun.append(name)
        if name in first_gpu_run.GATES and name != lost:
            Figures(tmp_path, name).gate(first_gpu_run.GATES[name], is_open=True, told="")
        return "by SIGSEGV"

    monkeypatch.setattr(first_gpu_run, "ended", stage)
    assert first_gpu_run.main([*EMULATED, "--out", str(tmp_path)]) == 1
    assert begun[-2:] == [lost, "report"]
    assert latest(tmp_path)[f"{lost} ended"] == "by SIGSEGV"
    assert f"closed: {first_gpu_run.GATES[lost]}: the stage ended" in capsys.readouterr().err


def test_without_native_kernels_the_run_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.bench.first_run.machine.kernels", lambda: None)
    assert first_gpu_run.main([*EMULATED, "--out", str(tmp_path), "--stage", "facts"]) == 0
    assert closed_gates(tmp_path)[0].startswith("native kernels: ")


def test_memory_that_a_machine_has_only_once_it_uses_some_is_found(monkeypatch):
    """Of 64 MiB at the first look; more comes a while after most of it is used, up to a fourfold."""
    there, used, waits = 64 * MIB, [0], [0]

    def available() -> int:
        more = min(3 * there, waits[0] * 24 * MIB)
        return there + more - used[0]

    def touched(zeros):
        used[0] += zeros.nbytes
        return zeros

    monkeypatch.setattr(machine, "available_ram_bytes", available)
    monkeypatch.setattr(machine, "touched", touched)
    monkeypatch.setattr(machine, "SMALLEST_BYTES", MIB)
    monkeypatch.setattr(machine.time, "sleep", lambda _: waits.__setitem__(0, waits[0] + 1))
    most = 4 * there
    assert 0.9 * most < machine.ramp(10**12, 16 * MIB, lambda: 60.0) < most
    used[0] = 0
    assert machine.ramp(20 * MIB, 16 * MIB, lambda: 60.0) == 20 * MIB, "as much as was asked for"
    assert machine.ramp(10**12, 16 * MIB, lambda: -1.0) == 0, "no time"


def test_no_test_is_begun_when_the_stage_has_no_time_left(tmp_path):
    cases = tmp_path / "test_cases.py"
    cases.write_text("def test_a(): assert 0\n", encoding="utf-8")
    figures = Figures(tmp_path, "tests", io.StringIO())
    reporter = checks.Reporter(figures, {"*test_a"}, time.monotonic() - 1)
    assert pytest.main(["-q", "-p", "no:cacheprovider", str(cases)], plugins=[reporter]) == 0
    assert reporter.counts == {"passed": 0, "failed": 0, "skipped": 1}


@pytest.mark.parametrize(("failing", "is_open"), [("test_a.py", False), (checks.OF_RANKS, True)])
def test_a_failure_of_ranks_does_not_keep_the_run_from_measuring_one(tmp_path, monkeypatch, failing, is_open):
    def main(_, plugins):
        for name in ("test_a.py", checks.OF_RANKS):
            outcome = "failed" if name == failing else "passed"
            told = {"outcome": outcome, "passed": outcome == "passed", "failed": outcome == "failed", "longrepr": ""}
            report = SimpleNamespace(nodeid=f"tests/{name}::test", when="call", duration=0.1, **told)
            plugins[0].pytest_runtest_logreport(report)
        return pytest.ExitCode.TESTS_FAILED

    monkeypatch.chdir(tmp_path)  # whatever the stage makes the current one
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "")
    monkeypatch.setattr(pytest, "main", main)
    setting = RunSetting(suite=Setting(accelerator="emulated", scale=SCALES["small"], results=tmp_path))
    checks.tests(setting, Figures(tmp_path, "tests", io.StringIO()))
    known = latest(tmp_path)
    assert known["tests"]["failed"] == (not is_open)
    assert known["tests of ranks"]["failed"] == is_open
    assert known["gate: tests"]["open"] == is_open


def test_the_report_is_made_of_what_there_is(tmp_path):
    figures = Figures(tmp_path, "facts", io.StringIO())
    figures.put("machine", {"accelerator": "cuda:0"})
    figures.put("facts failed", "RuntimeError: no driver")
    figures.put("orders ended", "by SIGKILL")
    text = report.write(tmp_path)
    assert text.startswith("# cuda:0")
    assert "No figure" not in text
    assert "**facts failed**: RuntimeError: no driver" in text
    assert "**orders ended**: by SIGKILL" in text


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
        assert len(reporter.kept) in range(1 if chosen in ranks else 9, 41)
        assert chosen in ranks or any(checks.OF_RANKS in item.nodeid for item in reporter.kept)
    assert not [name for name in latest(tmp_path) if name.startswith("no test is")]


def test_mistakes_end_in_one_line(tmp_path, capsys):
    assert first_gpu_run.main([*EMULATED, "--out", str(tmp_path), "--stage", "host", "--host-memory", "much"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
