"""A device that is none: tensors, streams, kernels and copies as strict and as late as CUDA's."""

from collections.abc import Mapping, Sequence
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor

from executor.backends import AbstractBackend
from executor.backends.base import Copy, copy_all
from executor.backends.streams import AbstractMark, AbstractStream
from executor.model import GpuKernels
from executor.model.workspace import Workspace
from hrm.tasks import Device, Lane
from tests.executor.runtime.device_tensor import DeviceTensor, WithDevice, on_device
from tests.executor.runtime.fake_device import FakeDevice, FakeStream


class LateBackend(AbstractBackend):
    """Copies to and from the device are done late by streams; what the GPU computes is waited for.

    A copy that is queued without the edge that it needs, or whose memory is used again too early,
    so brings wrong tokens. Of host memory that is not pinned, `pinned_bytes` at most, they are
    waited for, and `pageable_bytes` counts what each lane moved of it.
    """

    streams: Mapping[Lane, AbstractStream]

    def __init__(
        self,
        device: FakeDevice,
        kernels: GpuKernels,
        lanes: Sequence[Lane] = (Lane.H2D, Lane.D2H),
        pinned_bytes: int = 2**62,
    ) -> None:
        self.name, self.description = "late", "a device that is none"
        self.pinned_bytes = pinned_bytes
        self.pinned: dict[int, int] = {}
        self.pageable_bytes = dict.fromkeys(Lane, 0)
        self._host: dict[int, int] = {}
        self.gpu_kernels = kernels
        self.device = device
        self.gpu = EagerStream(device)
        self.streams = {lane: device.stream() for lane in lanes} | {Lane.GPU: self.gpu}

    def allocate(self, level: Device, num_bytes: int) -> Tensor:
        # What was never written is no number anywhere.
        memory = torch.full((num_bytes,), 0xFF, dtype=torch.uint8)
        if level is Device.CPU:
            self._host[memory.data_ptr()] = num_bytes
            return memory
        return DeviceTensor(memory)

    def workspace(self, *num_bytes: int) -> tuple[Workspace, ...]:
        nothing = self.allocate(Device.GPU, 0)
        return tuple(Workspace(nothing, of_torch=size) for size in num_bytes)

    def pin(self, memory: Tensor) -> bool:
        fits = memory.nbytes <= self.pinned_bytes - sum(self.pinned.values())
        if fits:
            self.pinned[memory.data_ptr()] = memory.nbytes
        return fits

    def unpin(self, memory: Tensor) -> None:
        self.pinned.pop(memory.data_ptr(), None)

    def transfer(self, lane: Lane, copies: Sequence[Copy]) -> int:
        assert lane is Lane.STAGE or all(target.is_contiguous() and source.is_contiguous() for target, source in copies)

        def copy() -> None:
            copy_all(copies, partial(Tensor.copy_, non_blocking=True))

        pageable = [
            side for pair in copies for side in pair if _within(side, self._host) and not _within(side, self.pinned)
        ]
        self.pageable_bytes[lane] += sum(side.nbytes for side in pageable)
        self.device.queue(copy)
        if pageable and lane is not Lane.STAGE:
            self.synchronise()
        return sum(source.nbytes for _, source in copies)

    def lane_threads(self, lane: Lane) -> int:
        return 1

    def synchronise(self) -> None:
        stream = getattr(self.device.current, "stream", None)
        if stream is not None:
            stream.mark().synchronise()


def _within(tensor: Tensor, arenas: Mapping[int, int]) -> bool:
    """Whether it lies in one of these, given as address: bytes."""
    at = tensor.data_ptr()
    return any(start <= at < start + size for start, size in arenas.items())


