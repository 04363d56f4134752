import gc
import threading
from dataclasses import replace

import pytest

from hrm.policy_file import save_policy_file
from tests.executor.runtime.jobs import exit_code, outputs, run_words, write_lines
from tests.executor.runtime.support import architecture, policy_file


@pytest.fixture(autouse=True)
def lanes_take_turns(one_core):
    """Engines run in most of these tests."""


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
def folder(tiny_folders):
    return tiny_folders["wide heads"]


@pytest.fixture
def policy_path(folder, tmp_path):
    """A policy for the test's own `folder`."""
    path = tmp_path / "policy.json"
    save_policy_file(path, policy_file(replace(architecture(folder).spec, name="another name")))
    return path


@pytest.fixture
def run(folder, policy_path, tmp_path, capsys):
    """Run `executor run` on lines (objects, or bytes as they stand)."""

    def call(lines, *arguments, output="run", model=None, code=0):
        path = write_lines(tmp_path, lines)
        ended = exit_code(run_words(model or folder, policy_path, path, tmp_path / output, *arguments))
        captured = capsys.readouterr()
        assert ended == code, captured.err
        return captured, outputs(tmp_path / output)

    return call
