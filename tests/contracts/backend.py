"""What every backend keeps to; inherit `BackendContract` and give it a `backend` fixture."""

import ctypes
import mmap
import threading

import pytest
import torch

from executor.backends import AbstractBackend
from hrm.tasks import Device, Lane


def pages_of(memory: torch.Tensor) -> list[bool]:
    """Whether each of the pages of a tensor has memory, as the kernel says."""
    address, size = memory.data_ptr(), mmap.PAGESIZE
    first = address // size * size
    num_bytes = address + memory.nbytes - first
    there = (ctypes.c_ubyte * -(-num_bytes // size))()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(first), ctypes.c_size_t(num_bytes), there) == 0, ctypes.get_errno()
    return [bool(page & 1) for page in there]


class BackendContract:
    """Memory, transfers and lane set-up; `moves_data` is false for a backend without memory."""

    moves_data = True

    @pytest.fixture
    def backend(self) -> AbstractBackend:
        raise NotImplementedError

    def test_has_a_name_and_says_what_it_is(self, backend):
        assert backend.name
        assert backend.description

    @pytest.mark.parametrize("level", Device)
    @pytest.mark.parametrize("num_bytes", [0, 1, 4096])
    def test_allocates_flat_bytes(self, backend, level, num_bytes):
        memory = backend.allocate(level, num_bytes)
        assert memory.shape == (num_bytes,)
        assert memory.dtype is torch.uint8

    def test_large_memory_is_zero_and_can_be_written(self, backend):
        memory = backend.allocate(Device.CPU, 5_000_001)
        assert memory.shape == (5_000_001,)
        if self.moves_data:
            assert not memory.any()
            memory.fill_(7)
            assert memory.sum().item() == 7 * 5_000_001

    @pytest.mark.parametrize("num_bytes", [1, 1_000_001, 9_000_001])
    def test_host_memory_is_there_before_it_is_used(self, backend, num_bytes):
        memory = backend.allocate(Device.CPU, num_bytes)
        if self.moves_data:
            assert all(pages_of(memory))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
    def test_memory_is_aligned_for_every_dtype(self, backend, dtype):
        backend.allocate(Device.GPU, 3)
        assert len(backend.allocate(Device.GPU, 64).view(dtype)) == 64 // dtype.itemsize

    @pytest.mark.parametrize("lane", [Lane.H2D, Lane.D2H, Lane.STAGE])
    def test_page_survives_round_trip(self, backend, lane):
        host, device = backend.allocate(Device.CPU, 1000), backend.allocate(Device.GPU, 1000)
        back = backend.allocate(Device.CPU, 1000)
        if self.moves_data:
            host.copy_(torch.arange(1000) % 251)
        assert backend.transfer(lane, [(device, host)]) == 1000
        assert backend.transfer(Lane.D2H, [(back[:600], device[:600]), (back[600:], device[600:])])
        backend.synchronise()
        if self.moves_data:
            assert torch.equal(back, host)

    def test_transfer_converts_no_shape_and_counts_bytes_of_strided_pieces(self, backend):
        source = backend.allocate(Device.GPU, 96).view(8, 12)[:, 4:]
        target = backend.allocate(Device.CPU, 96).view(8, 12)[:, 4:]
        assert backend.transfer(Lane.D2H, [(target, source)]) == 64

    def test_transfer_of_nothing_moves_nothing(self, backend):
        assert backend.transfer(Lane.H2D, []) == 0

    def test_workspaces_are_as_large_as_asked(self, backend):
        small, large = backend.workspace(1000, 100_000)
        assert small.capacity_bytes in range(900, 1001)
        assert large.capacity_bytes in range(99_900, 100_001)
        assert small.take((20, 10), torch.float32).shape == (20, 10)

    def test_streams_are_of_lanes_that_the_gpu_has(self, backend):
        assert set(backend.streams) <= {Lane.GPU, Lane.H2D, Lane.D2H}
        for stream in backend.streams.values():
            first, second = stream.mark(), stream.mark()
            stream.wait(first)
            second.synchronise()
            assert second.seconds_since(first) >= 0

    @pytest.mark.parametrize("lane", Lane)
    def test_lane_gets_its_threads_and_leaves_others_alone(self, backend, lane):
        before = torch.get_num_threads()
        seen: list[int] = []

        def enter() -> None:
            backend.enter_lane(lane)
            seen.append(torch.get_num_threads())

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        assert seen == [backend.lane_threads(lane)]
        assert torch.get_num_threads() == before
