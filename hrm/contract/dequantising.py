"""What it costs to write packed weights out as plain numbers, where torch has to before it multiplies.

So GPUs do, strip by strip; the CPU's own kernels multiply by packed weights as they are stored. The numbers are
counted from what `executor.formats.Packed.dequantised` does to each weight, one operator of torch after the other, as
if nothing of it stayed in the GPU's cache from one to the next.
"""

from math import ceil
from typing import Final, NamedTuple

from hrm.contract.temporaries import DEQUANTISED_IN_ORDER, DEQUANTISED_WEIGHTS
from hrm.formats import PackedFormat

_HALF: Final = 2  # bytes of the dtypes that GPUs compute in


class _Steps(NamedTuple):
    """Bytes of a weight that are read and written, and launches of a strip."""

    num_bytes: float
    launches: int


# From codes to numbers: bytes are converted; of half bytes two are looked up at once, by an int32.
_OF_BYTES: Final = _Steps(1 + _HALF, 1)
_OF_HALVES: Final = _Steps(4.5 + _HALF, 2)
_OF_SCALES: Final = {"f32": 0, "bf16": 1, "f16": 1, "e4m3": 1, "e8m0": 6}  # launches: there are few of them
_IN_PLACE: Final = _Steps(2 * _HALF, 1)  # scales of groups on their weights, or zero points
# Where columns have an order all of it is float32 until it is rounded, and each weight's scale and zero point is found
# by itself; half bytes are taken apart and joined first.
_ORDERED_BYTES: Final = _Steps(5, 1)
_ORDERED_HALVES: Final = _Steps(9, 4)
_FOUND: Final = _Steps(4, 1)
_AROUND_ZERO: Final = _Steps(8, 1)
_WITH_ANOTHER: Final = _Steps(12, 1)
_ROUNDED: Final = _Steps(4 + _HALF, 1)


def weights_at_once(form: PackedFormat) -> int:
    """How many weights of a matrix are written out at once, at most: as many as the workspace has room for."""
    return DEQUANTISED_WEIGHTS // (DEQUANTISED_IN_ORDER if form.ordered else 1)


def bytes_moved(form: PackedFormat) -> float:
    """Bytes that are read and written for each weight, beside what is stored."""
    return sum(step.num_bytes for step in _steps(form)) + _HALF


def launches(form: PackedFormat, num_weights: int) -> int:
    """Launches for a matrix of so many weights, the product itself left out for its first strip."""
    strips = ceil(num_weights / weights_at_once(form))
    return strips * (1 + sum(step.launches for step in _steps(form))) - 1


def _steps(form: PackedFormat) -> list[_Steps]:
    if form.ordered:
        return _in_order(form)
    codes = _OF_BYTES if form.code_bits == 8 else _OF_HALVES
    few = _Steps(0, _OF_SCALES[form.scale] + form.row_scales)
    return [codes, few, *(1 + form.zeros) * [_IN_PLACE]]


def _in_order(form: PackedFormat) -> list[_Steps]:
    codes = _ORDERED_BYTES if form.code_bits == 8 else _ORDERED_HALVES
    few = _Steps(0, 1 + _OF_SCALES[form.scale] + form.zeros)  # the order itself, scales and zero points converted
    zeros = [_WITH_ANOTHER] if form.zeros else [_AROUND_ZERO] * (form.code == "int4")
    return [codes, few, *(1 + form.zeros) * [_FOUND], *zeros, _WITH_ANOTHER, _ROUNDED]
