"""What ranks of one machine tell one another through memory that they all have: no copy goes through the system.

Tensors between processors are small and many, a few for each micro-batch in each layer, and most of what gloo takes
for one is waking the other process.
"""

import ctypes
import mmap
import os
import platform
import select
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from executor.group.store import wait_until_told
from hrm.units import MIB

PIECE_BYTES: Final = 4 * MIB  # that a rank tells at once; all have two such pieces, in turn
_CALLED: Final = "ranks"
_MADE: Final = "memory"  # in the store, once rank 0 has made it
_LINE: Final = 64  # bytes of memory that processors hand over at once: each rank's counter has its own
_AWAKE_S: Final = 30e-6  # that a rank waits before it sleeps, from which a virtual machine's core wakes late
_LOOK_S: Final = 0.02  # after which a waiting rank looks whether the other is still there
# On these nobody sees a counter before what was written before it, and its lower half lies first.
_MACHINES: Final = frozenset({"x86_64", "AMD64"})
_FUTEX, _WAIT, _WAKE, _ALL = 202, 0, 1, 2**31 - 1  # a system call of theirs, on a half of a counter
_HALF: Final = 2**32
_MOST_VIEWS: Final = 1024  # kept of pieces as tensors


class _TimeSpec(ctypes.Structure):
    """A span of time as the system has it."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_let_others_go_first = ctypes.CDLL(None).sched_yield
_futex = ctypes.CDLL(None).syscall
_futex.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_long, ctypes.c_long, ctypes.c_void_p]


@final
class SharedMemory:
    """Sums and exchanges of tensors in memory that ranks share, by the names that torch's groups have for them.

    Of every rank there is a descriptor of its process. In every turn each rank writes a piece, and counts; when all
    have counted, all are read. A rank writes to a place again two turns later, and so after all others have counted
    once more, having read it.
    """

    def __init__(
        self, rank: int, memory: mmap.mmap, processes: Sequence[int], timeout_s: float, check: Callable[[], object]
    ) -> None:
        self._rank, self._size, self._timeout_s, self._check = rank, len(processes), timeout_s, check
        self._memory, self._turn = memory, 0
        self._counts = memoryview(memory).cast("q")
        pieces = torch.frombuffer(memory, dtype=torch.uint8, offset=_LINE * self._size)
        self._pieces = pieces.view(2, self._size, PIECE_BYTES)
        self._processes: Sequence[int] = processes
        self._known: dict[tuple[int, torch.dtype, torch.Size], list[Tensor]] = {}
        self._look = _TimeSpec(0, int(_LOOK_S * 1e9))
        place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._places = [place + _LINE * rank for rank in range(self._size)]
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
            flat = tensor.view(-1)
            for part in flat.split(PIECE_BYTES // flat.itemsize):
                first, second, *others = self._all(part)
                torch.add(first, second, out=part)
                for other in others:
                    part.add_(other)
        return self

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
        self._turn += 1
        pieces = self._views(self._turn % 2, own.dtype, own.shape)
        pieces[self._rank].copy_(own)
        self._counts[self._rank * _LINE // 8] = self._turn
        _futex(_FUTEX, self._places[self._rank], _WAKE, _ALL, None)
        for other in range(self._size):
            self._wait_for(other)
        return pieces

    def _views(self, turn: int, dtype: torch.dtype, shape: torch.Size) -> list[Tensor]:
        """Every rank's piece as tensors like these: making them takes longer than a sum of few numbers."""
        known = self._known.get((turn, dtype, shape))
        if known is None:
            num_bytes = shape.numel() * dtype.itemsize
            known = [piece[:num_bytes].view(dtype).view(shape) for piece in self._pieces[turn]]
            if len(self._known) < _MOST_VIEWS:
                self._known[turn, dtype, shape] = known
        return known

    def _wait_for(self, other: int) -> None:
        """Wait until the other has counted: awake for about as long as waking up takes, and asleep from then on.

        Of a rank's few cores the other lanes have need meanwhile, and go first.
        """
        counts, place, turn = self._counts, other * _LINE // 8, self._turn
        late_s: float | None = None
        if counts[place] < turn:
            asleep_s = time.perf_counter() + _AWAKE_S
            while counts[place] < turn and time.perf_counter() < asleep_s:
                _let_others_go_first()
        while (count := counts[place]) < turn:
            _futex(_FUTEX, self._places[other], _WAIT, count % _HALF, ctypes.addressof(self._look))
            if counts[place] >= turn:
                return
            late_s = time.monotonic() + self._timeout_s if late_s is None else late_s
            self._check()
            if self._ended[other].poll(0) and counts[place] < turn:
                raise RuntimeError(f"the process of rank {other} has ended")
            if time.monotonic() > late_s:
                raise RuntimeError(f"timed out waiting for rank {other}")


def _handle(store: Store, rank: int, num_bytes: int) -> int:
    """Of memory that rank 0 makes, zeros at first, which has no name; OSError where it cannot be had."""
    able = platform.machine() in _MACHINES and hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")
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
