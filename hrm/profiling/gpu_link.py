"""Transfers between the host and GPUs, all of them at once, and from one GPU to another."""

from collections.abc import Sequence
from typing import Final

import torch

from hrm.profiling.gpu import AbstractGpu
from hrm.profiling.link import Transfer
from hrm.profiling.timing import Call

WORD: Final = 8  # bytes of the numbers that transfers are checked by


def gpu_transfer(gpus: Sequence[AbstractGpu], *, to_device: bool, pinned: bool, largest_bytes: int) -> Transfer:
    """Transfers between host and GPUs, each split evenly over them.

    With one GPU they are queued on the calling thread's stream, with several each GPU's part on a
    stream of its own: `AbstractGpu.sampler` and `together` time them. The first of each size is
    checked against its source; RuntimeError if it arrived changed.
    """
    share = largest_bytes // len(gpus) // WORD * WORD
    pairs = [_buffers(gpu, share, to_device=to_device, pinned=pinned) for gpu in gpus]

    def transfer(size: int) -> Call:
        part = min(share, -(-size // len(gpus)))
        copies = [_copy(target[:part], source[:part], queued=pinned) for target, source in pairs]
        if len(gpus) > 1:
            calls = [gpu.queued(copy).run for gpu, copy in zip(gpus, copies, strict=True)]
        else:
            calls = copies
        _check(gpus, calls, [(target[:part], source[:part]) for target, source in pairs])

        def call() -> None:
            for one in calls:
                one()

        return call

    return transfer


def peer_transfer(source: AbstractGpu, target: AbstractGpu, largest_bytes: int) -> Transfer:
    """Transfers from one GPU to another, queued on the source's stream; checked like the others."""
    length = largest_bytes // WORD
    sent = _numbers(length).to(source.device)
    arrived = torch.zeros(WORD * length, dtype=torch.uint8, device=target.device)

    def transfer(size: int) -> Call:
        call = _copy(arrived[:size], sent[:size], queued=True)
        _check((source, target), [call], [(arrived[:size], sent[:size])])
        return call

    return transfer


def _buffers(gpu: AbstractGpu, num_bytes: int, *, to_device: bool, pinned: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Target and source, the source filled."""
    host = gpu.pinned(num_bytes) if pinned else torch.zeros(num_bytes, dtype=torch.uint8)
    on_device = torch.zeros(num_bytes, dtype=torch.uint8, device=gpu.device)
    target, source = (on_device, host) if to_device else (host, on_device)
    source.copy_(_numbers(num_bytes // WORD))
    gpu.wait()
    return target, source


def _numbers(count: int) -> torch.Tensor:
    """Bytes that differ from place to place."""
    return torch.arange(count, dtype=torch.int64).view(torch.uint8)


def _copy(target: torch.Tensor, source: torch.Tensor, *, queued: bool) -> Call:
    return lambda: target.copy_(source, non_blocking=queued)


def _check(
    gpus: Sequence[AbstractGpu], calls: Sequence[Call], pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    for call in calls:
        call()
    for gpu in gpus:
        gpu.wait()
    for target, source in pairs:
        if not torch.equal(target.cpu(), source.cpu()):
            raise RuntimeError(f"a transfer of {len(target)} bytes arrived changed")
