"""What it costs to write packed weights out as plain numbers, where torch has to before it multiplies.

So GPUs do, strip by strip; the CPU's own kernels multiply by packed weights as they are stored. The numbers are
counted from what `executor.formats.Packed.dequantised` does to each weight, one operator of torch after the other, as
if nothing of it stayed in the GPU's cache from one to the next.
"""

from math import ceil
from typing import Final, NamedTuple

from hrm.contract.temporaries import DEQUANTISED_WEIGHTS
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
# By an order of columns, all of it in float32, and each weight's own scale and zero point found first.
_ORDERED: Final = _Steps(64, 9)


def bytes_moved(form: PackedFormat) -> float:
    """Bytes that are read and written for each weight, beside what is stored."""
    return sum(step.num_bytes for step in _steps(form)) + _HALF


def launches(form: PackedFormat, num_weights: int) -> int:
    """Launches for a matrix of so many weights, the product itself left out for its first strip."""
    strips = ceil(num_weights / DEQUANTISED_WEIGHTS)
    return strips * (1 + sum(step.launches for step in _steps(form))) - 1


def _steps(form: PackedFormat) -> list[_Steps]:
    codes = _OF_BYTES if form.code_bits == 8 else _OF_HALVES
    few = _Steps(0, _OF_SCALES[form.scale] + form.row_scales)
    return [codes, few, *(1 + form.zeros) * [_IN_PLACE], *form.ordered * [_ORDERED]]
