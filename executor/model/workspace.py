"""Memory for temporaries, planned by `hrm.contract.temporaries` and allocated once."""

from math import prod
from typing import final

import torch
from torch import Tensor

from hrm.contract.temporaries import TEMPORARY_ALIGNMENT_BYTES


@final
class Workspace:
    """A stack of temporaries in one flat tensor of bytes.

    `take` puts a tensor on the stack and `release` takes off everything since a `mark`.
    `capacity_bytes` can be in use at once, and `high_water_bytes` is the most that ever were.

    With `of_torch` so many bytes, temporaries are torch's on the device of `memory`, which is then
    empty: those that operators allocate themselves come out of the same bytes. They last as long as
    they are held, and how much was in use is known to torch.
    """

    def __init__(self, memory: Tensor, *, of_torch: int | None = None) -> None:
        self._device = None if of_torch is None else memory.device
        assert memory.dtype is torch.uint8, memory.dtype
        assert memory.ndim == 1, memory.shape
        self._memory = memory[: memory.shape[0] // TEMPORARY_ALIGNMENT_BYTES * TEMPORARY_ALIGNMENT_BYTES]
        self.capacity_bytes = self._memory.shape[0] if of_torch is None else of_torch
        self._views: dict[torch.dtype, Tensor] = {}
        self._used_bytes = 0
        self.high_water_bytes = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor, valid until its release."""
        if self._device is not None:
            return torch.empty(shape, dtype=dtype, device=self._device)
        view = self._views.get(dtype)
        if view is None:
            view = self._views[dtype] = self._memory.view(dtype)
        start = self._used_bytes
        end = start + prod(shape) * dtype.itemsize
        assert end <= self.capacity_bytes, (
            f"workspace of {self.capacity_bytes} bytes exhausted: {start} in use, asked for {shape}"
        )
        self.high_water_bytes = max(self.high_water_bytes, end)
        self._used_bytes = -(-end // TEMPORARY_ALIGNMENT_BYTES) * TEMPORARY_ALIGNMENT_BYTES
        strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
        offset = view.storage_offset() + start // dtype.itemsize
        return view.as_strided(shape, strides, offset)

    def mark(self) -> int:
        """The present top of the stack."""
        return self._used_bytes

    def release(self, mark: int) -> None:
        """Give back everything taken since `mark`."""
        assert mark <= self._used_bytes, (mark, self._used_bytes)
        self._used_bytes = mark

    def reset(self) -> None:
        """Give back everything."""
        self._used_bytes = 0
