"""Host memory that CUDA devices can read and write by themselves.

Memory mapped in large pages is registered with the driver, in one piece: a transfer across two
registrations fails. (torch's own pinned memory is rounded up to a power of two.) It is given back
when the last tensor on it is gone.
"""

import mmap
from contextlib import suppress
from typing import Any, Final, Protocol, cast, final
from weakref import WeakValueDictionary

import torch

from hrm.units import MIB

PORTABLE: Final = 1  # cudaHostRegisterPortable: pinned for every context of the process
SMALLEST_PROBE_BYTES: Final = 16 * MIB


class Registrar(Protocol):
    """The part of CUDA's runtime that pins; the results are its error codes."""

    def cudaHostRegister(self, address: int, size: int, flags: int) -> Any:  # noqa: N802
        """Pin."""
        ...

    def cudaHostUnregister(self, address: int) -> Any:  # noqa: N802
        """Undo."""
        ...


@final
class _Mapping(mmap.mmap):
    """Unmapped only after it is no longer registered."""

    registrar: Registrar
    address: int | None = None  # where it is registered

    def unregister(self) -> None:
        if self.address is not None:
            self.registrar.cudaHostUnregister(self.address)
            self.address = None

    def __del__(self) -> None:
        with suppress(Exception):  # the device may have failed, or Python may be ending
            self.unregister()


@final
class PinnableMemory:
    """Allocates the host's memory so that it can be pinned, by CUDA's runtime unless given."""

    def __init__(self, registrar: Registrar | None = None) -> None:
        self._registrar = registrar
        self._mappings: WeakValueDictionary[int, _Mapping] = WeakValueDictionary()

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """A flat uint8 tensor of zeros."""
        if not num_bytes:
            return torch.zeros(0, dtype=torch.uint8)
        memory = _Mapping(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError, AttributeError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        tensor = torch.frombuffer(memory, dtype=torch.uint8)
        self._mappings[tensor.data_ptr()] = memory
        return tensor

    def pin(self, memory: torch.Tensor) -> int:
        """Pin what was allocated here, all of it as fresh as it came, until it is gone.

        Returns how many bytes the system pins: all, or about how many it would, and pins none.
        """
        if not len(memory):
            return 0
        registrar = self._registrar or cast("Registrar", torch.cuda.cudart())
        memory.zero_()  # by all threads: the driver would touch page after page by itself
        address = memory.data_ptr()
        if int(registrar.cudaHostRegister(address, len(memory), PORTABLE)):
            return _most(registrar, address, len(memory))
        mapping = self._mappings[address]
        mapping.registrar, mapping.address = registrar, address
        return len(memory)

    def unpin(self, memory: torch.Tensor) -> None:
        """Undo `pin`; nothing may be using the memory."""
        if len(memory):
            self._mappings[memory.data_ptr()].unregister()


def _most(registrar: Registrar, address: int, num_bytes: int) -> int:
    """About how much of the memory could be pinned, within a sixteenth; nothing is afterwards."""
    fits, fails = 0, num_bytes
    while fails - fits > max(num_bytes // 16, SMALLEST_PROBE_BYTES):
        middle = (fits + fails) // 2
        if int(registrar.cudaHostRegister(address, middle, PORTABLE)):
            fails = middle
        else:
            registrar.cudaHostUnregister(address)
            fits = middle
    return fits
