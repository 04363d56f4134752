"""Host memory that CUDA devices read and write by themselves.

Memory mapped in large pages is registered with the driver, in one piece: a transfer across two
registrations fails. (torch's own pinned memory is rounded up to a power of two.) It is given back
when the last tensor on it is gone.
"""

import mmap
from contextlib import suppress
from typing import Any, Final, Protocol, cast, final

import torch

from executor.errors import RunError
from hrm.units import MIB, format_bytes

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
    address: int | None

    def __del__(self) -> None:
        if self.address is not None:
            with suppress(Exception):  # the device may have failed, or Python may be ending
                self.registrar.cudaHostUnregister(self.address)


def pinned_memory(num_bytes: int, registrar: Registrar | None = None) -> torch.Tensor:
    """A flat uint8 tensor of zeros that keeps its memory pinned while it lives.

    Raises RunError naming how much can be pinned if the system does not pin so much.
    """
    if not num_bytes:
        return torch.zeros(0, dtype=torch.uint8)
    registrar = registrar if registrar is not None else cast("Registrar", torch.cuda.cudart())
    memory = _Mapping(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.registrar, memory.address = registrar, None
    with suppress(OSError, AttributeError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    tensor.zero_()  # by all threads: the driver would touch page after page by itself
    address = tensor.data_ptr()
    if int(registrar.cudaHostRegister(address, num_bytes, PORTABLE)):
        found = _most(registrar, address, num_bytes)
        raise RunError(
            "pinned memory", f"<{format_bytes(num_bytes)} asked for>",
            f"the system pins {format_bytes(found)} of it and no more",
            "solve the policy again with hrm search --staging, which pins next to nothing, or with"
            " a lower --cpu-memory",
        )  # fmt: skip
    memory.address = address
    return tensor


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
