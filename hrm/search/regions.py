"""Regions of the space of policies: ranges of all that is counted, for one way to place things."""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# What spans a region; rows of its `low` and `high`. Residents are experts of every layer, and the
# KV cache is the share of it that lies on the GPU.
SIZE, NUMBER, KV, RESIDENT, CHUNK = range(5)


@dataclass(frozen=True, slots=True)
class Regions:
    """Regions, one a column of `low` and `high`; where attention and experts run is fixed in each.

    `gpu_attention`, `gpu_ffn`, `gpu_prefill` (all of its experts), `dense` (projections resident) and
    `one_chunk` (all prompts of a batch are prefilled at once; what `low` and `high` say of chunks is
    then ignored) are 0 or 1.
    """

    gpu_attention: Floats
    gpu_ffn: Floats
    gpu_prefill: Floats
    dense: Floats
    one_chunk: Floats
    low: Floats
    high: Floats

    def __len__(self) -> int:
        """Number of regions."""
        return len(self.dense)

    def take(self, chosen: NDArray[Any]) -> "Regions":
        """The chosen regions only."""
        return Regions(*(getattr(self, item.name)[..., chosen] for item in fields(self)))

    def not_empty(self) -> "Regions":
        """The regions with something in them."""
        return self.take(np.flatnonzero((self.low <= self.high).all(axis=0)))

    def and_also(self, other: "Regions") -> "Regions":
        """The regions of both."""
        return Regions(
            *(np.concatenate([getattr(self, item.name), getattr(other, item.name)], axis=-1) for item in fields(self))
        )
