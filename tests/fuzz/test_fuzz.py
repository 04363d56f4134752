"""A little fuzzing, the same inputs each time; `make fuzz` runs as many as wanted."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.fuzz import run, targets
from tests.fuzz.mutations import VALUES, Change, Example, as_json, content_of

FINDINGS = Path(os.environ.get("FUZZ_FINDINGS", "fuzz-findings")).absolute()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "count"), [(targets.NAMES_OF_HRM, 420), (targets.NAMES_OF_EXECUTOR, 480)], ids=["hrm", "executor"]
)
def test_whatever_is_handed_over_is_used_or_refused_in_one_line(names, count):
    reports = run.watch(names, count, seed=0, findings=FINDINGS)
    found = [finding for report in reports for finding in report.findings]
    assert not found, "\n".join(found)
    assert [report.target for report in reports] == list(names)
    for report in reports:
        assert report.refused < report.inputs, f"{report.target}: no input was used"


def test_every_target_is_run():
    names = targets.NAMES_OF_HRM + targets.NAMES_OF_EXECUTOR
    assert sorted(names) == sorted(targets.all_targets())


def target(use):
    return targets.Target(name="own", bases=lambda: [{"a": 1, "b": [2]}], use=use)


def test_a_finding_is_shrunk_and_kept_in_a_file(tmp_path):
    def use(content, folder):
        assert b"[" not in content or b"b" not in content

    report = run.fuzz(target(use), 200, 0, tmp_path, tmp_path / "found")
    assert len(report.findings) == 3
    assert "AssertionError" in report.findings[0]
    (path,) = (tmp_path / "found").iterdir()
    assert path.read_bytes() == as_json({"a": 0, "b": [2]}), "the least change"
    assert str(path) in report.findings[0]


def test_an_input_that_takes_too_long_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "CPU_SECONDS", 0.05)

    def use(content, folder):
        while True:
            try:
                sum(range(1000))
            except Exception:  # noqa: BLE001 - as careless code does
                continue

    report = run.fuzz(target(use), 1, 0, tmp_path, tmp_path)
    assert "took over" in report.findings[0]


@pytest.mark.parametrize("crash", ["import ctypes; ctypes.string_at(0)", "import os; os._exit(3)"])
def test_a_crash_of_the_process_is_told_with_its_input(tmp_path, monkeypatch, crash):
    code = (
        "import sys, pathlib; folder = pathlib.Path(sys.argv[-2]);"
        "(folder / 'target').write_text('own'); (folder / 'input').write_bytes(b'[[['); " + crash
    )
    monkeypatch.setattr(run, "WORKER", ["-c", code])
    (report,) = run.watch(["own"], 1, 0, tmp_path)
    assert report.target == "own"
    assert "the process ended with" in report.findings[0]
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"[[["]


def test_time_in_which_a_worker_is_paused_does_not_count(tmp_path, monkeypatch):
    """It goes on long after it would have been taken for one that hangs."""
    code = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP); os._exit(0)"
    monkeypatch.setattr(run, "NAP_S", 0.01)
    monkeypatch.setattr(run, "STUCK_S", 0.3)
    process = subprocess.Popen([sys.executable, "-c", code])
    while not run._is_paused(process):
        time.sleep(0.01)
    resumed = threading.Timer(0.9, process.send_signal, [signal.SIGCONT])
    resumed.start()
    assert run._wait(process, tmp_path) == ""
    resumed.join()


def test_changes_are_of_values_keys_and_bytes():
    base = [{"a": 1, "b": [2]}]
    same = Example(0, (), ())
    assert content_of(same, base, as_json) == as_json(base[0])
    scaled = Example(0, (Change(1, "scale", 3),), ())
    assert content_of(scaled, base, as_json) == b'{"a": 1, "b": [2000]}'
    changed = Example(0, (Change(0, "set", VALUES.index(None)),), (Change(1, "insert", 0),))
    assert content_of(changed, base, as_json) == b'{"a": null, "b": [2]}'
    assert base == [{"a": 1, "b": [2]}], "the valid file stays as it is"
