"""A group of processes: shared memory or gloo between processors, NCCL between CUDA devices, and a store to meet at.

R rows (requests), V vocab; C of this rank's.
"""

import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, cast, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from executor.errors import RunError
from executor.group.base import Group, LostRankError, share_of
from executor.group.shared import SharedMemory
from executor.group.store import LOOP, beside, meet, wait_until_told
from executor.guard import in_a_line

TIMEOUT: Final = "EXECUTOR_RANK_TIMEOUT"
_DEFAULT_TIMEOUT_S: Final = 30.0
_NEVER: Final = timedelta(days=365)
_LOOK_S: Final = 1e-3  # between two looks for a message, so that Ctrl-C gets through


def timeout_s() -> float:
    """How long a rank waits for another in a collective; RunError if the environment says nonsense."""
    text = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(text or _DEFAULT_TIMEOUT_S)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < _NEVER.total_seconds():
        raise RunError(TIMEOUT, text, "must be a positive number of seconds", "correct it in the environment")
    return seconds


@final
class ProcessGroup(Group):
    """One rank of a group whose processes meet at a store; all are on this machine.

    Tensors of the host go through memory that ranks share, or over gloo; those of a CUDA device over NCCL, and through
    the host's memory where ranks share a device. A rank calls `look`, which may raise, while it waits for the others to
    come and to form groups with it. After `timeout` seconds a rank that has not come to where another waits for it is
    lost.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        *,
        look: Callable[[], object] = lambda: None,
        timeout: float | None = None,
    ) -> None:
        self.rank, self.size, self._store, self._look = rank, size, store, look
        self._timeout_s = timeout or timeout_s()
        self._lost = ""
        meet(store, rank, size, look)
        with self.telling():
            shared = SharedMemory.of(PrefixStore("shared", store), rank, size, self._timeout_s, self._check, look)
            self._numbers: Any = shared or self._gloo("numbers", timedelta(seconds=self._timeout_s))
            self._messages: Any = self._gloo("messages", _NEVER)
        self._devices: Any = None
        self._shares_devices: bool | None = None

    def all_reduce(self, tensor: Tensor) -> None:
        """Add up in place, in the tensor's own numbers."""
        assert tensor.is_contiguous()
        if not tensor.numel():
            return

        def reduce(groups: Any, summed: Tensor) -> Tensor:
            groups.allreduce([summed]).wait()
            return summed

        summed = self._where_it_lies(tensor, reduce)
        if summed is not tensor:
            tensor.copy_(summed)

    def exchange_rows(self, rows_RV: Tensor) -> Tensor:
        """All columns of this rank's share of the rows."""
        rows, columns = rows_RV.shape
        counts = [len(share_of(rank, self.size, rows)) for rank in range(self.size)]
        own = counts[self.rank]
        if not rows:
            return rows_RV.new_empty(0, self.size * columns)

        def exchange(groups: Any, rows_RC: Tensor) -> Tensor:
            received = rows_RC.new_empty(self.size * own, columns)
            groups.alltoall_base(received, rows_RC, [own] * self.size, counts).wait()
            return received

        received = self._where_it_lies(rows_RV.contiguous(), exchange).to(rows_RV.device)
        return received.view(self.size, own, columns).transpose(0, 1).reshape(own, self.size * columns)

    def gather(self, own: Tensor, count: int) -> Tensor:
        """All ranks' shares of `count` numbers."""
        shares = [share_of(rank, self.size, count) for rank in range(self.size)]
        assert len(own) == len(shares[self.rank])
        if not count:
            return own
        most = max(map(len, shares))
        padded = own if len(own) == most else torch.nn.functional.pad(own, (0, most - len(own)))

        def gather(groups: Any, padded: Tensor) -> Tensor:
            found = padded.new_empty(self.size * most)
            groups._allgather_base(found, padded).wait()  # noqa: SLF001 - has no other name
            return found

        found = self._where_it_lies(padded, gather)
        if found.is_cuda:  # numbers are read at once, and those of a group that was given up must not be
            torch.cuda.current_stream(found.device).synchronize()
            self._check()
        if len(found) == count:
            return found.to(own.device)
        return torch.cat([found[rank * most :][: len(share)] for rank, share in enumerate(shares)]).to(own.device)

    def agree(self, value: int) -> int:
        """The value of rank 0."""
        told = torch.tensor([value])
        with self.telling():
            _broadcast(self._numbers, told).wait()
        return int(told.item())

    def broadcast(self, message: bytes | None = None) -> bytes:
        """The message of rank 0."""
        assert (message is not None) == (self.rank == 0)
        length = torch.tensor([len(message or b"")])
        self._finish(lambda: _broadcast(self._messages, length))
        told = _bytes(message or b"", int(length.item()))
        if len(told):
            self._finish(lambda: _broadcast(self._messages, told))
        return told.numpy().tobytes()

    def collect(self, message: bytes) -> list[bytes]:
        """The messages of all ranks, in their order."""
        lengths = torch.empty(self.size, dtype=torch.int64)
        self._finish(lambda: self._messages._allgather_base(lengths, torch.tensor([len(message)])))  # noqa: SLF001
        most = int(lengths.max())
        found = torch.empty(self.size * most, dtype=torch.uint8)
        if most:
            self._finish(lambda: self._messages._allgather_base(found, _bytes(message, most)))  # noqa: SLF001
        parts = found.view(self.size, most)
        return [part[:length].numpy().tobytes() for part, length in zip(parts, lengths.tolist(), strict=True)]

    def give_up(self, reason: str) -> None:
        """Fail what is under way on devices and all that is to come; from any thread.

        Gloo's own operations go on until another process has ended, or their time is over.
        """
        self._lost = self._lost or reason
        if self._devices is not None:
            self._devices.abort()

    def close(self) -> None:
        """Leave the group."""
        self._lost = self._lost or "the group was closed"
        if isinstance(self._numbers, SharedMemory):
            self._numbers.close()
        self._numbers = self._messages = self._devices = None

    def over_gloo(self, name: str) -> Any:
        """Another group of torch's of the same ranks, which all of them ask for, and in which none is ever late."""
        with self.telling():
            return self._gloo(name, _NEVER)

    def _gloo(self, name: str, timeout: timedelta) -> Any:
        return beside(self._look, lambda: _gloo(self._store, name, self.rank, self.size, timeout))

    def _where_it_lies(self, tensor: Tensor, work: Callable[[Any, Tensor], Tensor]) -> Tensor:
        """What `work` makes of the tensor with the group for where it lies, or of its copy on the host."""
        with self.telling():
            if not tensor.is_cuda:
                return work(self._numbers, tensor)
            if self._shares_devices is None:
                self._meet_on_devices(tensor.device)
            if self._shares_devices:
                return work(self._numbers, tensor.cpu())
            return work(self._devices, tensor)

    def _meet_on_devices(self, device: torch.device) -> None:
        """Form the group of devices, unless ranks share one, which NCCL refuses."""
        keys = [f"device of rank {rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], str(torch.cuda.get_device_properties(device).uuid))
        wait_until_told(self._store, keys, self._check)
        found = {self._store.get(key) for key in keys}
        if len(found) == self.size:
            # Else a thread of NCCL's ends the process when another rank is lost.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            self._devices = cast("Any", dist).ProcessGroupNCCL(
                PrefixStore("devices", self._store), self.rank, self.size, timedelta(seconds=self._timeout_s)
            )
        self._shares_devices = len(found) < self.size

    def _finish(self, start: Callable[[], Any]) -> None:
        with self.telling():
            work = start()
            while not work.is_completed():
                time.sleep(_LOOK_S)
            work.wait()

    def _check(self) -> None:
        if self._lost:
            raise LostRankError(f"rank {self.rank}", f"<{self._lost}>", "needs all ranks", "see why the other ended")

    @contextmanager
    def telling(self) -> Generator[None]:
        """Within it, what torch raises comes out as LostRankError."""
        self._check()
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
                raise
            late = "timed out" in str(error).lower()
            self._lost = self._lost or (
                f"another did not come within {self._timeout_s:g} s" if late else in_a_line(error).split(". ")[0]
            )
            self._check()
        self._check()


def _gloo(store: Store, name: str, rank: int, size: int, timeout: timedelta) -> Any:
    """A group of its own over the loop of this machine's network."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()  # noqa: SLF001 - torch.distributed makes its own groups so
    options._devices = [gloo.create_device(hostname=LOOP)]  # noqa: SLF001
    options._timeout, options._threads = timeout, 1  # noqa: SLF001
    return gloo(PrefixStore(name, store), rank, size, options)


def _broadcast(groups: Any, tensor: Tensor) -> Any:
    options = dist.BroadcastOptions()
    options.rootRank = 0
    return groups.broadcast([tensor], options)


def _bytes(message: bytes, length: int) -> Tensor:
    """The message in a tensor of that many bytes, zeros behind it."""
    return torch.frombuffer(bytearray(message.ljust(length, b"\0")), dtype=torch.uint8) if length else torch.empty(0)
