"""The first run on a card, in one command of at most eight minutes.

    python -m tests.bench.first_gpu_run --out DIR                                        # on cuda:0
    python -m tests.bench.first_gpu_run --out DIR --accelerator emulated --scale small   # to see that it works

It answers: are tokens right; how busy are link and GPU in decode; how far are predictions and planned memory off;
how much faster is CGOPipe than S4 and than transformers' offload at its best on as many layers. Stages run in the
order of their worth, each in a process of its own. Figures are lines of JSON in DIR/figures.jsonl, written and printed
as they come, so that an end by force loses nothing, nor does a disk that is full. Without native kernels, with too
little memory, after a failed test or where orders disagree it ends early, so that there is time for a second try. DIR
holds eight files at most.

A machine without a network needs what it lacks carried along, say in a folder that git ignores; for one with torch,
transformers, accelerate, pytest and hypothesis and Python 3.12, once, here, with a Python 3.12 and a compiler:

    python3.12 -m pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \\
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \\
        -d .wheels msgspec==0.22.0 click==8.5.1 py-cpuinfo2==10.1.1 platformdirs pytest==9.2.0 nvidia-ml-py
    python3.12 -m pip wheel --no-deps -w .wheels .

and there, at the top of the source tree:

    python3 -m pip install -q --no-index --no-deps --target /tmp/site .wheels/*.whl
    cp /tmp/site/executor/native/_kernels*.so executor/native/ && rm -r /tmp/site/executor /tmp/site/hrm
    PYTHONPATH=/tmp/site python3 -m tests.bench.first_gpu_run --out "$OUT"
"""

import argparse
import faulthandler
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import IO, Final

from hrm.contract.openmp import spin_briefly
from hrm.errors import HrmError
from hrm.units import MIB, format_bytes, parse_bytes
from tests.bench.first_run.figures import FIGURES, Figures, closed_gates, latest
from tests.bench.first_run.setting import RunSetting
from tests.bench.suite.setting import SCALES, Setting

LOG: Final = "log.txt"
BUDGET_S: Final = 480.0
GRACE_S: Final = 5.0  # beyond a stage's time until it is ended by force, and then until it is given up
ROOM_BYTES: Final = 64 * MIB  # for all files; they take a tenth of it
FIRST_TO_GO: Final = "500"  # of what the system ends when memory runs out: a stage, not who tells of it
OFFLINE: Final = {"HF_HUB_OFFLINE": "1"}  # or without a network transformers waits for an answer
# In the order of their worth, with the most seconds that each may take.
STAGES: Final = {
    "facts": 75.0,  # a machine that has just started reads all of torch's libraries
    "host": 75.0,
    "tests": 90.0,
    "profile": 80.0,
    "orders": 110.0,
    "whole": 190.0,
    "transformers": 70.0,
    "s4": 60.0,
    "ranks": 55.0,
    "operators": 25.0,
    "report": 15.0,
}
# What a stage has to find out for the run to go on.
GATES: Final = {"facts": "native kernels", "host": "host memory", "tests": "tests", "orders": "orders agree"}


# The module of `first_run` that has a stage's function, of the stage's name; each is imported by its stage alone.
MODULES: Final = {
    "facts": "machine",
    "host": "machine",
    "tests": "checks",
    "profile": "checks",
    "orders": "runs",
    "whole": "runs",
    "transformers": "runs",
    "s4": "runs",
    "ranks": "checks",
    "operators": "operators",
    "report": "report",
}


def work_of(stage: str) -> Callable[[RunSetting, Figures], object]:
    """What a stage does."""
    return getattr(import_module(f"tests.bench.first_run.{MODULES[stage]}"), stage)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all stages, or the one that is named; 0 if all ended well, 1 if one did not or a gate is closed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _options(given)
    try:
        spin_briefly()  # before torch is imported
        options.out.mkdir(parents=True, exist_ok=True)
        if options.stage:
            return one(options)
        return every(options, given)
    except HrmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def one(options: argparse.Namespace) -> int:
    """A stage in this process."""
    late = threading.Timer(options.seconds, faulthandler.dump_traceback)
    late.daemon = True
    late.start()
    suite = Setting(
        accelerator=options.accelerator,
        scale=SCALES[options.scale],
        results=options.out,
        command=f"python -m tests.bench.first_gpu_run --accelerator {options.accelerator}",
        until_s=time.monotonic() + options.seconds,
    )
    host = parse_bytes(options.host_memory, "--host-memory") if options.host_memory else None
    figures = Figures(options.out, options.stage)
    try:
        with redirect_stdout(sys.stderr):  # what others print goes to the log
            work_of(options.stage)(RunSetting(suite=suite, host_memory_bytes=host), figures)
    except Exception as error:  # noqa: BLE001 - told among the figures, and in full in the log
        figures.put(f"{options.stage} failed", f"{type(error).__name__}: {error}"[:1500])
        with suppress(OSError):  # the log's disk may be full
            traceback.print_exc()
            print(getattr(error, "chart", ""), file=sys.stderr)
        return 1
    finally:
        late.cancel()
    return 0


