"""Products with packed matrices by every path against the weights that they mean, in float32.

Tolerances are relative to the largest sum of magnitudes: float32's of sums, and for tokens of 16 bits
those of the result's rounding and, where many are multiplied with weights written out, of theirs.
"""

import math
from typing import Any

import pytest
import torch

from executor import native
from executor.formats import Packed
from executor.model import ExpertWeights, Routing, Workspace, run_experts
from executor.model.linear import add_projected, project
from hrm.formats import packed_format
from tests.executor.formats.test_packed import random_packed
from tests.executor.model.tolerances import assert_same
from tests.executor.native.support import PATHS, TILED_CASES, TILED_PATHS, dtypes_of, on_threads

NAMES = (
    *("fp8", "fp8-b16", "fp8-b128", "fp8-g32-e8m0", "int8", "int8-g32-f16", "int8-g16-f32-z-r"),
    *("int4-g32", "int4-g48-f16-z", "int4-g128-f16-z", "int4-b32", "int4-bf16", "mxfp4", "nvfp4", "fp4-g80-z"),
)
SIZES = ((70, 208), (131, 96), (9, 48), (3, 1168), (5, 2992))  # rows and width
TOKENS = (1, 3, 7, 17, 200)


def sane(name: str, rows: int, width: int, *, seed: int = 0) -> Packed:
    """Random codes and scales, all of them numbers of moderate size."""
    packed = random_packed(name, rows, width, seed=seed)
    form = packed.format
    if form.code == "fp8":
        packed.codes[(packed.codes & 127) == 127] = 5
    if form.scale in {"e8m0", "e4m3"}:
        low, high = (120, 130) if form.scale == "e8m0" else (1, 80)
        packed.scales.copy_(torch.randint(low, high, packed.scales.shape))
    return packed


def dequantised(packed: Packed) -> torch.Tensor:
    return packed.dequantised(torch.empty(packed.shape))


def product(path: str, x: torch.Tensor, packed: Packed) -> torch.Tensor:
    out = torch.full((len(x), len(packed)), torch.nan, dtype=x.dtype)
    with native.using(native.Kernels(path)):
        return project(x, packed, out)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", TILED_PATHS)
def test_equals_the_weights_that_are_meant(path: str, name: str) -> None:
    for seed, (rows, width) in enumerate(SIZES):
        packed = sane(name, rows, width, seed=seed)
        exact = dequantised(packed).double()
        x = torch.randn(max(TOKENS), width)
        for dtype in dtypes_of(path):
            inputs = x.to(dtype)
            kernels = native.Kernels(path)
            for tokens in TOKENS:
                here = inputs[:tokens]
                assert kernels.takes_linear(here, packed, torch.empty(tokens, rows, dtype=dtype))
                right = here.double() @ exact.T
                most = (here.double().abs() @ exact.abs().T).max().item()
                tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype] * most
                difference = (product(path, here, packed).double() - right).abs().max().item()
                assert difference <= tolerance, (rows, width, dtype, tokens, difference / most)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", PATHS)
def test_few_tokens_lose_nothing_but_the_results_rounding(path: str, name: str) -> None:
    packed = sane(name, 20, 144)
    x = torch.randn(8, 144).bfloat16()
    exact = x.double() @ dequantised(packed).double().T
    out = torch.zeros(8, 20).bfloat16()
    with native.using(native.Kernels(path)):
        add_projected(x, packed, out)
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("path", TILED_PATHS)
@pytest.mark.parametrize(
    ("name", "part", "value"),
    [
        ("fp8", "codes", 0x7F),
        ("fp8-b16", "codes", 0xFF),
        ("mxfp4", "scales", 255),
        ("nvfp4", "scales", 0x7F),
        ("int4-g32", "scales", math.nan),
        ("int8-g32-f16", "scales", math.inf),
        ("int8", "scales", math.nan),
        ("nvfp4", "row_scales", -math.inf),
    ],
)
def test_what_is_no_number_spoils_its_rows_only(path: str, name: str, part: str, value: float) -> None:
    rows, width = 37, 336
    for place in (0, -1):
        packed = sane(name, rows, width)
        packed.parts[part][17, place] = value
        for tokens in (2, 20):
            for dtype in dtypes_of(path):
                x = torch.randn(tokens, width).to(dtype)
                right = x.float() @ dequantised(packed).T
                ours = product(path, x, packed)
                assert torch.equal(ours.isfinite(), right.isfinite())
                assert not right[:, 17].isfinite().any()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", PATHS)
