"""Encoders against a search over every scale, the bounds of rounding, and weights that formats hold exactly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from executor.formats import Packed
from executor.formats.encode import encode, encodes
from hrm.formats import PackedFormat, packed_format

NAMES = ("int4-g8", "int4-g32", "int4-g32-f16", "int4-g32-f32", "int8", "fp8", "fp8-b16", "mxfp4")
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def form_of(name: str) -> PackedFormat:
    form = packed_format(name)
    assert form is not None
    return form


def decoded(packed: Packed) -> Tensor:
    return packed.dequantised(torch.empty(packed.shape))


def random_weights(rows: int, width: int, *, seed: int = 0, heavy: float = 0.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randn(rows, width, generator=draw)
    return weights * torch.rand(rows, width, generator=draw).clamp_(min=1e-3) ** -heavy


def codes_of(code: str) -> Tensor:
    """All numbers of a format, without its scales."""
    match code:
        case "int4":
            return torch.arange(-8.0, 8)
        case "int8":
            return torch.arange(-128.0, 128)
        case "fp4":
            return torch.cat([E2M1, -E2M1])
        case _:
            every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
            return every[every.isfinite()]


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_the_format_holds_come_out_as_they_were(name: str) -> None:
    form, draw = form_of(name), torch.Generator().manual_seed(1)
    rows, width = 32, 96
    units = codes_of(form.code)
    units = units[torch.randint(len(units), (rows, width), generator=draw)]
    groups = -(-rows // form.rows), form.groups(width)
    exponents = torch.randint(-12, -4, groups, generator=draw).float()
    steps = torch.tensor(1.0) if form.scale == "e8m0" else 1 + torch.randint(8, groups, generator=draw) / 8
    scales = (steps * 2**exponents).repeat_interleave(form.rows, 0)[:rows]
    weights = units * scales.repeat_interleave(form.columns or width, 1)[:, :width]
    assert decoded(encode(weights, form)).equal(weights)


def least_error(weights: Tensor, form: PackedFormat) -> Tensor:
    """Of each row, a group: the least squared error by any of many scales, each weight to the nearest of all codes."""
    codes = codes_of(form.code).sort().values
    middles, largest = (codes[1:] + codes[:-1]) / 2, weights.abs().amax(1, keepdim=True)
    if form.scale == "e8m0":
        tried = [2.0**exponent for exponent in range(-12, 6)]
    else:
        tried = [largest / divisor for divisor in torch.linspace(0.4, 2.5, 400) * codes[-1]]
    errors = [(codes[torch.bucketize(weights / s, middles)] * s - weights).square().sum(1) for s in tried]
    return torch.stack(errors).amin(0)


@pytest.mark.parametrize(("name", "width", "worse"), [("int4-g16", 16, 1.03), ("int8", 16, 1.6), ("mxfp4", 32, 1.001)])
@pytest.mark.parametrize("heavy", [0.0, 0.4])
def test_scales_are_about_the_best_there_are(name: str, width: int, worse: float, heavy: float) -> None:
    """For the 16 weights of these rows a scale may suit by chance, least so with codes as fine as int8's."""
    form, weights = form_of(name), random_weights(200, width, heavy=heavy)
    ours = (decoded(encode(weights, form)) - weights).square().sum()
    best = least_error(weights, form).sum()
    assert 0.98 * best <= ours <= worse * best


@pytest.mark.parametrize("name", ["int4-g32", "int4-g128"])
def test_cutting_the_largest_weights_loses_less_than_keeping_them(name: str) -> None:
    form = form_of(name)
    weights, most = random_weights(64, 256, heavy=0.3), codes_of(form.code)[-1]
    groups = weights.unflatten(1, (-1, form.columns or 256))
    scales = groups.abs().amax(2, keepdim=True) / most
    kept = ((groups / scales).round() * scales - groups).square().sum()
    assert (decoded(encode(weights, form)) - weights).square().sum() < 0.97 * kept


STEPS = {"int4": 1 / 14, "int8": 1 / 254, "fp4": 1 / 6}  # half of the widest one, by a group's largest weight


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    rows=st.integers(1, 40),
    half_width=st.integers(1, 70),
    exponent=st.integers(-30, 12),
    seed=st.integers(0, 999),
)
def test_errors_are_those_of_rounding_at_most(name: str, rows: int, half_width: int, exponent: int, seed: int) -> None:
    """In each group on the whole, whatever its size and where it ends; scales in float16 reach less far down."""
    form = form_of(name)
    weights = random_weights(rows, 2 * half_width, seed=seed, heavy=0.3) * 2.0 ** max(exponent, -10)
    packed = encode(weights, form)
    assert {part: tuple(tensor.shape) for part, tensor in packed.parts.items()} == {
        part.name: part.shape for part in form.parts(*weights.shape)
    }
    off = decoded(packed) - weights
    for at in range(0, rows, form.rows):
        for start in range(0, 2 * half_width, form.columns or 2 * half_width):
            group = (slice(at, at + form.rows), slice(start, start + (form.columns or 2 * half_width)))
            largest, count = weights[group].abs().max(), weights[group].numel()
            bound = largest * STEPS[form.code] * count**0.5 if form.code in STEPS else weights[group].norm() / 16
            assert off[group].norm() <= 1.01 * bound + 1e-3 * largest, (name, group)


@pytest.mark.parametrize("name", NAMES)
def test_noughts_stay_and_the_least_numbers_do_no_harm(name: str) -> None:
    form = form_of(name)
    weights = torch.zeros(16, 64)
    weights[1, 40:] = 1e-42
    assert decoded(encode(weights, form)).abs().max() < 1e-5
    assert decoded(encode(torch.zeros(16, 64), form)).count_nonzero() == 0


@pytest.mark.parametrize("name", ["int4-g32", "fp8-b16"])
def test_strips_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    form, weights = form_of(name), random_weights(80, 64)
    whole = encode(weights, form)
    monkeypatch.setattr("executor.formats.encode.STRIP_WEIGHTS", 64 * 20)
    assert all(part.equal(whole.parts[key]) for key, part in encode(weights, form).parts.items())


@pytest.mark.parametrize("name", ["int4-g128-f16-z", "nvfp4", "int4-g32-f16-z-o"])
def test_formats_that_need_more_than_scales_have_no_encoder(name: str) -> None:
    assert not encodes(form_of(name))