class EagerStream(AbstractStream):
    """A stream whose lane does the work itself: it waits where a stream would be made to wait.

    At times it is late, so that whoever should have waited for it goes on too early.
    """

    def __init__(self, device: FakeDevice) -> None:
        self._stream = FakeStream(device, 0)
        self._device, self._random = device, Random(0)
        device.streams.append(self._stream)

    def enter(self) -> None:
        self._stream.enter()
        WithDevice().__enter__()  # until the lane's thread ends

    def mark(self) -> AbstractMark:
        self._device.be_late(self._random)
        return self._stream.mark()

    def wait(self, mark: Any) -> None:
        mark.synchronise()


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_q: Tensor,
    cum_k: Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    debug: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What aten's _flash_attention_forward computes, slowly; the checks are those of its kernel."""
    assert cum_q.dtype == cum_k.dtype == torch.int32
    assert len(cum_q) == len(cum_k)
    assert cum_q.is_contiguous()
    assert cum_k.is_contiguous()
    for x in (query, key, value):
        assert x.stride(-1) == 1
        assert all(n * x.itemsize % 16 == 0 for n in x.stride()[:-1]), "it reads 16 bytes at a time"
        assert x.data_ptr() % 16 == 0
    if max_q == 1 and query.shape[1] > key.shape[1]:
        assert len(query) == len(cum_q) - 1, "then cum_q is not looked at"
    assert not dropout
    assert not debug
    out = torch.empty_like(query, memory_format=torch.contiguous_format).fill_(torch.nan)
    of_logits = torch.empty(query.shape[1], len(query))
    group = query.shape[1] // key.shape[1]
    for r in range(len(cum_q) - 1):
        rows = slice(int(cum_q[r]), int(cum_q[r + 1]))
        start = int(cum_k[r])
        if seqused_k is None:
            end = int(cum_k[r + 1])
        else:
            assert seqused_k.dtype == torch.int32
            end = start + int(seqused_k[r])
        assert 0 < rows.stop - rows.start <= max_q
        assert 0 < end - start <= max_k
        q, k, v = (
            x.transpose(0, 1).float()
            for x in (
                query[rows],
                key[start:end].repeat_interleave(group, 1),
                value[start:end].repeat_interleave(group, 1),
            )
        )
        scores = q @ k.transpose(1, 2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if causal:
            later = scores.shape[2] - scores.shape[1]  # the last query sees all keys
            scores += torch.full(scores.shape[1:], -torch.inf).triu(1 + later)
            if window_size_left is not None:
                assert window_size_right == 0
                scores += torch.full(scores.shape[1:], -torch.inf).tril(later - window_size_left - 1)
        of_logits[:, rows] = scores.logsumexp(-1)
        out[rows] = (scores.softmax(-1) @ v).transpose(0, 1).to(out.dtype)
    return out, of_logits


def grouped(x_ND: Tensor, weights_EDW: Tensor, *, offs: Tensor) -> Tensor:
    """What torch's grouped GEMM computes on a Hopper, slowly; the checks are those of its kernel.

    Rows past the last group's are no numbers: the kernel does not write them.
    """
    assert x_ND.dtype == weights_EDW.dtype == torch.bfloat16
    assert offs.dtype == torch.int32
    assert offs.shape == weights_EDW.shape[:1]
    assert x_ND.shape[1] == weights_EDW.shape[1]
    assert x_ND.stride(1) == weights_EDW.stride(1) == 1, "as it is called here: rows, and matrices turned over"
    for x in (x_ND, weights_EDW):
        assert x.data_ptr() % 16 == 0
        assert all(n * x.itemsize % 16 == 0 for n in x.stride() if n != 1), "it reads 16 bytes at a time"
    out_NW = torch.full((len(x_ND), weights_EDW.shape[2]), torch.nan, dtype=x_ND.dtype)
    start = 0
    for weights_DW, end in zip(weights_EDW, offs.tolist(), strict=True):
        assert start <= end <= len(x_ND)
        out_NW[start:end] = x_ND[start:end] @ weights_DW
        start = end
    return out_NW


def kernels_named(name: str) -> GpuKernels:
    """`plain` as on a card without either, `fast` as on one with both."""
    return {"plain": GpuKernels(), "fast": GpuKernels(on_device(flash), on_device(grouped))}[name]
