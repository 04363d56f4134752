import gc
import threading
from dataclasses import replace

import pytest

from hrm.policy_file import PolicyFile, profile_hash, save_policy_file
from hrm.workload import Workload
from tests.executor.runtime.jobs import PROFILE, exit_code, outputs, write_lines
from tests.executor.runtime.support import architecture, make_policy


@pytest.fixture(autouse=True)
def no_thread_left_behind():
    """Every run ends all the threads that it started."""
    before = set(threading.enumerate())
    yield
    left = {thread.name for thread in set(threading.enumerate()) - before}
    assert not {name for name in left if name.startswith(("lane-", "progress", "outputs"))}


@pytest.fixture
def no_collection():
    """No garbage collection: an interrupt that strikes in a callback of it is lost in Python."""
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def policy_path(folder, tmp_path):
    """A policy for the test's own `folder`: two micro-batches of two."""
    spec = architecture(folder).spec
    path = tmp_path / "policy.json"
    save_policy_file(
        path,
        PolicyFile(
            policy=make_policy(spec.num_layers, batch_size=4, micro_batch_size=2),
            memory_budget_bytes={"gpu": 10**6, "cpu": 10**8},
            model=replace(spec, name="another name"),
            workload=Workload(name="test", prompt_len=20, max_prompt_len=40, gen_len=5),
            profile=PROFILE,
            profile_hash=profile_hash(PROFILE),
            predicted={},
        ),
    )
    return path


@pytest.fixture
def run(folder, policy_path, tmp_path, capsys):
    """Run `executor run` on lines (objects, or bytes as they stand)."""

    def call(lines, *arguments, output="run", model=None, code=0):
        path = write_lines(tmp_path, lines)
        arguments = (
            "run",
            "--model",
            str(model or folder),
            "--policy",
            str(policy_path),
            "--input",
            str(path),
            "--output-dir",
            str(tmp_path / output),
            *arguments,
        )
        ended = exit_code(list(arguments))
        captured = capsys.readouterr()
        assert ended == code, captured.err
        return captured, outputs(tmp_path / output)

    return call
