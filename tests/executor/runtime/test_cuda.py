"""Generation on a card: the same tokens, within the planned memory. And its parts without one."""

import gc
import os
import signal
import threading
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import pytest
import torch

from executor.backends import in_thread_of_its_own, make_backend
from executor.backends.cuda import FLASH_CAPABILITY, kernels_of
from executor.errors import RunError
from executor.handlers import HostArenas
from executor.job.machine import AcceleratorOptions, accelerator_for, prepare
from executor.loading import Loading
from executor.model.gpu import FLASH_DTYPES
from hrm.buffers import Purpose
from hrm.memory import ALWAYS_PINNED, PINNED_IF_THERE_IS_ROOM, purposes
from hrm.policy import ScheduleName
from hrm.profiling.pinned import PinnableMemory
from hrm.tasks import Device, Lane
from hrm.units import MIB
from tests.executor.runtime.device_tensor import DeviceTensor, WithDevice
from tests.executor.runtime.fake_cuda import ACCELERATOR, TOTAL_BYTES, installed
from tests.executor.runtime.support import (
    architecture,
    generate,
    generator,
    machine,
    make_policy,
    policy_file,
    requests,
)
from tests.executor.runtime.test_parity import MAX_TOKENS, PAIRS, POLICIES, PROMPTS, expected, policy_of

on_a_card = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class TestOnACard:
    pytestmark = on_a_card

    @pytest.mark.parametrize(("schedule", "name", "model"), PAIRS)
    def test_greedy_tokens_equal_those_of_transformers(self, tiny_folders, schedule, name, model):
        folder = tiny_folders[model]
        policy = policy_of(folder, schedule, POLICIES[name])
        with generator(folder, policy, backend=make_backend("cuda:0", None)) as made:
            done = generate(made, requests(PROMPTS, max_tokens=MAX_TOKENS))
        assert {name: completion.tokens for name, completion in done.items()} == expected(folder)

    @pytest.mark.parametrize("name", ["kv on the gpu", "both on the cpu", "kv split, gpu"])
    def test_bfloat16_is_about_as_on_the_cpu(self, tiny_folders, name):
        if torch.cuda.get_device_capability(0) < FLASH_CAPABILITY:
            pytest.skip("it only emulates bfloat16")
        folder = tiny_folders["wide heads"]
        policy = replace(
            policy_of(folder, ScheduleName.CGOPIPE, POLICIES[name]), dtype="bfloat16", weight_format="", kv_format=""
        )
        answers = []
        for accelerator in ("cuda:0", "cpu"):
            with generator(folder, policy, backend=make_backend(accelerator, None)) as made:
                done = generate(made, requests(PROMPTS, max_tokens=5, ignore_eos=True))
            answers.append([done[f"request-{i}"].tokens for i in range(len(PROMPTS))])
        pairs = list(zip(*answers, strict=True))
        assert sum(a[0] == b[0] for a, b in pairs) >= len(PROMPTS) - 2
        # What differs once goes on otherwise: near ties of a tiny model.
        assert sum(a == b for a, b in pairs) >= len(PROMPTS) // 2

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
        assert peak <= sum(gpu.values()) + MIB, "but for what CUDA's sorts take of a tiny model's"

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
            done = generate(made, requests(PROMPTS[:12], max_tokens=3))
    wanted = {name: tokens[:3] for name, tokens in list(expected(folder).items())[:12]}
    assert {name: completion.tokens for name, completion in done.items()} == wanted


