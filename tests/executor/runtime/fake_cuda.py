"""torch.cuda for the CUDA backend where there is no card: late copies between strict tensors.

It stands in for the parts of torch.cuda that the backend calls. What a lane computes is computed
at once; what it copies without waiting is copied late, by its stream. Memory that was given back
stays with the allocator until its cache is emptied.
"""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Final
from weakref import finalize

import pytest
import torch
from torch import Tensor

from executor.model import GpuKernels
from tests.executor.runtime.device_tensor import DEVICE, DeviceTensor, WithDevice, on_device
from tests.executor.runtime.fake_device import FakeDevice
from tests.executor.runtime.queued_backend import flash, grouped

ACCELERATOR: Final = str(DEVICE)
TOTAL_BYTES: Final = 10**8
ALREADY_REGISTERED: Final = 712
NOT_REGISTERED: Final = 713


class Registrations:
    """The part of the driver that pins: no page twice, and nothing is undone that was not done."""

    def __init__(self) -> None:
        self.pinned = dict[int, int]()

    def register(self, address: int, size: int) -> int:
        """CUDA's error code."""
        pages = range(address // mmap.PAGESIZE, -(-(address + size) // mmap.PAGESIZE))
        for at, other in self.pinned.items():
            if at // mmap.PAGESIZE < pages.stop and pages.start < -(-(at + other) // mmap.PAGESIZE):
                return ALREADY_REGISTERED
        self.pinned[address] = size
        return 0

    def unregister(self, address: int) -> int:
        """CUDA's error code."""
        return 0 if self.pinned.pop(address, None) else NOT_REGISTERED

    def check(self, host: Tensor) -> None:
        """A copy that leaves a registration fails, wherever it goes on."""
        start, end = host.data_ptr(), host.data_ptr() + host.nbytes
        met = [(at, at + size) for at, size in self.pinned.items() if at < end and start < at + size]
        if met and not (met[0][0] <= start and end <= met[0][1]):
            raise RuntimeError("CUDA error: invalid argument")


class LateCopies(WithDevice):
    """The mode of a thread whose current stream is a fake one."""

    def __init__(self, device: FakeDevice, registrations: Registrations) -> None:
        super().__init__()
        self._device, self._registrations = device, registrations

    def __torch_function__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ == "_foreach_copy_" and (kwargs or {}).get("non_blocking"):
            for host in (x for side in args[:2] for x in side if x.is_cpu and x.nbytes):
                self._registrations.check(host)
            self._device.queue(lambda: func(*args, **kwargs))
            return args[0]
        return super().__torch_function__(func, types, args, kwargs)


class FakeMemory:
    """The card's memory under torch's allocator, which keeps what it once had."""

    def __init__(self) -> None:
        self.used_bytes = self.held_bytes = 0

    def take(self, num_bytes: int) -> Tensor:
        """A flat tensor of the card's, of no numbers; its bytes are used until the last view of it is gone."""
        owner = memoryview(bytearray(b"\xff") * num_bytes)
        self.used_bytes += num_bytes
        self.held_bytes = max(self.held_bytes, self.used_bytes)
        if self.held_bytes > TOTAL_BYTES:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finalize(owner, self._give_back, num_bytes)
        return DeviceTensor(torch.frombuffer(owner, dtype=torch.uint8))

    def _give_back(self, num_bytes: int) -> None:
        self.used_bytes -= num_bytes

    def empty_cache(self) -> None:
        """Give what is not used to the driver."""
        self.held_bytes = self.used_bytes


class FakeCuda:
    """What replaces the functions and classes of torch.cuda that have these names."""

    def __init__(self, fake: FakeDevice, memory: FakeMemory, capability: tuple[int, int]) -> None:
        major, minor = capability
        properties = SimpleNamespace(
            name="none", major=major, minor=minor, total_memory=TOTAL_BYTES, uuid="GPU-none", is_integrated=0
        )
        default = SimpleNamespace(queue=fake.stream(), device=DEVICE)
        registrations = Registrations()

        self_of_card = self

        def on_this_card() -> None:
            assert getattr(fake.current, "card", None) == DEVICE, "a context would be made on another card"

        @contextmanager
        def on(card: str | torch.device) -> Iterator[None]:
            before, fake.current.card = getattr(fake.current, "card", None), torch.device(card)
            yield
            fake.current.card = before

        class Event:
            def __init__(self, *, enable_timing: bool = False, blocking: bool = False) -> None:
                self.tells_time, self.sleeps = enable_timing, blocking

            def record(self, stream: Any = None) -> None:
                self.mark = (stream or self_of_card.current_stream(DEVICE)).queue.mark()

            def synchronize(self) -> None:
                on_this_card()
                self.mark.synchronise()

            def elapsed_time(self, end_event: Any) -> float:
                assert self.tells_time
                assert end_event.tells_time
                return end_event.mark.seconds_since(self.mark) * 1e3

        class Stream:
            def __init__(self, device: str | torch.device) -> None:
                assert torch.device(device) == DEVICE
                self.queue, self.device = fake.stream(), DEVICE

            def wait_event(self, event: Event) -> None:
                event.mark.synchronise()  # what a lane computes next is computed at once

            def synchronize(self) -> None:
                self.queue.mark().synchronise()

        def set_stream(stream: Any) -> None:
            fake.current.of_torch = stream
            stream.queue.enter()
            LateCopies(fake, registrations).__enter__()  # until the lane's thread ends

        @contextmanager
        def within(stream: Any) -> Iterator[None]:
            with WithDevice():
                yield

        self.Event, self.Stream, self.set_stream, self.stream = Event, Stream, set_stream, within
        self.current_stream = lambda _: getattr(fake.current, "of_torch", default)
        self.is_available, self.device_count = lambda: True, lambda: DEVICE.index + 1
        self.get_device_properties = lambda _: properties
        self.mem_get_info = lambda _: (TOTAL_BYTES - memory.held_bytes, TOTAL_BYTES)
        self.memory_stats = lambda _: {}
        self.set_device = lambda card: setattr(fake.current, "card", torch.device(card))
        self.synchronize = lambda _: [stream.mark().synchronise() for stream in fake.streams]
        self.get_device_capability = lambda _: capability
        self.reset_peak_memory_stats = lambda _: None
        self.device = on

        def empty_cache() -> None:
            on_this_card()
            memory.empty_cache()

        self.empty_cache = empty_cache

        def register(address: int, size: int, _: int) -> int:
            on_this_card()
            return registrations.register(address, size)

        def unregister(address: int) -> int:
            on_this_card()
            return registrations.unregister(address)

        registrar = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
        self.cudart = lambda: registrar


@contextmanager
def installed(capability: tuple[int, int]) -> Iterator[FakeDevice]:
    """Within it torch has a card of that compute capability, with kernels that are none."""
    device, memory, make, zeros = FakeDevice(late_s=3e-4), FakeMemory(), torch.empty, torch.zeros

    def empty(*args: Any, **named: Any) -> Tensor:
        if args[0] and isinstance(args[0], int) and torch.device(named.get("device") or "cpu") == DEVICE:
            return memory.take(args[0])  # an arena
        with WithDevice():  # arenas are made in threads that enter no stream
            return make(*args, **named)

    def unpinned(*sizes: Any, pin_memory: bool = False, **named: Any) -> Tensor:
        del pin_memory
        return zeros(*sizes, **named)

    def kernels_of(of: tuple[int, int]) -> GpuKernels:
        return GpuKernels(on_device(flash), on_device(grouped)) if of >= (8, 0) else GpuKernels()

    with pytest.MonkeyPatch.context() as patch:
        for name, instead in vars(FakeCuda(device, memory, capability)).items():
            patch.setattr(torch.cuda, name, instead)
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "zeros", unpinned)
        patch.setattr("executor.backends.cuda.kernels_of", kernels_of)
        yield device
    device.close()
