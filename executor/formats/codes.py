"""All that torch knows of each narrow code: what one means, which is nearest to a number, and what random ones are.

How groups of them share a scale, `packed` and `encode` say of all alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

_FP4_HALVES: Final = (0, 1, 2, 3, 4, 6, 8, 12)  # twice the magnitudes of e2m1, by its low three bits
_FP4_MAGNITUDES: Final = tuple(half / 2 for half in _FP4_HALVES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """A narrow number of one kind: of a byte, which is of that `dtype`, or two to a byte, the first in its low half.

    `widened` makes float32 of stored bytes, and `numbers` are those that half bytes mean. Of both, `centre` is taken
    off where groups have no zero points.

    `nearest` makes the number that a code has of weights divided by their scale, and `stored` bytes of these. Scales to
    try are the largest weight of a group divided by each of the `divisors`: by the largest code, by what may be the
    largest code where not all are used, and by more, so that the largest weights are cut. Where many codes may be the
    largest, `exact` are those of which a sample tells the likely one.

    Random codes have a standard deviation of `deviation`: those of a byte are of normal numbers, and half bytes as
    likely as each other.
    """

    widened: Callable[[Tensor], Tensor]
    nearest: Callable[[Tensor], Tensor]
    stored: Callable[[Tensor], Tensor]
    divisors: tuple[float, ...]
    deviation: float
    exact: range = range(0)
    dtype: torch.dtype | None = None
    numbers: tuple[float, ...] = ()
    centre: int = 0

    def random(self, pool: Tensor) -> Tensor:
        """Bytes of codes made of normal numbers."""
        if self.dtype is None:
            return (pool.view(torch.int32) >> 4).to(torch.uint8)
        most = (torch.finfo if self.dtype.is_floating_point else torch.iinfo)(self.dtype).max
        return (self.deviation * pool).clamp(-most, most).to(self.dtype).view(torch.uint8)


def _halves(codes: Tensor) -> Tensor:
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)


def _pairs(codes: Tensor) -> Tensor:
    low, high = codes.to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4


def _of_fp4(codes: Tensor) -> Tensor:
    halves = _halves(codes)
    magnitudes = torch.tensor(_FP4_HALVES, dtype=torch.float32, device=codes.device)[(halves & 7).long()]
    return torch.where(halves > 7, -magnitudes, magnitudes).div_(2)


def _fp4_codes(units: Tensor) -> Tensor:
    magnitudes = torch.bucketize(units.abs(), torch.tensor(_FP4_MAGNITUDES))
    return magnitudes + 8 * units.signbit()


def _nearest_fp4(units: Tensor) -> Tensor:
    sizes = units.abs().clamp_(max=6)
    steps = torch.where(sizes < 2, 0.5, torch.where(sizes < 4, 1.0, 2.0))
    return sizes.div_(steps).round_().mul_(steps).copysign_(units)


# By their names in `PackedFormat.code`.
CODES: Final[Mapping[str, Code]] = {
    "int4": Code(
        widened=lambda codes: _halves(codes).float(),
        nearest=lambda units: units.round_().clamp_(-8, 7),
        stored=lambda units: _pairs(units + 8),
        divisors=(7, 8, 4, 5, 6, *(5.25 + 0.25 * step for step in range(24)), 12),
        deviation=4.6,
        numbers=tuple(map(float, range(16))),
        centre=8,
    ),
    "int8": Code(
        widened=lambda codes: codes.view(torch.int8).float(),
        nearest=lambda units: units.round_().clamp_(-128, 127),
        stored=lambda units: units.to(torch.int8).view(torch.uint8),
        divisors=(127, 127.5, 128, *(130 * 1.04**step for step in range(17))),
        deviation=40.0,
        exact=range(64, 129),
        dtype=torch.int8,
    ),
    "fp8": Code(
        widened=lambda codes: codes.view(torch.float8_e4m3fn).float(),
        nearest=lambda units: units.clamp_(-448, 448).to(torch.float8_e4m3fn).float(),
        stored=lambda units: units.to(torch.float8_e4m3fn).view(torch.uint8),
        divisors=(448, 416, 384, 352, 320, 288, 256, 240),
        deviation=1.0,
        dtype=torch.float8_e4m3fn,
    ),
    # After the OCP's rule the largest weight lies between 4 and 8 times the scale; half of that may lose less.
    "fp4": Code(
        widened=_of_fp4,
        nearest=_nearest_fp4,
        stored=lambda units: _pairs(_fp4_codes(units)),
        divisors=(4, 2),
        deviation=2.9,
        numbers=(*_FP4_MAGNITUDES, *(-each for each in _FP4_MAGNITUDES)),
    ),
}