def test_kernels_are_those_that_a_card_has(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert kernels_of((7, 5)).flash is None
    assert kernels_of((7, 5)).grouped is None
    assert kernels_of((8, 9)).flash is not None
    assert kernels_of((8, 9)).grouped is None, "there it would wait for the device"
    assert kernels_of((9, 0)).grouped is not None


PAGE = 4096


class Driver:
    """Pins up to a budget, and counts how often it is asked to."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes, self.pinned, self.calls = budget_bytes, {}, 0

    def cudaHostRegister(self, address, size, flags):  # noqa: N802
        assert address not in self.pinned
        self.calls += 1
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
    assert memory.pin(arena)
    view = arena[10:20].view(torch.int16)
    del arena
    gc.collect()
    assert list(driver.pinned.values()) == [5_000_000], "in one piece, as large as asked"
    assert view.tolist() == [0] * 5
    del view
    gc.collect()
    assert driver.pinned == {}
    assert memory.pin(memory.allocate(0))


def test_memory_that_was_unpinned_can_be_used_and_pinned_again():
    driver = Driver(10**8)
    memory = PinnableMemory(driver)
    arena = memory.allocate(5_000_000)
    memory.pin(arena)
    memory.unpin(arena)
    assert driver.pinned == {}
    memory.unpin(arena)
    assert not arena.any()
    assert memory.pin(arena)
    del arena
    gc.collect()
    assert driver.pinned == {}


@pytest.mark.parametrize(("budget_bytes", "calls"), [(0, 1), (5 * PAGE, 3), (8 * PAGE, 4)])
def test_large_memory_is_pinned_in_pieces_or_not_at_all(budget_bytes, calls):
    driver = Driver(budget_bytes)
    memory = PinnableMemory(driver, piece_bytes=2 * PAGE)
    arena = memory.allocate(7 * PAGE + 5)
    assert memory.pin(arena) == (budget_bytes == 8 * PAGE)
    assert driver.calls == calls, "a failure is not looked into"
    if budget_bytes < 8 * PAGE:
        assert driver.pinned == {}
        return
    sizes = {address - arena.data_ptr(): size for address, size in driver.pinned.items()}
    assert sizes == {0: 2 * PAGE, 2 * PAGE: 2 * PAGE, 4 * PAGE: 2 * PAGE, 6 * PAGE: PAGE + 5}
    memory.unpin(arena)
    assert driver.pinned == {}


@pytest.mark.parametrize("to_device", [True, False])
def test_no_copy_goes_on_from_one_registration_into_another(to_device):
    driver = Driver(10**8)
    memory = PinnableMemory(driver, piece_bytes=2 * PAGE)
    arena, other = memory.allocate(8 * PAGE), memory.allocate(PAGE)
    assert memory.pin(arena)
    assert memory.pin(other)
    rng = Random(0)
    for _ in range(50):
        first, last = sorted(rng.sample(range(2 * PAGE), 2))
        host = arena.view(torch.float32)[first : last + 1]
        there = torch.rand(len(host))
        with WithDevice():
            device = DeviceTensor(there)
        whole = (device, host) if to_device else (host, device)
        parts = memory.split([whole, (other, other)])
        assert sum(source.nbytes for _, source in parts) == host.nbytes + PAGE
        for pair in parts:
            start = pair[to_device].data_ptr()
            end = start + pair[to_device].nbytes
            assert any(at <= start and end <= at + size for at, size in driver.pinned.items())
        for target, source in parts[:-1]:
            target.copy_(source)
        assert torch.equal(host, there)


def test_a_backend_s_transfers_keep_to_registrations(monkeypatch):
    """On a card that is none, whose driver fails as CUDA's does."""
    monkeypatch.setattr("executor.backends.cuda.PinnableMemory", partial(PinnableMemory, piece_bytes=2 * PAGE))
    with installed((9, 0)), WithDevice():
        backend = make_backend(ACCELERATOR, None)
        host, device = backend.allocate(Device.CPU, 7 * PAGE), backend.allocate(Device.GPU, 7 * PAGE)
        assert backend.pin(host)
        host.copy_(torch.arange(7 * PAGE) % 251)
        copied: list[torch.Tensor] = []
        each: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
        monkeypatch.setattr(torch, "_foreach_copy_", lambda a, b, **how: (copied.extend(b), each(a, b, **how)))
        assert backend.transfer(Lane.H2D, [(device, host)]) == 7 * PAGE
        backend.synchronise()
        assert torch.equal(device.cpu(), host)
    assert [len(source) // PAGE for source in copied] == [2, 2, 2, 1]


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_memory_is_taken_and_pinned_in_pieces_each_of_which_is_told(folder, monkeypatch, accelerator):
    piece, told = 4 * PAGE, dict[str, list[int]]()
    monkeypatch.setattr("hrm.profiling.pinned.PIECE_BYTES", piece)
    monkeypatch.setattr("executor.backends.cuda.PinnableMemory", partial(PinnableMemory, piece_bytes=piece))

    class Told(Loading):
        def begin(self, stage: str, total_bytes: int) -> None:
            super().begin(stage, total_bytes)
            told[stage] = [total_bytes]

        def add(self, num_bytes: int) -> None:
            super().add(num_bytes)
            told[self.stage].append(num_bytes)

    spec, policy = architecture(folder).spec, make_policy(architecture(folder).spec.num_layers)
    with installed((9, 0)), WithDevice():
        backend = make_backend(ACCELERATOR if accelerator == "cuda" else "cpu", None)
        arenas = HostArenas.allocate(backend, spec, policy, loading=Told())
    taken, pinned = told.values()
    assert list(told) == ["taking memory", "pinning memory"]
    assert taken[0] == sum(taken[1:]) == sum(arena.nbytes for arena in arenas.memory.values())
    if accelerator == "cuda":
        assert (
            pinned[0]
            == sum(pinned[1:])
            == arenas.memory[Purpose.WEIGHTS].nbytes
            + sum(arenas.memory[name].nbytes for name in (*ALWAYS_PINNED, *PINNED_IF_THERE_IS_ROOM))
        )
    assert max(taken[1:] + pinned[1:]) == piece


def test_ctrl_c_is_heard_while_memory_is_taken(monkeypatch):
    """It is taken in another thread, and after a piece Ctrl-C would end the process."""
    monkeypatch.setattr("hrm.profiling.pinned.PIECE_BYTES", PAGE)
    pieces, go_on, main = list[int](), threading.Event(), threading.main_thread().ident
    assert main is not None

    def told(num_bytes: int) -> None:
        pieces.append(num_bytes)
        if len(pieces) == 2:
            signal.pthread_kill(main, signal.SIGINT)
            go_on.wait(30)

    backend = make_backend("cpu", None)
    with backend.telling(told), pytest.raises(KeyboardInterrupt):
        in_thread_of_its_own(lambda: backend.allocate(Device.CPU, 5_000_000))
    assert len(pieces) == 2
    go_on.set()


def test_what_does_not_fit_the_card_is_refused_before_the_host_s_memory_is_touched(folder, monkeypatch):
    profile = machine(gpu_bytes=TOTAL_BYTES)
    profile = replace(profile, accelerator="cuda")
    solved = policy_file(architecture(folder).spec, profile=profile)
    free = replace(solved, memory_budget_bytes={"gpu": 10**6, "cpu": 10**8})
    with installed((9, 0)):
        prepared = prepare(AcceleratorOptions(name=ACCELERATOR), free, free.policy)
        needed = prepared.planned.memory.gpu.planned_bytes
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (needed - 1, TOTAL_BYTES))
        with pytest.raises(RunError, match=r"asked for>: only .* are left"):
            prepare(AcceleratorOptions(name=ACCELERATOR), free, free.policy)


def test_what_a_run_before_gave_back_can_be_had_by_the_next():
    """torch's allocator keeps it, and to the driver it is not free."""
    with installed((9, 0)):
        for _ in range(3):
            backend = make_backend(ACCELERATOR, None)
            arenas = [backend.allocate(Device.GPU, TOTAL_BYTES // 100 * 30) for _ in range(3)]
            backend.check_room(TOTAL_BYTES // 100 * 10)
            with pytest.raises(RunError, match="left"):
                backend.check_room(TOTAL_BYTES // 100 * 11)
            del arenas
            gc.collect()


def test_attention_is_not_that_which_plans_anew_for_every_length(monkeypatch):
    monkeypatch.delenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", raising=False)
    with installed((9, 0)):
        make_backend(ACCELERATOR, None)
    assert os.environ["TORCH_CUDNN_SDPA_DEPRIORITIZED"] == "1"


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


@pytest.mark.parametrize("devices", ["0,1", "9" * 5000], ids=["several", "thousands of digits"])
def test_what_is_no_number_of_a_device_is_refused(devices):
    with pytest.raises(RunError, match="must name one device"):
        make_backend(f"cuda:{devices}", None)
