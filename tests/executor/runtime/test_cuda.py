"""Generation on a card: the same tokens, within the planned memory. And its parts without one."""

import gc
from dataclasses import replace

import pytest
import torch

from executor.backends import make_backend
from executor.backends.cuda import kernels_of
from executor.backends.pinned import PinnableMemory
from executor.errors import RunError
from executor.job.machine import accelerator_for
from executor.model.gpu import FLASH_DTYPES
from hrm.memory import purposes
from hrm.policy import ScheduleName
from hrm.units import MIB
from tests.executor.runtime.fake_cuda import ACCELERATOR, installed
from tests.executor.runtime.support import architecture, generate, generator, machine, requests
from tests.executor.runtime.test_parity import MAX_TOKENS, POLICIES, PROMPTS, expected, policy_of

on_a_card = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class TestOnACard:
    pytestmark = on_a_card

    @pytest.mark.parametrize("schedule", ScheduleName)
    @pytest.mark.parametrize("choices", POLICIES.values(), ids=list(POLICIES))
    def test_greedy_tokens_equal_those_of_transformers(self, tiny_folder, choices, schedule):
        policy = policy_of(tiny_folder, schedule, choices)
        with generator(tiny_folder, policy, backend=make_backend("cuda:0", None)) as made:
            done = generate(made, requests(PROMPTS, max_tokens=MAX_TOKENS))
        tokens = {name: completion.tokens for name, completion in done.items()}
        assert tokens == expected(tiny_folder)

    @pytest.mark.parametrize("name", ["kv on the gpu", "both on the cpu", "kv split, gpu"])
    def test_bfloat16_is_about_as_on_the_cpu(self, tiny_folders, name):
        folder = tiny_folders["wide heads"]
        policy = replace(
            policy_of(folder, ScheduleName.CGOPIPE, POLICIES[name]), dtype="bfloat16", weight_format="", kv_format=""
        )
        firsts = []
        for accelerator in ("cuda:0", "cpu"):
            with generator(folder, policy, backend=make_backend(accelerator, None)) as made:
                done = generate(made, requests(PROMPTS, max_tokens=1))
            firsts.append([done[f"request-{i}"].tokens for i in range(len(PROMPTS))])
        assert sum(a == b for a, b in zip(*firsts, strict=True)) >= len(PROMPTS) - 2

    @pytest.mark.parametrize("name", ["kv on the gpu", "both on the cpu", "kv split, gpu"])
    @pytest.mark.parametrize("temperature", [0, 1])
    def test_peak_is_within_the_plan(self, tiny_folders, name, temperature):
        folder = tiny_folders["wide heads"]
        policy = policy_of(folder, ScheduleName.CGOPIPE, POLICIES[name])
        backend = make_backend("cuda:0", None)
        with generator(folder, policy, backend=backend) as made:
            generate(made, requests(PROMPTS, max_tokens=5, temperature=temperature))
            peak = sum(made.peak_bytes["gpu"].values())
            # One workspace of cuBLAS's, the lane's; the allocator's own count has it too.
            assert backend.library_bytes < 40 * MIB
        gpu, _ = purposes(architecture(folder).spec, policy)
        assert backend.peak_gpu_bytes() == peak
        assert peak <= sum(gpu.values())

    def test_a_second_batch_takes_no_more_memory_of_the_driver(self, tiny_folders):
        folder = tiny_folders["wide heads"]
        policy = policy_of(folder, ScheduleName.CGOPIPE, POLICIES["kv on the gpu"])
        with generator(folder, policy, backend=make_backend("cuda:0", None)) as made:
            wanted = requests(PROMPTS, max_tokens=5, ignore_eos=True)
            generate(made, wanted)
            reserved = torch.cuda.memory_reserved(0)
            generate(made, wanted)
            assert torch.cuda.memory_reserved(0) == reserved


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
@pytest.mark.parametrize("name", ["both on the cpu", "kv split, gpu", "split prompts, gpu"])
def test_the_backend_runs_on_a_card_that_is_none(tiny_folders, name, capability, monkeypatch):
    """Its own code; torch.cuda, streams and kernels are the tests'."""
    monkeypatch.setattr("executor.model.gpu.FLASH_DTYPES", (*FLASH_DTYPES, torch.float32))
    folder = tiny_folders["wide heads"]
    policy = policy_of(folder, ScheduleName.CGOPIPE, POLICIES[name])
    with installed(capability):
        backend = make_backend(ACCELERATOR, None)
        with generator(folder, policy, backend=backend) as made:
            done = generate(made, requests(PROMPTS, max_tokens=4))
    wanted = {name: tokens[:4] for name, tokens in expected(folder).items()}
    assert {name: completion.tokens for name, completion in done.items()} == wanted


