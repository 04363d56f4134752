"""Plain weights into packed ones: scales that lose the least, and every weight to the nearest code.

Groups share a scale, see `hrm.formats.PackedFormat`. Of a few scales for each group, from one that its largest weight
just fits to ones that cut the largest weights, the one with the least squared error is taken. Among them are those by
which weights that the format holds exactly come out as they were.

N rows, W columns. Groups are seen as (N / rows, rows, W / columns, columns), and scales so with ones for their sizes.
"""

from typing import Final

import torch
from torch import Tensor

from executor.formats.codes import CODES
from executor.formats.packed import Packed
from hrm.formats import PackedFormat

STRIP_WEIGHTS: Final = 1 << 18  # that are encoded at once: what caches hold with their temporaries

_SCALE_DTYPES: Final = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_SAMPLED_COLUMNS: Final = 64  # that tell which scale may hold a group exactly


def encodes(form: PackedFormat) -> bool:
    """Whether there is an encoder: for formats with nothing but one scale a group, a power of two for fp4."""
    plain = not (form.zeros or form.row_scales or form.ordered)
    return plain and (form.scale == "e8m0" if form.code == "fp4" else form.scale in _SCALE_DTYPES)


def encode(weights: Tensor, form: PackedFormat) -> Packed:
    """A matrix (N, W) of finite floats in a format that `encodes` says; temporaries are of STRIP_WEIGHTS weights."""
    assert encodes(form), form
    assert form.takes(tuple(weights.shape)), (form, weights.shape)
    rows, width = weights.shape
    strip = max(STRIP_WEIGHTS // width // form.rows, 1) * form.rows
    parts = [_encoded(weights[first : first + strip].float(), form) for first in range(0, rows, strip)]
    codes, scales = (torch.cat(each) for each in zip(*parts, strict=True))
    return Packed(form, (rows, width), codes, scales)


def _encoded(weights: Tensor, form: PackedFormat) -> tuple[Tensor, Tensor]:
    """Codes and scales of a strip."""
    (rows, width), code = weights.shape, CODES[form.code]
    groups = _in_groups(weights, form)
    largest = groups.abs().amax((1, 3), keepdim=True)
    largest.masked_fill_(largest == 0, 1)  # any scale will do for noughts
    best, least = largest, torch.full_like(largest, torch.inf)
    divisors = [*code.divisors, *([_likely_divisors(groups, largest, code.exact)] if code.exact else [])]
    for divisor in divisors:
        scales = _representable(largest / divisor, form.scale)
        left = code.nearest(groups / scales).mul_(scales).sub_(groups)
        errors = left.square_().sum((1, 3), keepdim=True)
        best = torch.where(errors < least, scales, best)
        least = torch.minimum(errors, least)
    units = code.nearest(groups / best).flatten(2).flatten(0, 1)[:rows, :width]
    return code.stored(units), _stored_scales(best[:, 0, :, 0], form.scale)


def _in_groups(weights: Tensor, form: PackedFormat) -> Tensor:
    """The weights by groups, filled up with noughts, which change neither scales nor errors."""
    rows, width = weights.shape
    columns = form.columns or width
    padded = torch.nn.functional.pad(weights, (0, -width % columns, 0, -rows % form.rows))
    return padded.view(-1, form.rows, padded.shape[1] // columns, columns)


def _likely_divisors(groups: Tensor, largest: Tensor, among: range) -> Tensor:
    """For each group the largest code by which a sample of its weights come closest to whole numbers."""
    sample = groups[..., :_SAMPLED_COLUMNS] / largest
    divisors = torch.full_like(largest, among[0])
    least = torch.full_like(largest, torch.inf)
    for divisor in among:
        units = sample * divisor
        off = units.sub_(units.round()).abs_().amax((1, 3), keepdim=True)
        divisors = divisors.masked_fill(off < least, divisor)
        least = torch.minimum(off, least)
    return divisors


def _representable(scales: Tensor, scale: str) -> Tensor:
    """The scales as they can be stored, in float32: powers of two rounded down, and none that is nought."""
    if scale == "e8m0":
        return (_exponents(scales).int() << 23).view(torch.float32)
    kind = torch.finfo(_SCALE_DTYPES[scale])
    return scales.clamp(kind.tiny, kind.max).to(_SCALE_DTYPES[scale]).float()


def _stored_scales(scales: Tensor, scale: str) -> Tensor:
    return _exponents(scales) if scale == "e8m0" else scales.to(_SCALE_DTYPES[scale])


def _exponents(scales: Tensor) -> Tensor:
    """The exponents of positive float32 numbers as these have them, at least that of the least normal one."""
    return (scales.view(torch.int32) >> 23).clamp_(min=1).to(torch.uint8)
