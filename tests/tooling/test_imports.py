"""Heavy libraries load where they are used, not when a package is imported.

The import rules between modules are contracts in pyproject.toml; `make lint` checks them.
"""

import subprocess
import sys

import pytest

from executor.native import kernels

HEAVY = {"torch", "matplotlib", "optuna", "scipy", "pandas", "huggingface_hub"}


def modules_loaded_by(statement: str) -> set[str]:
    """Modules in a fresh interpreter after `statement`."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["hrm", "hrm.cli"])
def test_import_of_hrm_loads_no_heavy_library(module: str):
    assert modules_loaded_by(f"import {module}") & HEAVY == set()


@pytest.mark.parametrize("module", ["executor", "executor.cli"])
def test_help_of_executor_loads_no_torch(module: str):
    assert "torch" not in modules_loaded_by(f"import {module}")


# It is recorded in the middle of a run, which a second of imports would hold up.
FIRST_TAPE = """
import torch
from executor.native.tape import Numbers, Tape
row = torch.zeros(1, dtype=torch.int64)
assert Tape.record(lambda: row.view(1, 1), Numbers(row, row, [0], [1])) is not None
"""


def test_what_runs_jobs_loads_neither_the_compiler_of_torch_nor_ray():
    """Not what may run them on Ray, nor a first tape."""
    imports = "import executor.generate, executor.cli.run, executor.job, executor.ray, executor.ray.fleet"
    loaded = modules_loaded_by(f"{imports}\n{FIRST_TAPE if kernels() else ''}")
    assert loaded & {"torch._dynamo", "ray"} == set()
