"""Random weights, for runs whose tokens do not matter."""

from collections.abc import Collection
from typing import final
from zlib import crc32

import torch
from torch import Tensor


@final
class RandomWeights:
    """Random numbers in place of a checkpoint, equal for equal seeds; norms are ones, and biases noughts.

    With biases all tokens would be alike, and go to the same few experts.

    A matrix has a standard deviation that about keeps the size of what it is applied to. All of
    them are cut from one pool of normal numbers, which fits a cache, so large models fill at the
    speed at which memory is written.
    """

    names: Collection[str] = ()

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._pool = torch.randn(1_048_573, generator=torch.Generator().manual_seed(seed))
        self._scaled: dict[tuple[int, torch.dtype], Tensor] = {}

    def read_into(self, name: str, out: Tensor, first_row: int = 0) -> None:
        """Fill `out`, whatever the name."""
        if out.ndim == 1:
            out.fill_(0 if name.endswith("bias") else 1)
            return
        if not out.is_contiguous():  # a family that keeps a matrix the other way round
            dense = torch.empty(out.shape, dtype=out.dtype, device=out.device)
            self.read_into(name, dense, first_row)
            out.copy_(dense)
            return
        shape = out.shape[1], out.dtype
        if shape not in self._scaled:
            self._scaled[shape] = (self._pool * out.shape[1] ** -0.5).to(out.dtype)
        pool = self._scaled[shape]
        start = crc32(f"{self._seed} {name} {first_row}".encode()) % len(pool)
        flat = out.view(-1)
        done = 0
        while done < len(flat):
            piece = pool[start : start + len(flat) - done]
            flat[done : done + len(piece)].copy_(piece)
            done, start = done + len(piece), 0
