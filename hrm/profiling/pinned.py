"""Host memory that CUDA devices can read and write by themselves, in runs and in what is measured.

Memory mapped in large pages is touched and registered with the driver in pieces: so it can be told how far that is,
Ctrl-C need not wait for all of it, and no registration is of 512 GiB, which some drivers refuse. A transfer across two
registrations fails, so `split` parts it where one ends. (torch's own pinned memory is rounded up to a power of two.)
It is given back when the last tensor on it is gone, unless it is kept for who comes next (`keeping`).
"""

import mmap
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate, chain
from typing import Any, Final, Protocol, final
from weakref import ReferenceType, WeakValueDictionary, ref

import torch
from torch import Tensor

from hrm.profiling import environment
from hrm.units import GIB, MIB

PORTABLE: Final = 1  # cudaHostRegisterPortable: pinned for every context of the process
# That is touched or registered at once, in about a second; a multiple of every page's size. All threads touch 2 GiB.
PIECE_BYTES: Final = 2 * GIB
PAGE_BYTES: Final = 2 * MIB  # the largest page's: what lies apart is registered apart
_NO_RESERVE: Final = 0x4000  # Linux's MAP_NORESERVE: addresses cost nothing until memory is behind them

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
    """Unmapped only after it is no longer registered.

    `registered` are the bytes of its registrations by address, `cuts` where one ends and another may begin, and so many
    bytes from its start on are `there`. `lease` is what tensors on it hold, where it may be kept.
    """

    registrar: Registrar
    address = there = 0
    lease: ReferenceType[memoryview] | None = None
    registered: dict[int, int]
    cuts: Sequence[int] = ()

    @property
    def is_free(self) -> bool:
        """Whether no tensor is on it any more."""
        return self.lease is None or self.lease() is None

    def register(self, registrar: Registrar, start: int, end: int, piece_bytes: int, told: Told) -> bool:
        """Register what is not, between these addresses, in pieces; of it all or none."""
        self.registrar = registrar
        made: list[int] = []
        for first, last in list(self._gaps(start, end)):
            for piece in range(first, last, piece_bytes):
                num_bytes = min(piece_bytes, last - piece)
                if int(registrar.cudaHostRegister(piece, num_bytes, PORTABLE)):
                    self.unregister(made)
                    return False
                self.registered[piece] = num_bytes
                made.append(piece)
                told(num_bytes)
        self._cut()
        return True

    def _gaps(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """The parts between these addresses that no registration has."""
        for address in sorted(self.within(start, end)):
            if start < address:
                yield start, address
            start = address + self.registered[address]
        if start < end:
            yield start, end

    def within(self, start: int, end: int) -> list[int]:
        """The addresses of registrations that have any of what is between these."""
        return [at for at, size in self.registered.items() if at < end and start < at + size]

    def unregister(self, addresses: Sequence[int]) -> None:
        """Undo these registrations."""
        for address in addresses:
            del self.registered[address]
            self.registrar.cudaHostUnregister(address)
        self._cut()

    def _cut(self) -> None:
        ends = {end for at, size in self.registered.items() for end in (at, at + size)}
        self.cuts = sorted(ends - {self.address, self.address + len(self)})

    def __del__(self) -> None:
        with suppress(Exception):  # the device may have failed, or Python may be ending
            self.unregister(list(self.registered))


def _mapping(num_bytes: int, more_flags: int = 0) -> _Mapping:
    memory = _Mapping(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | more_flags)
    with suppress(OSError, AttributeError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    memory.registered = {}
    return memory


class _Keeper:
    """The process's memory between one run and the next, of which there is one at most."""

    depth = 0
    mapping: _Mapping | None = None


@contextmanager
def keeping() -> Generator[None]:
    """Within it, memory that is taken together stays, touched and pinned, for who takes some next.

    For runs one after the other in a process: fresh memory is touched and pinned at about one GB a second.
    """
    _Keeper.depth += 1
    try:
        yield
    finally:
        _Keeper.depth -= 1
        if not _Keeper.depth:
            _Keeper.mapping = None


def kept_bytes() -> int:
    """How much of the host's memory is kept, and could be had again."""
    kept = _Keeper.mapping
    return kept.there if kept is not None and kept.is_free else 0


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
        memory = _mapping(num_bytes)
        tensor = touched(torch.frombuffer(memory, dtype=torch.uint8), told)
        memory.address, memory.there = tensor.data_ptr(), num_bytes
        self._mappings[memory.address] = memory
        return tensor

    def allocate_together(self, sizes: Sequence[int], told: Told = nobody) -> list[Tensor]:
        """One tensor for each size; within `keeping` of memory that is kept, whatever was in it."""
        if not _Keeper.depth or not sum(sizes):
            return [self.allocate(size, told) for size in sizes]
        starts = list(accumulate(map(_apart, sizes), initial=0))
        memory = _kept(starts[-1])
        lease = memoryview(memory)[: starts[-1]]
        memory.lease = ref(lease)
        whole = torch.frombuffer(lease, dtype=torch.uint8)
        memory.address = whole.data_ptr()
        told(min(memory.there, sum(sizes)))
        touched(whole[memory.there :], told)
        memory.there = max(memory.there, len(whole))
        self._mappings[memory.address] = memory
        return [whole[start : start + size] for start, size in zip(starts, sizes, strict=False)]

    def pin(self, memory: Tensor, told: Told = nobody) -> bool:
        """Pin what was allocated here, all of it, until it is gone.

        Returns whether the system does; if not, none of it is pinned that was not before.
        """
        if not len(memory):
            return True
        start, num_bytes = memory.data_ptr(), memory.nbytes
        mapping = self._mapping_at(start)
        if mapping.lease is not None:  # up to where what lies behind it begins: no page is registered twice
            num_bytes = _apart(num_bytes)
        return mapping.register(self._registrar, start, start + num_bytes, self._piece_bytes, told)

    def unpin(self, memory: Tensor) -> None:
        """Undo `pin`; nothing may be using the memory."""
        if len(memory):
            start = memory.data_ptr()
            mapping = self._mapping_at(start)
            mapping.unregister(mapping.within(start, start + memory.nbytes))

    def split(self, copies: Sequence[tuple[Tensor, Tensor]]) -> Sequence[tuple[Tensor, Tensor]]:
        """The same copies between contiguous tensors, none of which goes on from one registration into another."""
        cuts = sorted(chain.from_iterable(mapping.cuts for mapping in self._mappings.values()))
        return [part for copy in copies for part in _parts(*copy, cuts)] if cuts else copies

    def _mapping_at(self, address: int) -> _Mapping:
        found = max(start for start in self._mappings if start <= address)
        return self._mappings[found]


def _apart(num_bytes: int) -> int:
    """So many bytes in whole pages, of whatever size."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def _kept(num_bytes: int) -> _Mapping:
    """Memory of so many bytes at least that is kept, or will be; not all of it need be there."""
    kept = _Keeper.mapping
    if kept is not None and not kept.is_free:
        return _mapping(num_bytes)  # beside another's, and not kept
    if kept is not None and len(kept) >= num_bytes:
        return kept
    _Keeper.mapping = kept = None  # before there is more
    with suppress(OSError):  # a system that promises no more than it has
        _Keeper.mapping = _mapping(max(num_bytes, environment.host_facts().ram_bytes), _NO_RESERVE)
        return _Keeper.mapping
    _Keeper.mapping = _mapping(num_bytes)
    return _Keeper.mapping


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
