"""Host memory that CUDA devices can read and write by themselves, in runs and in what is measured.

Memory mapped in large pages is touched and registered with the driver in pieces: so it can be told how far that is,
Ctrl-C need not wait for all of it, and no registration is of 512 GiB, which some drivers refuse. A transfer across two
registrations fails, so `split` parts it where one ends. (torch's own pinned memory is rounded up to a power of two.)
It is given back when the last tensor on it is gone.
"""

import mmap
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final, Protocol, final
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from hrm.units import GIB

PORTABLE: Final = 1  # cudaHostRegisterPortable: pinned for every context of the process
# That is touched or registered at once, in about a second; a multiple of every page's size. All threads touch 2 GiB.
PIECE_BYTES: Final = 2 * GIB

Told = Callable[[int], object]  # is called with the bytes of every piece that is done


def nobody(_: int) -> None:
    """Told of it."""


class Registrar(Protocol):
    """The part of CUDA's runtime that pins; the results are its error codes."""

    def cudaHostRegister(self, address: int, size: int, flags: int) -> Any:  # noqa: N802
        """Pin."""
        ...

    def cudaHostUnregister(self, address: int) -> Any:  # noqa: N802
        """Undo."""
        ...


@final
class CudaRegistrar:
    """CUDA's runtime, called for one device: else it makes a context on the first one, too."""

    def __init__(self, device: str | torch.device) -> None:
        self._device = torch.device(device)

    def cudaHostRegister(self, address: int, size: int, flags: int) -> Any:  # noqa: N802
        """Pin."""
        with torch.cuda.device(self._device):
            return _runtime().cudaHostRegister(address, size, flags)

    def cudaHostUnregister(self, address: int) -> Any:  # noqa: N802
        """Undo."""
        with torch.cuda.device(self._device):
            return _runtime().cudaHostUnregister(address)


def _runtime() -> Any:
    cuda: Any = torch.cuda
    return cuda.cudart()


@final
class _Mapping(mmap.mmap):
    """Unmapped only after it is no longer registered."""

    registrar: Registrar
    registered: tuple[int, ...] = ()  # the addresses of its pieces

    def register(self, registrar: Registrar, address: int, piece_bytes: int, told: Told) -> bool:
        """Register all of its pieces, or none."""
        self.registrar, size = registrar, len(self)
        for start in range(0, size, piece_bytes):
            num_bytes = min(piece_bytes, size - start)
            if int(registrar.cudaHostRegister(address + start, num_bytes, PORTABLE)):
                self.unregister()
                return False
            self.registered += (address + start,)
            told(num_bytes)
        return True

    def unregister(self) -> None:
        addresses, self.registered = self.registered, ()
        for address in addresses:
            self.registrar.cudaHostUnregister(address)

    def __del__(self) -> None:
        with suppress(Exception):  # the device may have failed, or Python may be ending
            self.unregister()


@final
class PinnableMemory:
    """Allocates the host's memory so that it can be pinned."""

    def __init__(self, registrar: Registrar, piece_bytes: int = PIECE_BYTES) -> None:
        self._registrar, self._piece_bytes = registrar, piece_bytes
        self._mappings: WeakValueDictionary[int, _Mapping] = WeakValueDictionary()

    def allocate(self, num_bytes: int, told: Told = nobody) -> Tensor:
        """A flat uint8 tensor of zeros, all pages of which are there: the driver would touch them one by one."""
        if not num_bytes:
            return torch.zeros(0, dtype=torch.uint8)
        memory = _Mapping(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError, AttributeError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        tensor = touched(torch.frombuffer(memory, dtype=torch.uint8), told)
        self._mappings[tensor.data_ptr()] = memory
        return tensor

    def pin(self, memory: Tensor, told: Told = nobody) -> bool:
        """Pin what was allocated here, all of it, until it is gone.

        Returns whether the system does; if not, none of it is pinned.
        """
        if not len(memory):
            return True
        address = memory.data_ptr()
        return self._mappings[address].register(self._registrar, address, self._piece_bytes, told)

    def unpin(self, memory: Tensor) -> None:
        """Undo `pin`; nothing may be using the memory."""
        if len(memory):
            self._mappings[memory.data_ptr()].unregister()

    def split(self, copies: Sequence[tuple[Tensor, Tensor]]) -> Sequence[tuple[Tensor, Tensor]]:
        """The same copies between contiguous tensors, none of which goes on from one registration into another."""
        cuts = sorted(cut for mapping in self._mappings.values() for cut in mapping.registered[1:])
        return [part for copy in copies for part in _parts(*copy, cuts)] if cuts else copies


def _parts(target: Tensor, source: Tensor, cuts: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """A copy, target first, in parts that end at these addresses of the host's memory."""
    on_host = target if target.is_cpu else source
    start = on_host.data_ptr()
    within = cuts[bisect_right(cuts, start) : bisect_left(cuts, start + on_host.nbytes)]
    ends = [(cut - start) // on_host.itemsize for cut in within]
    if not ends:
        return [(target, source)]
    spans = list(zip([0, *ends], [*ends, on_host.numel()], strict=True))
    return [(target.view(-1)[first:end], source.view(-1)[first:end]) for first, end in spans]


def touched(zeros: Tensor, told: Told = nobody) -> Tensor:
    """The same memory, every page of which the system has now handed out, by all threads.

    It does so when a page is first written to, and slowly: no task of a run is to wait for that.
    """
    for start in range(0, len(zeros), PIECE_BYTES):
        piece = zeros[start : start + PIECE_BYTES]
        piece[:: mmap.PAGESIZE].zero_()
        piece[-1:].zero_()
        told(piece.nbytes)
    return zeros