def every(options: argparse.Namespace, given: Sequence[str]) -> int:
    """All stages, a process each, until the time is spent or a gate is closed; the report in any case.

    It takes no longer than the budget, whatever the stages do, unless that is too short for a report.
    """
    # Behind the last stage: until it is gone, and the report with the same.
    until_s = time.monotonic() + options.budget_seconds - STAGES["report"] - 4 * GRACE_S
    failed, closed = list[str](), list[str]()
    with _log(options.out) as log:
        for stage, most_s in STAGES.items():
            seconds = most_s if stage == "report" else min(most_s, until_s - time.monotonic())
            if stage != "report" and (closed or seconds < min(most_s / 3, 20)):
                failed.append(stage)
                continue
            start_s, figures = time.monotonic(), Figures(options.out, stage)
            with suppress(OSError):
                os.write(log.fileno(), f"\n== {stage}\n".encode())
            words = [*given, "--stage", stage, "--seconds", f"{seconds:.1f}"]
            if told := ended([sys.executable, "-m", "tests.bench.first_gpu_run", *words], log, seconds + GRACE_S):
                failed.append(stage)
                figures.put(f"{stage} ended", told)
            closed = closed_gates(options.out)
            if stage in GATES and f"gate: {GATES[stage]}" not in latest(options.out):
                told = "the stage ended before it was known"
                figures.gate(GATES[stage], is_open=False, told=told)
                closed.append(f"{GATES[stage]}: {told}")  # wherever it could not be written
            figures.put(f"{stage} took", round(time.monotonic() - start_s, 1))
            if closed and stage != "report":
                print(f"closed: {', '.join(closed)}", file=sys.stderr)
    if failed:
        print(f"not done: {', '.join(failed)}; see {options.out / LOG}", file=sys.stderr)
    return int(bool(failed or closed))


def ended(command: Sequence[str], log: IO[str], seconds: float) -> str:
    """Run a command for no longer than that, with all that it starts; how it ended if not well."""
    process = Popen(command, stderr=log, process_group=0, env={**os.environ, **OFFLINE})
    with suppress(OSError):
        Path(f"/proc/{process.pid}/oom_score_adj").write_text(FIRST_TO_GO, encoding="ascii")
    try:
        code = process.wait(seconds)
        told = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}" if code else ""
    except TimeoutExpired:
        told = f"by force after {seconds:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(GRACE_S)
    except TimeoutExpired:  # a driver that hangs keeps it
        told += ", but it is still there"
    return told


def _log(folder: Path) -> IO[str]:
    """The log, new; HrmError if the folder has figures of an earlier run or there is no room in it."""
    if (folder / FIGURES).exists():
        raise HrmError("--out", str(folder), f"must hold no {FIGURES} of an earlier run", "name another folder")
    free = shutil.disk_usage(folder).free
    if free < ROOM_BYTES:
        raise HrmError(
            "--out", str(folder), f"must have {format_bytes(ROOM_BYTES)} free and has {format_bytes(free)}", "make room"
        )
    return (folder / LOG).open("w", encoding="utf-8")


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.first_gpu_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the files go")
    parser.add_argument("--accelerator", default="cuda:0", help="cuda:K or emulated")
    parser.add_argument("--scale", choices=list(SCALES), default="full", help="small takes seconds")
    parser.add_argument("--host-memory", metavar="100GB", help="at most so much of the host's [default: what is there]")
    parser.add_argument("--budget-seconds", type=float, default=BUDGET_S, metavar="S", help="of all stages together")
    parser.add_argument("--stage", choices=list(STAGES), help="only this one, in this process")
    parser.add_argument("--seconds", type=float, default=600.0, help=argparse.SUPPRESS)
    return parser.parse_args(list(arguments))


if __name__ == "__main__":
    sys.exit(main())
