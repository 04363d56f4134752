import itertools
from time import perf_counter

import pytest
import torch

from executor.backends import EmulatedMachine, make_backend
from executor.backends.cpu import EmulatedBackend
from executor.errors import RunError
from hrm.tasks import Device, Lane
from tests.contracts.backend import BackendContract
from tests.executor.runtime.device_tensor import WithDevice
from tests.executor.runtime.fake_cuda import ACCELERATOR, installed
from tests.executor.runtime.fake_device import FakeDevice
from tests.executor.runtime.queued_backend import LateBackend, kernels_named
from tests.executor.runtime.support import link

GPU_BYTES = 100_000


def machine(bandwidth: float) -> EmulatedMachine:
    return EmulatedMachine(
        gpu_memory_bytes=GPU_BYTES, h2d=link("cpu", "gpu", bandwidth), d2h=link("gpu", "cpu", bandwidth)
    )


def emulated(bandwidth: float = 1e9):
    return make_backend("emulated", machine(bandwidth))


class TestCpuBackend(BackendContract):
    @pytest.fixture
    def backend(self):
        return make_backend("cpu", None)


class TestNullBackend(BackendContract):
    moves_data = False

    @pytest.fixture
    def backend(self):
        return make_backend("null", None)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestCudaBackend(BackendContract):
    @pytest.fixture
    def backend(self):
        return make_backend("cuda:0", None)

    def test_allocates_where_it_should(self, backend):
        assert backend.allocate(Device.GPU, 10).is_cuda
        assert backend.allocate(Device.CPU, 10).is_cpu

    def test_is_held_to_its_cap(self):
        backend = make_backend("cuda:0", None, gpu_memory_bytes=GPU_BYTES)
        backend.allocate(Device.GPU, GPU_BYTES)
        with pytest.raises(RunError, match="left"):
            backend.allocate(Device.GPU, 1)
        with pytest.raises(RunError, match="--gpu-memory"):
            make_backend("cuda:0", None, gpu_memory_bytes=10**15)

    def test_workspace_is_not_counted_before_it_is_used(self, backend):
        before = backend.peak_gpu_bytes()
        (workspace,) = backend.workspace(10_000_000)
        backend.ready()
        assert backend.peak_gpu_bytes() == before
        backend.streams[Lane.GPU].enter()
        held = workspace.take((1_000_000,), torch.float32)
        assert backend.peak_gpu_bytes() - before == held.nbytes

    def test_a_stream_waits_for_another(self, backend):
        """Without the wait the small copy would win."""
        large = backend.allocate(Device.CPU, 400_000_000).fill_(7)
        target = backend.allocate(Device.GPU, len(large))
        out = backend.allocate(Device.CPU, 1)
        h2d, d2h = backend.streams[Lane.H2D], backend.streams[Lane.D2H]
        h2d.enter()
        backend.transfer(Lane.H2D, [(target, large)])
        copied = h2d.mark()
        d2h.enter()
        d2h.wait(copied)
        backend.transfer(Lane.D2H, [(out, target[-1:])])
        backend.synchronise()
        assert out.item() == 7


class TestLateBackend(BackendContract):
    """The tests' own device, which other tests rely on."""

    @pytest.fixture
    def backend(self):
        device = FakeDevice()
        with WithDevice():
            yield LateBackend(device, kernels_named("plain"))
        device.close()

    def test_large_memory_is_zero_and_can_be_written(self, backend):
        """It is not zero: no one may rely on that."""

    def test_transfer_converts_no_shape_and_counts_bytes_of_strided_pieces(self, backend):
        """It refuses them: on a link they are slow."""


class TestCudaBackendWithoutACard(BackendContract):
    """Its own code, on the tests' torch.cuda."""

    @pytest.fixture
    def backend(self):
        with installed((9, 0)), WithDevice():
            yield make_backend(ACCELERATOR, None)

    def test_never_takes_more_than_it_may(self, backend):
        capped = make_backend(ACCELERATOR, None, gpu_memory_bytes=1000)
        capped.allocate(Device.GPU, 600)
        capped.workspace(300, 400)
        with pytest.raises(RunError, match="only 0 B are left"):
            capped.allocate(Device.GPU, 1)
        with pytest.raises(RunError, match="--gpu-memory"):
            make_backend(ACCELERATOR, None, gpu_memory_bytes=10**15)


class TestEmulatedBackend(BackendContract):
    @pytest.fixture
    def backend(self):
        return emulated()

    def test_says_that_it_is_emulated(self, backend):
        assert "emulated" in backend.description

    def test_never_gives_more_gpu_memory_than_there_is(self, backend):
        backend.allocate(Device.GPU, GPU_BYTES - 10)
        backend.allocate(Device.CPU, 10 * GPU_BYTES)
        with pytest.raises(RunError, match="emulated GPU memory"):
            backend.allocate(Device.GPU, 11)
        backend.allocate(Device.GPU, 10)

    @pytest.mark.parametrize("lane", [Lane.H2D, Lane.D2H])
    @pytest.mark.parametrize("num_bytes", [20_000, 1_000_000])
    def test_many_transfers_hold_the_stated_bandwidth_within_2_percent(self, lane, num_bytes):
        clock = SloppyClock()
        backend = EmulatedBackend(machine(100e6), clock=clock, sleep=clock.sleep)
        source, target = (torch.zeros(num_bytes, dtype=torch.uint8) for _ in range(2))
        expected_s = 10e-6 + num_bytes / 100e6
        count = round(0.5 / expected_s)
        for _ in range(count):
            backend.transfer(lane, [(target, source)])
        assert clock.now_s == pytest.approx(count * expected_s, rel=0.02)

    def test_transfer_takes_at_least_as_long_as_the_link_would(self):
        backend = emulated(100e6)
        source, target = (torch.zeros(1_000_000, dtype=torch.uint8) for _ in range(2))
        start_s = perf_counter()
        for _ in range(10):
            backend.transfer(Lane.H2D, [(target, source)])
        assert perf_counter() - start_s >= 10 * 10e-3


class SloppyClock:
    """Time that passes only when it is read or slept through; sleeps last up to 0.1 ms longer."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._late = itertools.cycle((60e-6, 100e-6, 20e-6))

    def __call__(self) -> float:
        self.now_s += 0.2e-6
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds + (next(self._late) if seconds else 1e-6)


def test_auto_emulates_where_there_is_a_machine_to_emulate():
    assert make_backend("auto", machine(1e9)).name == "emulated"
    assert make_backend("auto", None).name == "cpu"


@pytest.mark.parametrize(("accelerator", "word"), [("tpu", "one of"), ("cuda:0", "CUDA"), ("emulated", "--gpu-memory")])
def test_what_cannot_be_had_is_refused_with_a_remedy(accelerator, word):
    with pytest.raises(RunError, match=word):
        make_backend(accelerator, None)
