"""A backend that is added from outside, as CONTRIBUTING says: a class and its row."""

import json
from typing import final

import pytest

from executor.backends import BACKENDS, AbstractBackend
from executor.backends.base import host_memory
from tests.contracts.backend import BackendContract
from tests.executor.runtime.jobs import PROMPTS, line, refused, tokens_of


@final
class Detour(AbstractBackend):
    """Memory of the host's, in which every transfer goes through a buffer between source and target."""

    def __init__(self) -> None:
        self.name = "detour"
        self.description = "the CPU by a detour"

    def allocate(self, level, num_bytes):
        return host_memory(num_bytes)

    def transfer(self, lane, copies):
        num_bytes = 0
        for target, source in copies:
            target.copy_(source.clone())
            num_bytes += source.nbytes
        return num_bytes

    def lane_threads(self, lane):
        return 1


class TestDetour(BackendContract):
    @pytest.fixture
    def backend(self):
        return Detour()


def test_a_backend_with_its_row_runs_a_job(run, tmp_path, monkeypatch):
    lines = [line(f"r{index}", prompt) for index, prompt in enumerate(PROMPTS[:5])]
    captured, _ = run(lines, "--accelerator", "detour", output="unknown", code=2)
    refused(captured, "--accelerator is 'detour'", *BACKENDS)
    monkeypatch.setitem(BACKENDS, "detour", lambda *_: Detour())
    _, there = run(lines, "--accelerator", "detour")
    _, here = run(lines, "--accelerator", "cpu", output="cpu")
    assert {name: tokens_of(item) for name, item in there.items()} == {
        name: tokens_of(item) for name, item in here.items()
    }
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    assert content["accelerator"]["name"] == "detour"
    captured, _ = run(lines, "--accelerator", "elsewhere", output="unknown", code=2)
    refused(captured, "null, detour")
