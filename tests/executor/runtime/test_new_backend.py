"""Backends that are added from outside, as CONTRIBUTING says: a class and its row."""

import json
from dataclasses import replace
from typing import final

import pytest
import torch

from executor.backends import BACKENDS, AbstractBackend, BackendKind
from executor.backends.base import copy_all, host_memory
from executor.errors import RunError
from executor.job.machine import budgeted_plan
from hrm.policy_file import load_policy_file, save_policy_file
from hrm.tasks import Device
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


@final
class Card(AbstractBackend):
    """One of several devices, which has memory of its own and computes in float32 only."""

    def __init__(self, accelerator: str) -> None:
        self.name = "card"
        self.description = f"card {accelerator.partition(':')[2] or '0'}"
        self.has_own_memory = True
        self.own = list[torch.Tensor]()

    def allocate(self, level, num_bytes):
        memory = host_memory(num_bytes)
        self.own += [memory] if level is Device.GPU else []
        return memory

    def transfer(self, lane, copies):
        return copy_all(copies)

    def lane_threads(self, lane):
        return 1

    def check_dtype(self, dtype):
        if dtype != "float32":
            raise RunError("policy: dtype", dtype, f"must be one that {self.description} computes in", "use float32")


class TestDetour(BackendContract):
    @pytest.fixture
    def backend(self):
        return Detour()


class TestCard(BackendContract):
    @pytest.fixture
    def backend(self):
        return Card("card:1")


def test_a_device_with_a_number_and_memory_of_its_own_runs_a_job(run, tmp_path, monkeypatch, policy_path):
    """What lies on it does not count as the host's, and what it cannot do is refused before anything is read."""
    monkeypatch.setitem(BACKENDS, "card:K", BackendKind(lambda accelerator, *_: Card(accelerator)))
    lines = [line("r", PROMPTS[0])]
    plan = budgeted_plan(file := load_policy_file(policy_path), file.policy)
    monkeypatch.setattr("executor.job.machine.available_ram_bytes", lambda: plan.cpu.planned_bytes)
    for accelerator, words in (("card", "card 0"), ("card:7", "card 7")):
        run(lines, "--accelerator", accelerator, output=accelerator)
        content = json.loads((tmp_path / accelerator / "run.json").read_text())
        assert content["accelerator"]["description"] == words
        assert not content["accelerator"]["emulated"]
    captured, _ = run(lines, "--accelerator", "emulated", output="full", code=2)
    refused(captured, "memory of this machine", "available")
    captured, _ = run(lines, "--accelerator", "card:1", "--link-bandwidth", "1GB/s", output="paced", code=2)
    refused(captured, "--link-bandwidth", "leave it out")
    narrow = replace(file.policy, dtype="bfloat16", weight_format="", kv_format="")
    save_policy_file(policy_path, replace(file, policy=narrow))
    captured, _ = run(lines, "--accelerator", "card:1", output="narrow", code=2)
    refused(captured, "policy: dtype is 'bfloat16'", "card 1 computes in")


def test_a_backend_with_its_row_runs_a_job(run, tmp_path, monkeypatch):
    lines = [line(f"r{index}", prompt) for index, prompt in enumerate(PROMPTS[:5])]
    captured, _ = run(lines, "--accelerator", "detour", output="unknown", code=2)
    refused(captured, "--accelerator is 'detour'", *BACKENDS)
    monkeypatch.setitem(BACKENDS, "detour", BackendKind(lambda *_: Detour()))
    _, there = run(lines, "--accelerator", "detour")
    _, here = run(lines, "--accelerator", "cpu", output="cpu")
    assert {name: tokens_of(item) for name, item in there.items()} == {
        name: tokens_of(item) for name, item in here.items()
    }
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    assert content["accelerator"]["name"] == "detour"
    captured, _ = run(lines, "--accelerator", "elsewhere", output="unknown", code=2)
    refused(captured, "null, detour")
