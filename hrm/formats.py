"""How numbers are stored: the bytes of weights, of the KV cache, and of what is computed with.

A format knows its bytes, and nothing else does. What is asked for is told as the sizes of a tensor,
one after the other, or as a single number of elements.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import mul
from typing import Final

from hrm.numeric import Number


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store numbers, in which every element has a size of its own."""

    name: str
    element_bytes: int

    def bytes_of(self, *sizes: Number) -> Number:
        """Bytes of a tensor of these sizes; a single one is a number of elements."""
        return reduce(mul, sizes) * self.element_bytes

    def elements_in(self, num_bytes: int) -> int:
        """How many whole elements so many bytes hold."""
        return num_bytes // self.element_bytes


FORMATS: Final[Mapping[str, Format]] = {
    row.name: row for row in (Format("float32", 4), Format("bfloat16", 2), Format("float16", 2))
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """The formats of a plan.

    `weights` are parameters as they lie in memory and cross the link. `kv_cache` is keys and values
    from when they leave for the cache, so also on their way over the link. `compute` is the dtype
    of hidden states, queries, activations and logits, and the one whose GEMM rate counts.
    """

    weights: Format
    kv_cache: Format
    compute: Format

    @staticmethod
    def of(dtype: str) -> "Formats":
        """One dtype for all three."""
        only = FORMATS[dtype]
        return Formats(weights=only, kv_cache=only, compute=only)