def test_kernels_are_those_that_a_card_has(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert kernels_of((7, 5)).flash is None
    assert kernels_of((7, 5)).grouped is None
    assert kernels_of((8, 9)).flash is not None
    assert kernels_of((8, 9)).grouped is None, "there it would wait for the device"
    assert kernels_of((9, 0)).grouped is not None


class Driver:
    """Pins up to a budget."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes, self.pinned = budget_bytes, {}

    def cudaHostRegister(self, address, size, flags):  # noqa: N802
        assert address not in self.pinned
        if sum(self.pinned.values()) + size > self.budget_bytes:
            return 2
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address):  # noqa: N802
        del self.pinned[address]
        return 0


def test_memory_stays_pinned_as_long_as_a_view_of_it_lives():
    driver = Driver(10**8)
    memory = PinnableMemory(driver)
    arena = memory.allocate(5_000_000)
    assert driver.pinned == {}
    assert memory.pin(arena) == 5_000_000
    view = arena[10:20].view(torch.int16)
    del arena
    gc.collect()
    assert list(driver.pinned.values()) == [5_000_000], "in one piece, as large as asked"
    assert view.tolist() == [0] * 5
    del view
    gc.collect()
    assert driver.pinned == {}
    assert memory.pin(memory.allocate(0)) == 0


def test_memory_that_was_unpinned_can_be_used_and_pinned_again():
    driver = Driver(10**8)
    memory = PinnableMemory(driver)
    arena = memory.allocate(5_000_000)
    memory.pin(arena)
    memory.unpin(arena)
    assert driver.pinned == {}
    memory.unpin(arena)
    assert not arena.any()
    assert memory.pin(arena) == 5_000_000
    del arena
    gc.collect()
    assert driver.pinned == {}


@pytest.mark.parametrize("budget_bytes", [0, 50_000_000, 100_000_000, 390_000_000])
def test_a_budget_that_is_too_small_is_probed(budget_bytes):
    driver = Driver(budget_bytes)
    memory = PinnableMemory(driver)
    arena = memory.allocate(400_000_000)
    found = memory.pin(arena)
    assert budget_bytes - 400_000_000 / 16 <= found <= budget_bytes
    assert driver.pinned == {}


@pytest.fixture
def card(monkeypatch):
    """A card as far as torch tells of it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")


def test_auto_is_the_gpu_that_the_policy_was_solved_for(card):
    profile = machine()
    top = profile.top
    processor = replace(top.processor, name="GPU 1")
    solved_for = replace(profile, accelerator="cuda", levels=(replace(top, processor=processor), profile.host))
    assert accelerator_for("auto", solved_for) == "cuda:1"
    assert accelerator_for("cpu", solved_for) == "cpu"
    assert accelerator_for("auto", profile) == "auto"
    other = replace(processor, name="GPU 9")
    levels = (replace(top, processor=other), profile.host)
    assert accelerator_for("auto", replace(solved_for, levels=levels)) == "auto"


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a card")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:3"])
def test_without_a_card_there_is_none(name):
    with pytest.raises(RunError, match="needs a CUDA device and torch finds none"):
        make_backend(name, None)


def test_several_at_once_are_refused():
    with pytest.raises(RunError, match="must name one device"):
        make_backend("cuda:0,1", None)
