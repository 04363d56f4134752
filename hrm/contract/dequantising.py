"""What it costs to write packed weights out as plain numbers, where torch has to before it multiplies.

So GPUs do, strip by strip; the CPU's own kernels multiply by packed weights as they are stored. The numbers are
counted from what `executor.formats.Packed.weights` does to each weight, one operator of torch after the other, as if
nothing of it stayed in the GPU's cache from one to the next.
"""

from math import ceil
from typing import Final, NamedTuple

from hrm.contract.temporaries import DEQUANTISED_WEIGHTS
from hrm.formats import PackedFormat

_HALF: Final = 2  # bytes of the dtypes that GPUs compute in


class _Steps(NamedTuple):
    """Bytes of a weight that are read and written, and launches of a strip."""

    num_bytes: int
    launches: int


# From codes to float32: bytes are converted; halves are taken apart and joined, and moved to around zero; and
# of fp4 looked up and given their sign.
_OF_CODES: Final = {"fp8": _Steps(5, 1), "int8": _Steps(5, 1), "int4": _Steps(17, 5), "fp4": _Steps(57, 10)}
_OF_SCALES: Final = {"f32": 0, "bf16": 1, "f16": 1, "e4m3": 1, "e8m0": 6}  # launches: there are few of them
_SCALED: Final = _Steps(8, 1)
_ROUNDED: Final = _Steps(4 + _HALF, 1)  # and read once more by the product
_SPREAD: Final = _Steps(8, 1)  # scales or zero points of groups, one for each weight
_ORDERED: Final = _Steps(16, 2)


def bytes_moved(form: PackedFormat) -> int:
    """Bytes that are read and written for each weight, beside what is stored."""
    return sum(step.num_bytes for step in _steps(form)) + _HALF


def launches(form: PackedFormat, num_weights: int) -> int:
    """Launches for a matrix of so many weights, the product itself left out for its first strip."""
    strips = ceil(num_weights / DEQUANTISED_WEIGHTS)
    return strips * (1 + sum(step.launches for step in _steps(form))) - 1


def _steps(form: PackedFormat) -> list[_Steps]:
    steps = [_OF_CODES[form.code], _Steps(0, _OF_SCALES[form.scale]), _SCALED, _ROUNDED]
    steps += (form.columns > 0) * (1 + form.zeros) * [_SPREAD]
    steps.append(
        _Steps(0, (form.rows > 1) + form.zeros)
    )  # rows of blocks are spread on their own, zero points converted
    return steps + form.ordered * [_ORDERED] + form.row_scales * [_SCALED]
