"""A plugin of pytest's that writes a line for every test as it ends, so that an end by force loses no other."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

FILE: Final = "TALLY_FILE"  # the variable of the environment that names it


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """What became of a test; what goes wrong before or after it is an error."""
    if report.when == "call" or not report.passed:
        _put("errors" if report.failed and report.when != "call" else report.outcome, report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A file that could not be read."""
    if report.failed:
        _put("errors", report.nodeid)


def _put(outcome: str, test: str) -> None:
    with Path(os.environ[FILE]).open("a", encoding="utf-8") as file:
        file.write(f"{outcome} {test}\n")


def read(path: Path) -> Iterator[tuple[str, str]]:
    """Outcomes and tests; none if there is no such file."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        outcome, _, test = line.partition(" ")
        yield outcome, test
