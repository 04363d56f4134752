"""How long whole `hrm` processes take; `make bench` runs this, nothing is asserted on the clock."""

import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

RUNS = 7
GOALS_S = {"hrm --help": 0.3, "hrm search --model dbrx --gpus 4xT4": 1.0}


def cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor() or platform.machine()


def seconds_of(command: list[str], *, check: bool = True) -> float:
    start_s = time.perf_counter()
    subprocess.run(command, check=check, stdout=subprocess.DEVNULL, stderr=None if check else subprocess.DEVNULL)
    return time.perf_counter() - start_s


def whole_command(command: str) -> list[str]:
    """The command as it is installed, or as a module where it is not."""
    program, *args = shlex.split(command)
    script = Path(sys.executable).with_name(program)
    start = [str(script)] if script.is_file() else [sys.executable, "-m", f"{program}.cli"]
    return [*start, *args]


@pytest.mark.parametrize("command", GOALS_S)
def test_whole_process(command):
    installed = whole_command(command)
    seconds_of(installed)  # fills the file cache and writes bytecode
    seconds = [seconds_of(installed) for _ in range(RUNS)]
    print(
        f"\n{command}\n  median {statistics.median(seconds):.3f} s of {RUNS} runs "
        f"({min(seconds):.3f} to {max(seconds):.3f}), goal {GOALS_S[command]:.1f} s\n"
        f"  run as {shlex.join(installed)}\n  on {cpu_model()}, Python {platform.python_version()}"
    )
