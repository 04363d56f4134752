"""Products with a weight matrix by every path against torch in float32, from the same inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor import native
from executor.model.crossings import ALWAYS, assumed
from executor.model.linear import add_projected, project
from tests.executor.model.tolerances import assert_same
from tests.executor.native.support import MOST_UNTILED, PATHS, TILED_CASES, WITH_TILES, has_tiles, on_threads


@pytest.fixture(autouse=True)
def native_alone():
    torch.manual_seed(0)
    with assumed(ALWAYS):
        yield


def make(dtype, tokens, width, rows):
    """Tokens and matrix such that products are of the order of one."""
    return torch.randn(tokens, width).to(dtype), (torch.randn(rows, width) * width**-0.5).to(dtype)


def product(kernels, x, weight):
    out = torch.full((len(x), len(weight)), torch.nan, dtype=x.dtype)
    with native.using(kernels):
        return project(x, weight, out)


@pytest.mark.parametrize(("path", "dtype"), TILED_CASES, ids=str)
@settings(max_examples=40)
@given(data=st.data())
def test_equals_torch(path, dtype, data):
    """Whatever lies beside a strided operand is not looked at, nor written to."""
    tokens = data.draw(st.integers(0, 120), "tokens")
    width = data.draw(st.integers(1, 150), "width")
    rows = data.draw(st.integers(1, 100), "rows")
    gap = data.draw(st.integers(0, 5), "gap")
    wide_x, weight = make(dtype, tokens, width + gap, rows)
    weight = weight[:, :width].contiguous()
    wide_x[:, width:] = torch.nan
    x = wide_x[:, :width]
    wide_out = torch.randn(tokens, rows + gap).to(dtype)
    before = wide_out.clone()
    out = wide_out[:, :rows]
    exact = x.float() @ weight.float().T
    with native.using(native.Kernels(path)):
        if data.draw(st.booleans(), "add"):
            add_projected(x, weight, out)
            exact += before[:, :rows].float()
        else:
            project(x, weight, out)
    if tokens:
        assert_same(out, exact)
    assert torch.equal(wide_out[:, rows:], before[:, rows:])


@pytest.mark.parametrize(("path", "dtype"), TILED_CASES, ids=str)
def test_wide_tokens_are_summed_in_stretches(path, dtype):
    x, weight = make(dtype, 70, 2500, 40)
    assert_same(product(native.Kernels(path), x, weight), x.float() @ weight.float().T)


@pytest.mark.parametrize(("path", "dtype"), TILED_CASES, ids=str)
@pytest.mark.parametrize("width", [512, 1000, 1500, 1504, 2048])  # few tokens take rows in turn
def test_neither_neighbours_nor_threads_change_a_result(path, dtype, width):
    x, weight = make(dtype, 150, width, 330)
    kernels = native.Kernels(path)
    together = on_threads(1, lambda: product(kernels, x, weight))
    for threads in (2, 3):
        assert torch.equal(on_threads(threads, lambda: product(kernels, x, weight)), together)
    for first, last in ((0, 1), (3, 10), (20, 23), (30, 36), (50, 59), (40, 140)):
        alone, others = product(kernels, x[first:last], weight), together[first:last]
        if has_tiles(path, dtype) and last - first <= MOST_UNTILED:
            others = product(kernels, x[first : first + MOST_UNTILED], weight)[: last - first]
        assert torch.equal(alone, others)


@pytest.mark.parametrize("path", WITH_TILES)
def test_tokens_may_be_arranged_in_several_rounds(path):
    x, weight = make(torch.bfloat16, 300, 7001, 20)
    kernels = native.Kernels(path)
    together = product(kernels, x, weight)
    assert_same(together, x.float() @ weight.float().T)
    assert torch.equal(product(kernels, x[140:160], weight), together[140:160])


@pytest.mark.parametrize("path", PATHS)
def test_what_cannot_be_computed_is_left_to_torch(path):
    x, weight = make(torch.float32, 3, 8, 5)
    kernels = native.Kernels(path)
    out = torch.empty(3, 5)
    assert kernels.takes_linear(x, weight, out)
    assert not kernels.takes_linear(x.double(), weight.double(), out.double())
    assert not kernels.takes_linear(x, weight.T.contiguous().T, out)
    assert not kernels.takes_linear(x.T.contiguous().T, weight, out)
    assert not kernels.takes_linear(x, weight, out.bfloat16())
    assert_same(product(kernels, x.double(), weight.double()).float(), x @ weight.T)


def test_more_tokens_than_ours_are_faster_with_are_left_to_torch():
    x, weight = make(torch.float32, 9, 8, 5)

    class Refusing:
        def takes_linear(self, *_):
            return True

    with assumed(8):
        assert_same(product(Refusing(), x, weight), x @ weight.T)
        with pytest.raises(AttributeError, match="linear"):
            product(Refusing(), x[:8], weight)
