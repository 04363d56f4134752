"""Both programs as the shell sees them: exit codes, closed pipes, closed outputs, signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAMS = ("hrm", "executor")


def started(program, *args, **options):
    command = [sys.executable, "-m", f"{program}.cli", *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, **options)


def ended(process) -> tuple[int, str]:
    """Exit code and standard error of a process."""
    _, err = process.communicate(timeout=60)
    return process.returncode, err


@pytest.mark.parametrize(
    ("program", "args"),
    [
        ("hrm", ["models"]),
        ("hrm", ["--help"]),
        ("hrm", ["paper", "--csv"]),
        ("hrm", ["models", "--json"]),
        ("hrm", ["estimate", "--model", "mixtral-8x7b", "--gpus", "1xT4", "-u", "8", "-n", "8"]),
        ("executor", ["--help"]),
        ("executor", ["run", "--help"]),
    ],
)
def test_a_reader_that_has_gone_is_no_mistake(program, args):
    reader, writer = os.pipe()
    os.close(reader)
    process = started(program, *args, stdout=writer)
    os.close(writer)
    assert ended(process) == (0, "")


@pytest.mark.parametrize(("program", "args"), [("hrm", ["models"]), ("hrm", ["models", "dbrx"]), ("executor", ["-h"])])
def test_a_closed_output_is_no_mistake(program, args):
    command = 'exec "$@" >&-'
    process = subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, "-m", f"{program}.cli", *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (process.returncode, process.stderr) == (0, "")


def test_with_its_output_closed_nothing_is_printed_into_a_file(tmp_path):
    policy = tmp_path / "policy.json"
    process = subprocess.run(
        [
            "sh",
            "-c",
            'exec "$@" >&- 2>&-',
            "sh",
            sys.executable,
            "-m",
            "hrm.cli",
            "estimate",
            "--model",
            "mixtral-8x7b",
            "--gpus",
            "1xT4",
            "-u",
            "8",
            "-n",
            "8",
            "--out",
            policy,
        ],
        check=False,
        timeout=60,
    )
    assert process.returncode == 0
    text = policy.read_text()
    assert text.startswith("{")
    assert text.endswith("}\n")


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_full_disk_under_the_output_is_told_in_one_line(program):
    with Path("/dev/full").open("w") as full:
        code, err = ended(started(program, "--help", stdout=full))
    assert code == 2
    assert err == ("error: the output is <No space left on device>: must be usable; make room or check the path\n")


@pytest.mark.parametrize("program", PROGRAMS)
def test_both_programs_tell_a_mistake_in_the_arguments_alike(program):
    command = "search" if program == "hrm" else "run"
    code, err = ended(started(program, command, "--foo", stdout=subprocess.DEVNULL))
    assert code == 2
    assert err.startswith(f"error: --foo is <unknown>: is no option of {program} {command}; ")
    assert err.count("\n") == 1


def is_waiting(pid) -> bool:
    """Whether a process sleeps, as Linux tells, and has done so for a while."""
    times = []
    for _ in range(2):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        times.append((fields[0], fields[11]))
        time.sleep(0.3)
    return times[0] == times[1] and times[0][0] == "S"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_a_command_in_good_order(tmp_path, number, code):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # nobody reads it: the command waits to write
    process = started(
        "hrm",
        "estimate",
        "--model",
        "mixtral-8x7b",
        "--gpus",
        "1xT4",
        "-u",
        "8",
        "-n",
        "8",
        "--out",
        pipe,
        stdout=subprocess.DEVNULL,
    )
    time.sleep(0.2)
    while not is_waiting(process.pid) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    status, err = ended(process)
    assert (status, err.strip()) == (code, "interrupted")
