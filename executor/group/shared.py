"""What ranks of one machine tell one another through memory that they all have: no copy goes through the system.

Tensors between processors are small and many, a few for each micro-batch in each layer, and most of what gloo takes
for one is waking the other process.
"""

import ctypes
import mmap
import os
import select
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from executor.group.store import wait_until_told
from executor.native import paths
from executor.native.compiled import DTYPES, module
from hrm.units import MIB

PIECE_BYTES: Final = 4 * MIB  # that a rank tells at once; all have two such pieces, in turn
_CALLED: Final = "ranks"
_MADE: Final = "memory"  # in the store, once rank 0 has made it
_LINE: Final = 64  # bytes of each rank's count, as `ranks.cpp` has them
_MOST_VIEWS: Final = 1024  # kept of pieces as tensors


@final
class SharedMemory:
    """Sums and exchanges of tensors in memory that ranks share, by the names that torch's groups have for them.

    Of every rank there is a descriptor of its process. In every turn each rank writes a piece, and counts; when all
    have counted, all are read. `ranks.cpp` does that, without the interpreter's lock.
    """

    def __init__(
        self, rank: int, memory: mmap.mmap, processes: Sequence[int], timeout_s: float, check: Callable[[], object]
    ) -> None:
        self._rank, self._size, self._timeout_s, self._check = rank, len(processes), timeout_s, check
        self._memory = memory
        place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._ranks: Any = module().Ranks(memory=place, piece_bytes=PIECE_BYTES, rank=rank, size=self._size)
        self._path = paths()[0]
        pieces = torch.frombuffer(memory, dtype=torch.uint8, offset=_LINE * self._size)
        self._pieces = pieces.view(2, self._size, PIECE_BYTES)
        self._processes: Sequence[int] = processes
        self._known: dict[tuple[int, torch.dtype, torch.Size], list[Tensor]] = {}
        self._ended = [select.poll() for _ in processes]
        for ended, process in zip(self._ended, processes, strict=True):
            ended.register(process, select.POLLIN)

    @staticmethod
    def of(
        store: Store,
        rank: int,
        size: int,
        timeout_s: float,
        check: Callable[[], object],
        look: Callable[[], object] = lambda: None,
    ) -> "SharedMemory | None":
        """One that all ranks have; None if any of them cannot have it. Nothing of it outlives them.

        Until all have told whether they have it this calls `look`, which may raise.
        """
        memory, processes, handle = None, list[int](), -1
        pids, have = ([f"{what} of rank {other}" for other in range(size)] for what in ("process", "memory"))
        store.set(pids[rank], str(os.getpid()))
        wait_until_told(store, [*pids, _MADE] if rank else pids, look)
        with suppress(OSError, ValueError):
            handle = _handle(store, rank, _LINE * size + 2 * size * PIECE_BYTES)
            memory = mmap.mmap(handle, 0)
            for process in pids:
                processes.append(os.pidfd_open(int(store.get(process))))
        store.set(have[rank], "shared" if len(processes) == size else "none")
        wait_until_told(store, have, look)
        all_have = all(store.get(of_rank) == b"shared" for of_rank in have)
        if handle >= 0:
            os.close(handle)  # nobody opens rank 0's any more
        if memory is not None and all_have:
            return SharedMemory(rank, memory, processes, timeout_s, check)
        for process in processes:
            os.close(process)
        return None

    def close(self) -> None:
        """Let go of the other processes; nothing is summed up any more."""
        for process in self._processes:
            os.close(process)
        self._processes = ()

    def allreduce(self, tensors: Sequence[Tensor]) -> "SharedMemory":
        """Add up in place, in the order of ranks."""
        for tensor in tensors:
            if tensor.nbytes <= PIECE_BYTES:  # most are of few numbers: views of them take longer than they do
                self._sum(tensor)
                continue
            for part in tensor.view(-1).split(PIECE_BYTES // tensor.itemsize):
                self._sum(part)
        return self

    def _sum(self, part: Tensor) -> None:
        assert part.is_contiguous()
        dtype = DTYPES.get(part.dtype)
        if dtype is None:  # whole numbers
            torch.sum(torch.stack(self._all(part)), 0, out=part)
            return
        threads = torch.get_num_threads()
        self._ranks.sum(self._path, dtype, part.data_ptr(), part.numel(), part.nbytes, threads, self._look)

    def alltoall_base(
        self, received: Tensor, rows: Tensor, received_counts: Sequence[int], counts: Sequence[int]
    ) -> "SharedMemory":
        """Of rows that are shared out by `counts`, those of this rank as each rank has them, one after the other."""
        row_bytes = rows[0].nbytes
        assert row_bytes <= PIECE_BYTES, rows.shape
        ours = received.split(list(received_counts))
        start, end = sum(counts[: self._rank]), sum(counts[: self._rank + 1])
        at_once = max(PIECE_BYTES // row_bytes, 1)
        for first in range(0, len(rows), at_once):
            part = rows[first : first + at_once]
            low, high = max(start, first), min(end, first + len(part))
            for of_rank, there in zip(ours, self._all(part), strict=True):
                if low < high:
                    of_rank[low - start : high - start].copy_(there[low - first : high - first])
        return self

    def _allgather_base(self, found: Tensor, own: Tensor) -> "SharedMemory":
        """Every rank's numbers, one rank after the other."""
        for of_rank, there in zip(found.view(self._size, -1), self._all(own.view(-1)), strict=True):
            of_rank.copy_(there)
        return self

    def broadcast(self, tensors: Sequence[Tensor], options: Any) -> "SharedMemory":
        """What one rank has."""
        for tensor in tensors:
            tensor.view(-1).copy_(self._all(tensor.view(-1))[options.rootRank])
        return self

    def wait(self) -> None:
        """Nothing: all is done when a function returns."""

    def _all(self, own: Tensor) -> list[Tensor]:
        """What every rank tells in this turn, until the turn after the next."""
        assert own.nbytes <= PIECE_BYTES, own.shape
        assert own.is_contiguous()
        self._ranks.tell(own.data_ptr(), own.nbytes, self._look)
        return self._views(self._ranks.turn % 2, own.dtype, own.shape)

    def _views(self, turn: int, dtype: torch.dtype, shape: torch.Size) -> list[Tensor]:
        """Every rank's piece as tensors like these: making them takes longer than a sum of few numbers."""
        known = self._known.get((turn, dtype, shape))
        if known is None:
            num_bytes = shape.numel() * dtype.itemsize
            known = [piece[:num_bytes].view(dtype).view(shape) for piece in self._pieces[turn]]
            if len(self._known) < _MOST_VIEWS:
                self._known[turn, dtype, shape] = known
        return known

    def _look(self, other: int, waited_s: float) -> None:
        """Raise if the other, which has not come for so long, is gone or too late."""
        self._check()
        if self._ended[other].poll(0):
            raise RuntimeError(f"the process of rank {other} has ended")
        if waited_s > self._timeout_s:
            raise RuntimeError(f"timed out waiting for rank {other}")


def _handle(store: Store, rank: int, num_bytes: int) -> int:
    """Of memory that rank 0 makes, zeros at first, which has no name; OSError where it cannot be had."""
    able = module() is not None and hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")
    handle = -1
    if rank == 0:
        try:
            if able:
                handle = os.memfd_create(_CALLED, os.MFD_CLOEXEC)
                os.ftruncate(handle, num_bytes)
        finally:
            store.set(_MADE, f"{os.getpid()} {handle}")
    else:
        process, number = map(int, store.get(_MADE).split())
        path = Path(f"/proc/{process}/fd/{number}")
        if able and str(path.readlink()).startswith(f"/memfd:{_CALLED}"):
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    if handle < 0:
        raise OSError("no memory to share")
    return handle
