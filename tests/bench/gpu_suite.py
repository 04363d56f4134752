"""Everything that is to be measured on a machine with a GPU, in steps of under nine minutes each.

    python -m tests.bench.gpu_suite --accelerator cuda:0            # all steps
    python -m tests.bench.gpu_suite --step profile,mixtral-16GB --budget-minutes 10
    python -m tests.bench.gpu_suite --step report

Nothing is downloaded: weights and prompts are random. Each step writes a JSON file of its own, and
with --resume goes on with what is missing there. README.md beside this tells what each step does,
how long it takes, and what the machine must have. `--scale small` runs all of it in seconds on the
emulated accelerator, to see that it works; such figures say nothing about any GPU.
"""

import argparse
import faulthandler
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from hrm.contract.openmp import spin_briefly
from hrm.errors import HrmError
from hrm.units import parse_bandwidth
from tests.bench.suite.setting import SCALES, Setting

RESULTS: Final = Path(__file__).with_name("results")
STEP_MINUTES: Final = 9.0
GRACE_S: Final = 20.0  # beyond a step's time until it is ended by force


def _profile(setting: Setting) -> None:
    from tests.bench.suite.checks import profile

    profile(setting)


def _tests(setting: Setting) -> None:
    from tests.bench.suite.checks import tests

    tests(setting)


def _mixtral(cap: str) -> Callable[[Setting], None]:
    def step(setting: Setting) -> None:
        from tests.bench.suite.schedules import compare

        compare(setting, cap)

    return step


def _accelerate(cap: str) -> Callable[[Setting], None]:
    def step(setting: Setting) -> None:
        from tests.bench.suite.offload import measure

        measure(setting, cap)

    return step


def _report(setting: Setting) -> None:
    from tests.bench.suite.report import write

    write(setting.results)


# In the order of their worth, should the time not do for all.
STEPS: Final[dict[str, Callable[[Setting], None]]] = {
    "profile": _profile,
    "tests": _tests,
    "mixtral-16GB": _mixtral("16GB"),
    "accelerate-16GB": _accelerate("16GB"),
    "mixtral-24GB": _mixtral("24GB"),
    "accelerate-24GB": _accelerate("24GB"),
    "report": _report,
}


def parse_steps(text: str) -> list[str]:
    """Steps by name, in the order given; a name's beginning stands for all that begin so."""
    chosen: list[str] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        found = [step for step in STEPS if word in {step, step.partition("-")[0]}]
        if not found:
            raise HrmError("--step", word, f"must be of {', '.join(STEPS)}", "correct it")
        chosen += found
    return list(dict.fromkeys(chosen)) or list(STEPS)


def results_folder(accelerator: str, scale: str) -> Path:
    """One folder a card; what is emulated or small goes where nothing is committed from."""
    if not accelerator.startswith("cuda") or scale != "full":
        return RESULTS / "untracked" / f"{accelerator.replace(':', '')}-{scale}"
    # In a process of its own: what this one made on the card would stay while the steps run.
    asked = f"import torch; print(torch.cuda.get_device_name({accelerator!r}) if torch.cuda.is_available() else '')"
    told = subprocess.run([sys.executable, "-c", asked], check=False, stdout=subprocess.PIPE, text=True).stdout.strip()
    name = told or accelerator
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps asked for; 0 if all ended well, 1 if one did not, 2 after a mistake."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return run(_options(given), given)
    except HrmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace, given: Sequence[str]) -> int:
    """One step in this process, several in one each: what a step leaves behind costs none else."""
    steps, accelerator = parse_steps(options.step), options.accelerator
    if accelerator != "emulated" and not re.fullmatch(r"cuda:\d+", accelerator):
        raise HrmError("--accelerator", accelerator, "must be cuda:K or emulated", "correct it")
    spin_briefly()  # before the name of the card is asked of torch
    folder = options.results or results_folder(accelerator, options.scale)
    minutes = options.budget_minutes or STEP_MINUTES * len(steps)
    until_s = time.monotonic() + 60 * minutes
    setting = Setting(
        accelerator=accelerator,
        scale=SCALES[options.scale],
        results=folder,
        resume=options.resume,
        link_bytes_per_s=(
            parse_bandwidth(options.link_bandwidth, "--link-bandwidth") if options.link_bandwidth else None
        ),
        command=_command(options),
        until_s=until_s,
    )
    if setting.emulated:
        print(f"emulated on the CPU, scale {options.scale}: no figure is of a GPU")
    if len(steps) == 1:
        # What is ended by force cannot tell any more where it was stuck.
        late = threading.Timer(60 * minutes + GRACE_S / 2, faulthandler.dump_traceback)
        late.daemon = True
        late.start()
        try:
            STEPS[steps[0]](setting)
        finally:
            late.cancel()
        return 0
    failed: list[str] = []
    for step in steps:
        seconds = min(60 * STEP_MINUTES, until_s - time.monotonic())
        print(f"\n== {step}", flush=True)
        if seconds <= 0 and step != "report":
            print("  left out: the budget is spent")
            failed.append(step)
        elif not _in_a_process(step, max(seconds, GRACE_S), given, folder):
            failed.append(step)
    if failed:
        print(f"\nnot done: {', '.join(failed)}; --resume goes on", file=sys.stderr)
    return int(bool(failed))


def _command(options: argparse.Namespace) -> str:
    """What would do the same elsewhere: without this run's folder and the time it had left."""
    named = {"--step": options.step, "--accelerator": options.accelerator}
    if options.scale != "full":
        named["--scale"] = options.scale
    if options.link_bandwidth:
        named["--link-bandwidth"] = options.link_bandwidth
    words = [word for pair in named.items() for word in pair]
    return shlex.join(["python", "-m", "tests.bench.gpu_suite", *words])


def _in_a_process(step: str, seconds: float, given: Sequence[str], folder: Path) -> bool:
    """Whether the step ended well within its time; after it, it is ended by force."""
    own = ["--step", step, "--results", str(folder), "--budget-minutes", f"{seconds / 60:.3f}"]
    command = [sys.executable, "-m", "tests.bench.gpu_suite", *given, *own]
    start_s = time.monotonic()
    try:
        done = subprocess.run(command, check=False, timeout=seconds + GRACE_S)
    except subprocess.TimeoutExpired:
        print(f"  ended by force after {seconds + GRACE_S:.0f} s; its file has what was measured")
        return False
    print(f"  {step}: {time.monotonic() - start_s:.0f} s", flush=True)
    return done.returncode == 0


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.gpu_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--step",
        default="",
        metavar="A,B,…",
        help=f"which of {', '.join(STEPS)} [default: all]; accelerate and mixtral stand for both",
    )
    parser.add_argument("--accelerator", default="cuda:0", help="cuda:K or emulated")
    parser.add_argument("--scale", choices=list(SCALES), default="full", help="small takes seconds")
    parser.add_argument(
        "--results", type=Path, metavar="FOLDER", help="where the JSON files go [default: tests/bench/results/CARD]"
    )
    parser.add_argument("--resume", action="store_true", help="only what is missing in --results")
    parser.add_argument(
        "--budget-minutes",
        type=float,
        metavar="M",
        help="for all steps asked for together [default: 9 each]; what does not fit is left out",
    )
    parser.add_argument("--link-bandwidth", metavar="2GB/s", help="pace of the emulated link")
    return parser.parse_args(list(arguments))


if __name__ == "__main__":
    sys.exit(main())
