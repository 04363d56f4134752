"""The machine's profile, and whether the backend keeps its contract and computes the same."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from executor.model.host_kernels import host_kernels
from hrm.errors import HrmError
from hrm.hardware import Figure
from hrm.machines import save_profile
from hrm.profile_diff import figures_of
from hrm.profiling import ProfileOptions, profile_machine
from tests.bench.suite import tally
from tests.bench.suite.record import Record
from tests.bench.suite.setting import Setting

ROOT = Path(__file__).parents[3]
CUDA_TESTS = ("tests/contracts", "tests/executor")
OTHER_TESTS = ("tests/contracts/test_backends.py",)
TESTS_S = 480.0
MOST_FAILURES = 25  # after which the rest is left out


def profile(setting: Setting) -> None:
    """`hrm profile` of the card and its host, with the model's shapes; beside it all figures."""
    record = Record(setting, "profile")
    if record.complete and setting.profile_path.is_file():
        return
    caps = setting.scale.gpu_memory_bytes
    setting.results.mkdir(parents=True, exist_ok=True)
    measured = profile_machine(
        ProfileOptions(
            setting.accelerator,
            gpu_memory_bytes=max(caps.values()) if setting.emulated else None,
            link_bandwidth_bytes_per_s=setting.link_bytes_per_s,
            model=setting.scale.spec,
            dtypes=("bfloat16", "float16"),
            quick=setting.emulated,
            command=setting.command,
            budget_s=min(setting.scale.profile_s, setting.left_s()),
            kernels=host_kernels(),
        ),
        progress=lambda done_s, total_s, what: print(f"  {what} ({done_s:.0f} of about {total_s:.0f} s)", flush=True),
    )
    save_profile(setting.profile_path, measured)
    record.put("environment", measured.environment)
    record.put("figures", {name: _plain(figure) for name, figure in figures_of(measured).items()})
    record.finish()


def _plain(figure: Figure) -> dict[str, float | str | None]:
    return {
        "n": figure.samples,
        "median": figure.value,
        "p20": figure.p20,
        "p80": figure.p80,
        "source": figure.source.value,
        "note": figure.note,
    }


def tests(setting: Setting) -> None:
    """The contract and parity tests that need the accelerator; counts, and what failed."""
    record = Record(setting, "tests")
    if record.complete:
        return
    chosen = ["-m", "not cuda", *OTHER_TESTS] if setting.emulated else ["-m", "cuda", *CUDA_TESTS]
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "tests.txt"
        # Other versions of packages than the pinned ones may warn: here that is no failure.
        # A card that has failed once may fail every test after it, and each tells why at length.
        options = ["-q", "--tb=short", f"--maxfail={MOST_FAILURES}", "-W", "default", "-p", "no:cacheprovider"]
        options += ["-p", tally.__name__, "--continue-on-collection-errors"]
        seconds = min(TESTS_S, setting.left_s())
        try:
            code = subprocess.run(
                [sys.executable, "-m", "pytest", *options, *chosen],
                cwd=ROOT,
                check=False,
                timeout=seconds,
                env={**os.environ, tally.FILE: str(lines)},
            ).returncode
            ended = f"ended with exit code {code}"
        except subprocess.TimeoutExpired:
            ended = f"did not end within {seconds:.0f} s"
            record.leave_out("rest of the tests", f"pytest {ended}")
        found = list(tally.read(lines))
    if not found:
        record.leave_out("counts", f"pytest {ended}")
        raise HrmError("step tests", f"<{ended}>", "must have run pytest 9 or newer", "see its output above")
    counts = {name: sum(outcome == name for outcome, _ in found) for name in ("passed", "failed", "errors", "skipped")}
    bad = [test for outcome, test in found if outcome in {"failed", "errors"}]
    record.put("counts", counts)
    record.put("failed", bad)
    record.put("selection", " ".join(chosen))
    record.finish()
    print(f"  {', '.join(f'{count} {outcome}' for outcome, count in counts.items())}")
