"""A few tests that tell most of the accelerator, one line as each ends, and the machine's profile."""

import math
import os
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final, final

import pytest

from executor.model.host_kernels import host_kernels
from hrm.hardware import Figure
from hrm.machines import save_profile
from hrm.profile_diff import figures_of
from hrm.profiling import ProfileOptions, profile_machine
from tests.bench.first_run.figures import Figures
from tests.bench.first_run.setting import RunSetting

ROOT: Final = Path(__file__).parents[3]
MOST_TESTS: Final = 40
SPARE_S: Final = 10.0  # of a stage's time, in which no other test is begun
PROFILE_S: Final = {"full": 35.0, "small": 1.5}
BESIDE_S: Final = 25.0  # of the stage's time, what measuring takes beside its own: without a profile nothing follows
# Each policy here with another schedule and model, so that every kernel, edge and place of a cache is met.
PARITY: Final = (
    "*cgopipe-all streamed, both on the gpu-*",
    "*flexgen-attention on the cpu-*",
    "*fastdecode-both on the cpu-*",
    "*deepspeed-some experts stay, ragged-*",
    "*cgopipe-kv split, gpu-*",
    "*flexgen-c-kv split, cpu-*",
    "*cgopipe-prefill's experts on the cpu, ragged, staged-*",
    "*cgopipe-split prompts, gpu-*",
    "*flexgen-staged, gpu, uneven-*",
    "*cgopipe-kv on the gpu-*",
)
ON_A_CARD: Final = {
    "tests/executor/runtime/test_cuda.py": (
        *(f"*TestOnACard::test_greedy{pattern}" for pattern in PARITY),
        "*TestOnACard::test_bfloat16*",
        "*TestOnACard::test_peak*",
        "*TestOnACard::test_a_second_batch*",
    ),
    "tests/executor/model/test_gpu_sizes.py": ("*test_gpu_sizes*cuda:0*",),
    "tests/contracts/test_backends.py": (
        "*TestCudaBackend::*round_trip*",
        "*TestCudaBackend::*strided*",
        "*TestCudaBackend::*streams*",
    ),
    # Two ranks that are threads, on one card.
    "tests/executor/runtime/test_ranks.py": (
        "*test_greedy_tokens_of_two_ranks_on_one_card*-all streamed, both on the gpu*",
        "*test_greedy_tokens_of_two_ranks_on_one_card*-both on the cpu*",
        "*test_greedy_tokens_of_two_ranks_on_one_card*-some experts stay, ragged*",
        "*test_greedy_tokens_of_two_ranks_on_one_card*-kv split, cpu*",
    ),
}
ELSEWHERE: Final = {
    "tests/executor/model/test_gpu_sizes.py": ("*test_gpu_sizes*cpu*",),
    "tests/contracts/test_backends.py": ("*TestEmulated*round_trip*", "*TestEmulated*there_before*"),
    "tests/executor/runtime/test_ranks.py": ("*test_ranks_on_one_card*all streamed*",),
}
RANKS_ON_A_CARD: Final = {"tests/executor/ranks/test_job.py": ("*test_two_ranks_on_cards*",)}
RANKS_ELSEWHERE: Final = {"tests/executor/ranks/test_job.py": ("*test_two_ranks_answer*",)}
OF_RANKS: Final = "test_ranks.py"  # whose failures do not keep the run from measuring one rank


def tests(setting: RunSetting, figures: Figures) -> None:
    """At most 40 tests; the gate is open if some passed and none failed but of several ranks."""
    counts, is_good = _run(setting, ELSEWHERE if setting.suite.emulated else ON_A_CARD, figures)
    figures.put("tests", counts)
    figures.gate("tests", is_open=is_good, told=", ".join(f"{count} {outcome}" for outcome, count in counts.items()))


def ranks(setting: RunSetting, figures: Figures) -> None:
    """Two ranks in a process each, on one card, and one on each of two where there are two."""
    counts, is_good = _run(setting, RANKS_ELSEWHERE if setting.suite.emulated else RANKS_ON_A_CARD, figures)
    figures.put("tests of ranks in processes", {**counts, "good": is_good})


def _run(setting: RunSetting, chosen: Mapping[str, Sequence[str]], figures: Figures) -> tuple[dict[str, int], bool]:
    """Run the tests of these files that have these names; how many had which outcome, and whether that is good."""
    patterns = {pattern for patterns in chosen.values() for pattern in patterns}
    reporter = Reporter(figures, patterns, setting.suite.until_s - SPARE_S)
    os.chdir(ROOT)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none of those that a machine happens to have
    # Other versions of packages than the pinned ones may warn: here that is no failure.
    options = ["-q", "--tb=short", "-W", "default", "-p", "no:cacheprovider", "--maxfail=5"]
    code = pytest.main([*options, *chosen], plugins=[reporter])
    counts, of_ranks = reporter.counts, reporter.of_ranks
    if any(of_ranks.values()):
        figures.put("tests of ranks", of_ranks)
    ended = int(code) in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}
    return counts, counts["passed"] > 0 and not counts["failed"] and ended


@final
class Reporter:
    """A plugin of pytest's that keeps the chosen tests, begins none after `until_s`, and tells of each as it ends."""

    def __init__(self, figures: Figures, patterns: set[str], until_s: float = math.inf) -> None:
        self._figures, self._patterns, self._until_s = figures, patterns, until_s
        self.kept = list[pytest.Item]()
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.of_ranks = dict(self.counts)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Of several models of a policy's the first; no more than 40 in all."""
        kept = self.kept
        for pattern in sorted(self._patterns):
            found = [item for item in items if fnmatch(item.nodeid, pattern) and item not in kept]
            kept += found[:1] if "TestOnACard::test_greedy" in pattern else found
            if not found:
                self._figures.put(f"no test is {pattern}", value=True)
        del kept[MOST_TESTS:]
        items[:] = kept

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        """Of a stage that is ended by force it would not be known whether its tests were good until then."""
        if time.monotonic() > self._until_s:
            pytest.skip("no time is left")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A line for each outcome, with the end of what a failure says."""
        if report.when != "call" and report.passed:
            return
        (self.of_ranks if f"/{OF_RANKS}::" in report.nodeid else self.counts)[report.outcome] += 1
        told: dict[str, Any] = {"outcome": report.outcome, "s": round(report.duration, 2)}
        if report.failed:
            told["why"] = str(report.longrepr)[-1500:]
        self._figures.put(f"test {report.nodeid}", told)


def profile(setting: RunSetting, figures: Figures) -> None:
    """The machine's profile in one dtype, in as many passes as the time is enough for."""
    suite = setting.suite
    caps = suite.scale.gpu_memory_bytes
    measured = profile_machine(
        ProfileOptions(
            suite.accelerator,
            gpu_memory_bytes=max(caps.values()) if suite.emulated else None,
            model=suite.scale.spec,
            dtypes=("bfloat16",),
            quick=True,
            command=suite.command,
            budget_s=max(1.0, min(PROFILE_S[suite.scale.name], suite.left_s() - BESIDE_S)),
            kernels=host_kernels(),
        )
    )
    save_profile(suite.profile_path, measured)
    figures.put("profile", {name: _plain(figure) for name, figure in figures_of(measured).items()})


def _plain(figure: Figure) -> dict[str, float | str | None]:
    return {"n": figure.samples, "median": figure.value, "p20": figure.p20, "p80": figure.p80}
