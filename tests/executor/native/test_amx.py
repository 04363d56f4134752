"""AMX's tiles as the path `amx` uses them, instruction by instruction, on processors without."""

import os
import re
import subprocess
import sys
from pathlib import Path
from shutil import which

import pytest

from executor import native

HERE = Path(__file__).parent


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.skipif("avx512-bf16" not in native.paths(), reason="the path is built of AVX-512 with bfloat16")
@pytest.mark.skipif(which("g++") is None, reason="needs g++")
def test_tiles_are_right_instruction_by_instruction(tmp_path):
    """All tests of tiles pass where a signal handler does what each of AMX's instructions is said to do."""
    library = tmp_path / "tiles.so"
    flags = "-std=c++20", "-O3", "-mavx2", "-mfma", "-shared", "-fPIC"
    subprocess.run(["g++", *flags, HERE / "tiles_by_signal.cpp", "-o", library], check=True)
    # pytest's own handler of signals would take its place, and its options are in the configuration.
    options = "-c", os.devnull, "--rootdir", tmp_path, "--import-mode=importlib", "-p", "no:faulthandler"
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "-p", "no:cacheprovider", "-k", "amx", HERE],
        env={**os.environ, "LD_PRELOAD": str(library), "TESTED_TILES": "amx"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    told = re.search(r"(\d+) products of tiles in software", tests.stdout)
    assert tests.returncode == 0, tests.stdout
    assert told
    assert int(told[1]) > 1000