def test_any_bytes_are_multiplied(path: str, name: str) -> None:
    """Of what is no number or too large the result is none either, elsewhere it is right."""
    packed = random_packed(name, 30, 112, seed=3)
    x = torch.randn(20, 112)
    weights = dequantised(packed)
    right = x.double() @ weights.double().T
    kept = (x.double().abs() @ weights.double().abs().T < 1e30).logical_and(right.isfinite())
    most = weights.abs().nan_to_num().amax(1).double() * 112
    for tokens in (5, 20):
        ours = product(path, x[:tokens], packed).double()
        assert not ours[right[:tokens].isnan()].isfinite().any()
        error = ((ours - right[:tokens]).abs() / most.clamp(min=1e-38))[kept[:tokens]]
        assert error.numel() == 0 or error.max() < 1e-5


@pytest.mark.parametrize("name", ["int4-g48-f16-z", "fp8-b128", "int8", "mxfp4"])
@pytest.mark.parametrize("path", TILED_PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_neither_neighbours_nor_threads_change_a_result(path: str, name: str, dtype: torch.dtype) -> None:
    packed = sane(name, 330, 2400)
    x = torch.randn(150, 2400).to(dtype)
    few, more, many = (slice(0, 1), slice(1, 4)), (slice(0, 5), slice(1, 7)), (slice(20, 41), slice(50, 149))
    for tokens, some in ((4, few), (8, more), (150, many)):
        together = on_threads(1, lambda tokens=tokens: product(path, x[:tokens], packed))
        assert torch.equal(on_threads(3, lambda tokens=tokens: product(path, x[:tokens], packed)), together)
        for part in some:
            assert torch.equal(product(path, x[part], packed), together[part])


@pytest.mark.parametrize("name", ["fp8", "int8"])
@pytest.mark.parametrize("path", PATHS)
def test_few_tokens_are_summed_in_one_order(path: str, name: str) -> None:
    """Halves that all but cancel out leave what float32's order of adding makes of them, which rounding would hide."""
    packed = sane(name, 64, 2560)
    packed.codes[:, 1280:] = packed.codes[:, :1280]
    half = torch.randn(4, 1280)
    x = torch.cat((half, -half), 1).bfloat16()
    x[:, :8] *= 1 + 2**-7
    together = product(path, x, packed)
    for first, last in ((0, 1), (1, 3), (1, 4)):
        assert torch.equal(product(path, x[first:last], packed), together[first:last])


@pytest.mark.parametrize("names", [("mxfp4", "mxfp4"), ("int4-g32", "fp8-b128"), ("fp8", None), (None, "int8-g32-f16")])
@pytest.mark.parametrize(("path", "dtype"), TILED_CASES, ids=str)
def test_experts(path: str, names: tuple[str | None, str | None], dtype: torch.dtype) -> None:
    hidden, intermediate, tokens = 160, 96, 50
    shapes = (2 * intermediate, hidden), (hidden, intermediate)

    def made(name: str | None, shape: tuple[int, int], seed: int) -> Any:
        if name is None:
            return (torch.randn(shape) * shape[1] ** -0.5).to(dtype)
        packed = sane(name, *shape, seed=seed)
        size = dequantised(packed).square().mean().sqrt() * shape[1] ** 0.5
        if packed.scales.dtype is torch.uint8:  # sizes are powers of two in both
            packed.scales.sub_(size.log2().round().byte() * (1 if packed.format.scale == "e8m0" else 8))
        else:
            packed.scales.div_(size)
        return packed

    weights = [
        ExpertWeights(*(made(name, shape, e) for name, shape in zip(names, shapes, strict=True))) for e in range(3)
    ]
    wide = [
        ExpertWeights(*(m.float() if isinstance(m, torch.Tensor) else dequantised(m) for m in (each.w13, each.w2)))
        for each in weights
    ]
    x, scores = torch.randn(tokens, hidden).to(dtype), torch.rand(tokens, 3)
    scores[:45, 0] = 2  # one expert has many tokens, another a few
    routing = Routing(*scores.softmax(-1).topk(1))
    out, exact = torch.ones_like(x), torch.ones(tokens, hidden)
    workspace = Workspace(torch.empty(10**6, dtype=torch.uint8))
    with native.using(native.Kernels(path)):
        run_experts(x, routing, enumerate(weights), out, workspace)
    with native.using(None):
        run_experts(x.float(), routing, enumerate(wide), exact, workspace)
    assert_same(out, exact)


def test_an_order_of_columns_is_left_to_torch() -> None:
    ordered, packed = (random_packed(name, 4, 64) for name in ("int4-g32-f16-z-o", "int4-g32-f16-z"))
    narrow = packed_format("int4-g8")
    assert narrow is not None
    assert native.takes_packed(packed)
    assert not native.takes_packed(ordered)
    assert not native.takes_packed(random_packed("int4-g8", 4, 64))
    x, out = torch.randn(3, 64), torch.empty(3, 4)
    assert_same(project(x, ordered, out), x @ dequantised(ordered).T)
