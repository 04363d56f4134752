"""Pinned memory that stays from one run to the next in a process: what is there is used again, and not while in use."""

import gc
from dataclasses import replace

import pytest
import torch

from executor.handlers import HostArenas
from executor.job.machine import AcceleratorOptions, prepare
from hrm.errors import PolicyError
from hrm.profiling import pinned
from hrm.profiling.pinned import PinnableMemory, keeping, kept_bytes
from hrm.units import MIB
from tests.executor.runtime.device_tensor import WithDevice
from tests.executor.runtime.fake_cuda import ACCELERATOR, TOTAL_BYTES, installed
from tests.executor.runtime.support import architecture, machine, policy_file

PAGE = 4096


class Driver:
    """As CUDA's: no page is registered twice, what is undone was registered; at most a budget."""

    def __init__(self, budget_bytes: int = 2**62) -> None:
        self.budget_bytes, self.pinned = budget_bytes, dict[int, int]()
        self.registered_bytes = 0

    def cudaHostRegister(self, address, size, flags):  # noqa: N802
        assert flags == pinned.PORTABLE
        pages = range(address // PAGE, -(-(address + size) // PAGE))
        for at, other in self.pinned.items():
            others = range(at // PAGE, -(-(at + other) // PAGE))
            assert pages.stop <= others.start or others.stop <= pages.start, "registered already"
        if sum(self.pinned.values()) + size > self.budget_bytes:
            return 2
        self.pinned[address] = size
        self.registered_bytes += size
        return 0

    def cudaHostUnregister(self, address):  # noqa: N802
        del self.pinned[address]
        return 0

    def is_pinned(self, memory: torch.Tensor) -> bool:
        left = memory.nbytes
        for at, size in self.pinned.items():
            left -= max(0, min(at + size, memory.data_ptr() + memory.nbytes) - max(at, memory.data_ptr()))
        return left == 0


@pytest.fixture
def driver():
    made = Driver()
    yield made
    gc.collect()
    assert not made.pinned, "nothing is kept for longer"
    assert not kept_bytes()


def taken(driver: Driver, *sizes: int) -> list[torch.Tensor]:
    """Memory of a new backend's, all of it pinned."""
    memory = PinnableMemory(driver, piece_bytes=4 * MIB)
    arenas = memory.allocate_together(sizes)
    assert [len(arena) for arena in arenas] == list(sizes)
    assert all(map(memory.pin, arenas))
    for number, arena in enumerate(arenas):
        arena.fill_(number + 1)
    assert all((arena == number + 1).all() for number, arena in enumerate(arenas)), "none lies in another"
    assert all(map(driver.is_pinned, arenas))
    return arenas


def test_the_next_run_has_the_memory_of_the_one_before_however_it_shares_it_out(driver):
    with keeping():
        taken(driver, 9 * MIB + 5, 0, 3 * MIB)
        first = driver.registered_bytes
        assert first == kept_bytes() == 14 * MIB
        taken(driver, 2 * MIB, 5 * MIB + 1, 3 * MIB)
        assert driver.registered_bytes == first, "as much in other parts"
        taken(driver, MIB, 19 * MIB)
        assert driver.registered_bytes == 22 * MIB, "what there was, and more behind it"


def test_memory_in_use_is_not_had_by_another(driver):
    with keeping():
        mine = taken(driver, 4 * MIB)[0][1000:2000]
        other = taken(driver, 4 * MIB)
        assert mine.eq(1).all()
        assert mine.data_ptr() not in range(other[0].data_ptr(), other[0].data_ptr() + 4 * MIB)
        assert kept_bytes() == 0
        del other
        gc.collect()
        del mine
        assert kept_bytes() == 4 * MIB


def test_nothing_is_kept_unless_that_is_asked_for(driver):
    taken(driver, 4 * MIB)
    gc.collect()
    assert not driver.pinned
    with keeping(), keeping():
        mine = taken(driver, 4 * MIB)
    assert driver.is_pinned(mine[0]), "and not taken away while it is used"


def test_what_was_pinned_for_a_run_may_be_unpinned_by_the_next(driver):
    """Which stages weights, as the system does not pin all that it needs: pieces of both lie across one another."""
    with keeping():
        taken(driver, 6 * MIB, 6 * MIB)
        driver.budget_bytes = 13 * MIB
        memory = PinnableMemory(driver, piece_bytes=4 * MIB)
        weights, caches = memory.allocate_together([9 * MIB, 5 * MIB])
        assert not memory.pin(weights) or not memory.pin(caches)
        for arena in (weights, caches):
            memory.unpin(arena)
        assert not driver.is_pinned(weights)
        assert memory.pin(caches)
        assert driver.is_pinned(caches)
        del weights, caches


@pytest.mark.parametrize("to_device", [True, False])
def test_no_copy_goes_on_from_one_registration_into_another(driver, to_device):
    """Nor out of one into memory that is not registered: pieces are as the runs before left them."""
    with keeping():
        taken(driver, 5 * MIB, 5 * MIB)
        memory = PinnableMemory(driver, piece_bytes=4 * MIB)
        (arena,) = memory.allocate_together([20 * MIB])
        there = torch.empty(20 * MIB, dtype=torch.uint8, device="meta")
        parts = memory.split([(there, arena) if to_device else (arena, there)])
        on_host = [pair[to_device] for pair in parts]
        assert sum(part.nbytes for part in on_host) == arena.nbytes
        for part in on_host:
            first, last = part.data_ptr(), part.data_ptr() + part.nbytes
            met = [(at, at + size) for at, size in driver.pinned.items() if at < last and first < at + size]
            assert not met or (len(met) == 1 and met[0][0] <= first and last <= met[0][1])
        del arena, parts, on_host, part


def test_a_run_s_arenas_are_kept_and_counted_as_memory_that_is_there(folder, monkeypatch):
    spec = architecture(folder).spec
    profile = replace(machine(gpu_bytes=TOTAL_BYTES), accelerator="cuda")
    solved = policy_file(spec, profile=profile)
    solved = replace(solved, memory_budget_bytes={"gpu": 10**6, "cpu": 10**8})
    options = AcceleratorOptions(name=ACCELERATOR)
    with installed((9, 0)), WithDevice(), keeping():
        backend = prepare(options, solved, solved.policy).backend
        arenas = HostArenas.allocate(backend, spec, solved.policy)
        places = {name: arena.data_ptr() for name, arena in arenas.memory.items() if len(arena)}
        del arenas
        monkeypatch.setattr("executor.job.machine.available_ram_bytes", lambda: 0)
        again = prepare(options, solved, solved.policy).backend
        arenas = HostArenas.allocate(again, spec, solved.policy)
        assert {name: arena.data_ptr() for name, arena in arenas.memory.items() if len(arena)} == places
        with pytest.raises(PolicyError, match="must fit the 0 bytes"):
            prepare(options, solved, solved.policy)
        del arenas
    with installed((9, 0)), pytest.raises(PolicyError, match="must fit the 0 bytes"):
        prepare(options, solved, solved.policy)


def test_a_system_that_promises_no_more_than_it_has_keeps_what_it_gave(driver, monkeypatch):
    make = pinned._mapping

    def mapping(num_bytes: int, more_flags: int = 0):
        if more_flags:
            raise OSError(12, "Cannot allocate memory")
        return make(num_bytes)

    monkeypatch.setattr(pinned, "_mapping", mapping)
    with keeping():
        taken(driver, 4 * MIB)
        taken(driver, 3 * MIB)
        assert driver.registered_bytes == 4 * MIB
        taken(driver, 6 * MIB)
        assert driver.registered_bytes == 10 * MIB, "all anew"
