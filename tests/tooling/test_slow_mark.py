"""Whoever writes a slow test is told to mark it, by the processor's time and not by the clock on the wall."""

import subprocess
import sys
from pathlib import Path

CONFTEST = """
import tests.conftest
from tests.conftest import pytest_runtest_call, pytest_terminal_summary
tests.conftest.SURELY_SLOW_S = 0.1
"""
CASES = """
import time
import pytest

def work():
    began_s = time.process_time()
    while time.process_time() - began_s < 0.2:
        pass

def test_works(): work()
@pytest.mark.slow
def test_is_marked(): work()
def test_sleeps(): time.sleep(0.2)
def test_fails():
    work()
    assert False
"""


def test_what_works_long_without_the_mark_is_named(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_cases.py").write_text(CASES)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow: x\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    told = [line.partition(" took ")[0] for line in done.stdout.splitlines() if "mark it slow" in line]
    assert told == ["test_cases.py::test_works"], done.stdout
