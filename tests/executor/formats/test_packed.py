"""Packed matrices against each weight worked out on its own, in plain Python."""

from math import isnan, nan

import pytest
import torch

from executor.formats import Packed, packed_in
from hrm.formats import ALIGNMENT_BYTES, packed_format

NAMES = (
    *("fp8", "fp8-b16", "int8", "int8-g32-f16", "mxfp4", "nvfp4"),
    *("int4-g32", "int4-g16-f16-z", "int4-g32-f16-z-o", "int4-g32-f32"),
)
NO_NAMES = ("", "int5", "int4-g0x", "fp8-b128-g32", "fp4-g32-e8m0", "int4-g32-bf16", "int4-g999999")
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


def random_packed(name: str, rows: int, width: int, *, several: tuple[int, ...] = (), seed: int = 0) -> Packed:
    form = packed_format(name)
    assert form is not None
    draw = torch.Generator().manual_seed(seed)
    memory = torch.randint(0, 256, (*several, form.bytes_of(rows, width)), dtype=torch.uint8, generator=draw)
    packed = packed_in(form, rows, width, memory)
    if form.scale not in {"e8m0", "e4m3"}:
        packed.scales.copy_(torch.rand(packed.scales.shape, generator=draw))
    if packed.row_scales is not None:
        packed.row_scales.copy_(torch.rand(packed.row_scales.shape, generator=draw))
    if packed.order is not None:
        packed.order.copy_(torch.randint(form.groups(width), packed.order.shape, generator=draw))
    return packed


def e4m3(byte: int) -> float:
    sign, exponent, mantissa = -1 if byte & 128 else 1, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return nan
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2 ** (exponent - 7))


def weight(packed: Packed, row: int, column: int) -> float:
    """One weight by the definition of its format."""
    form = packed.format
    group = column // form.columns if form.columns else 0
    if packed.order is not None:
        group = int(packed.order[0, column])
    place = row // form.rows, group
    if form.code_bits == 8:
        byte = int(packed.codes[row, column])
        code = e4m3(byte) if form.code == "fp8" else byte - 256 * (byte > 127)
    else:
        half = int(packed.codes[row, column // 2]) >> 4 * (column % 2) & 15
        code = half if form.code == "int4" else (-1 if half > 7 else 1) * E2M1[half & 7]
    if form.code == "int4" and packed.zeros is None:
        code -= 8
    if packed.zeros is not None:
        code -= int(packed.zeros[place])
    stored = packed.scales[place]
    scale = {"e8m0": lambda: 2.0 ** (int(stored) - 127) if stored < 255 else nan, "e4m3": lambda: e4m3(int(stored))}
    value = code * scale.get(form.scale, lambda: float(stored))()
    return value if packed.row_scales is None else value * float(packed.row_scales[row, 0])


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_what_the_format_says(name: str) -> None:
    rows, width = 24, 64
    packed = random_packed(name, rows, width)
    ours = packed.dequantised(torch.empty(rows, width)).double()
    exact = torch.tensor([[weight(packed, n, w) for w in range(width)] for n in range(rows)], dtype=torch.float64)
    kept = exact.abs() < torch.finfo(torch.float32).max
    assert kept.sum() > rows * width / 2
    torch.testing.assert_close(ours[kept], exact[kept], rtol=3e-7, atol=2e-38)
    assert ours.isnan().equal(exact.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    """Scaled where they lie they are what float32 gives; scales of rows are multiplied in another order."""
    packed = random_packed(name, 48, 64, seed=2)
    ours, exact = packed.dequantised(torch.empty(48, 64, dtype=dtype)), packed.weights()
    if packed.row_scales is None:
        assert ours.nan_to_num().equal(exact.to(dtype).nan_to_num())
    else:
        torch.testing.assert_close(ours.float(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_stack_are_those_of_the_whole(name: str) -> None:
    packed = random_packed(name, 32, 64, several=(3,), seed=1)
    whole = packed.dequantised(torch.empty(3, 32, 64)).nan_to_num()
    assert packed[1].dequantised(torch.empty(32, 64)).nan_to_num().equal(whole[1])
    assert packed[1:].dequantised(torch.empty(2, 32, 64)).nan_to_num().equal(whole[1:])
    assert packed[2][16:].dequantised(torch.empty(16, 64)).nan_to_num().equal(whole[2, 16:])


@pytest.mark.parametrize("name", NAMES)
def test_names_are_read_as_they_are_told(name: str) -> None:
    form = packed_format(name)
    assert form is not None
    assert form.name == name
    assert form.bytes_of(48, 80) % ALIGNMENT_BYTES == 0
    assert sum(part.num_bytes for part in form.parts(48, 80)) <= form.bytes_of(48, 80)


@pytest.mark.parametrize(
    "name", ["", "int5", "int4-g0x", "fp8-b128-g32", "fp4-g32-e8m0", "int4-g32-bf16", "int4-g999999"]
)
def test_other_names_are_of_no_format(name: str) -> None:
    assert packed_format(name) is None


def test_a_weight_needs_what_published_formats_need() -> None:
    """gpt-oss: 4.25 bits; NVFP4: 4.5 and a scale a row; DeepSeek-V3: one float32 for 128 × 128."""
    sizes = 2880, 2880
    bits = {name: form.bytes_of(*sizes) * 8 / 2880**2 for name in NAMES if (form := packed_format(name)) is not None}
    assert bits["mxfp4"] == 4.25
    assert bits["nvfp4"] == pytest.approx(4.5 + 32 / 2880)
    assert bits["fp8"] == pytest.approx(8 + 32 / 2880)
    assert isnan(e4m3(0x7F))
