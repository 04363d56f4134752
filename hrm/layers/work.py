"""A piece of computing in FLOPs, bytes and launches.

Everything takes the number of tokens at once, as numbers or NumPy arrays. GEMMs count 2 FLOPs a
multiply-add, and their weights once.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from hrm.formats import Formats
from hrm.numeric import Number


class Kernel(NamedTuple):
    """One piece of computing at a level: FLOPs, bytes touched there, and rows of its GEMM.

    `reads_kv` marks decode attention, whose roof is the rate at which its kernel reads the cache.
    Where packed weights are written out as plain numbers first, that moves `written_out_bytes` in so many launches.
    Where most weights are packed, `code` is theirs.
    """

    flops: Number
    num_bytes: Number
    rows: Number
    reads_kv: bool = False
    written_out_bytes: Number = 0.0
    written_out_launches: Number = 0.0
    code: str = ""


@dataclass(frozen=True, slots=True)
class Operator:
    """What one task computes; `requests` are those whose attention may cost something each.

    `launches` are always issued, `unfused_launches` only where a layer has no fused kernels: where
    experts are computed one by one, and norm and rotary embedding by several operators. There
    `saved_by_grouping` are not issued by a processor that groups experts.
    """

    kernels: tuple[Kernel, ...] = ()
    launches: Number = 0
    requests: Number = 0
    unfused_launches: Number = 0
    saved_by_grouping: Number = 0

    def __add__(self, other: "Operator") -> "Operator":
        """Both, one after the other."""
        return Operator(
            self.kernels + other.kernels,
            self.launches + other.launches,
            self.requests + other.requests,
            self.unfused_launches + other.unfused_launches,
            self.saved_by_grouping + other.saved_by_grouping,
        )

    @property
    def flops(self) -> Number:
        """All FLOPs."""
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def num_bytes(self) -> Number:
        """All bytes touched at the level it runs on."""
        return sum(kernel.num_bytes for kernel in self.kernels)

    def with_passes(self, passes: float) -> "Operator":
        """The same where attention moves so many bytes for each byte of the cache."""
        kernels = tuple(
            kernel._replace(num_bytes=passes * kernel.num_bytes) if kernel.reads_kv else kernel
            for kernel in self.kernels
        )
        return replace(self, kernels=kernels)

    @property
    def intensity(self) -> Number:
        """Operational intensity: FLOPs a byte."""
        return self.flops / self.num_bytes


def gemms(rows: Number, parameters: int, touched: Number, formats: Formats) -> Kernel:
    """GEMMs of `rows` tokens with so many weights; `touched` elements of a token go in and out."""
    return weighted(2 * parameters * rows, parameters, formats.compute.bytes_of(touched, rows), rows, formats)


def weighted(flops: Number, weights: Number, other_bytes: Number, rows: Number, formats: Formats) -> Kernel:
    """A kernel that reads so many weights, and other bytes."""
    form = formats.weights
    return Kernel(
        flops,
        form.bytes_of(weights) + other_bytes,
        rows,
        written_out_bytes=form.written_out_bytes * weights,
        written_out_launches=form.written_out_launches * weights,
        code=form.code,
    )


def linear(rows: Number, inputs: int, outputs: int, formats: Formats) -> Kernel:
    """A GEMM of `rows` tokens with an inputs × outputs weight matrix."""
    return gemms(rows, inputs * outputs, inputs + outputs, formats)
