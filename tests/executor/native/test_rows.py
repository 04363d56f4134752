"""Native norms and rotations against float64, whatever lies beside a strided operand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor import native
from tests.executor.model.tolerances import DTYPES
from tests.executor.native.support import PATHS, on_threads


def within(width, *shape, dtype):
    """Rows of that width that are a part of longer ones, and these."""
    whole = torch.randn(*shape, width + 7).to(dtype)
    return whole[..., 3 : 3 + width], whole


def assert_rounded(ours, exact, times=1):
    """Each time that float32 is on the other side of the middle, another neighbour is taken."""
    torch.testing.assert_close(ours.double(), exact, rtol=times * torch.finfo(ours.dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 200),
    seed=st.integers(0, 2**32),
    size=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_norm(path, dtype, tokens, width, seed, size):
    torch.manual_seed(seed)
    x, _ = within(width, tokens, dtype=dtype)
    x *= size
    weight = torch.rand(width).to(dtype)
    out, whole = within(width, tokens, dtype=dtype)
    beside = whole[:, :3].clone(), whole[:, -4:].clone()
    native.Kernels(path).rms_norm(x, weight, 1e-5, out)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_rounded(out, exact.to(dtype).double() * weight.double(), times=2)
    assert torch.equal(whole[:, :3], beside[0])
    assert torch.equal(whole[:, -4:], beside[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 20),
    heads=st.integers(1, 5),
    width=st.integers(1, 70),
    offset=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_norm_of_heads_in_place(path, dtype, tokens, heads, width, offset, seed):
    """With an offset the product alone is rounded."""
    torch.manual_seed(seed)
    rows, whole = within(heads * width, tokens, dtype=dtype)
    x, before, weight = rows.unflatten(1, (heads, width)), whole.clone(), torch.randn(width).to(dtype)
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    exact = (exact if offset else exact.to(dtype).double()) * (weight.double() + offset)
    native.Kernels(path).rms_norm(x, weight, 1e-5, x, offset=offset)
    assert_rounded(x, exact, times=1 if offset else 2)
    assert torch.equal(whole[:, :3], before[:, :3])
    assert torch.equal(whole[:, -4:], before[:, -4:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("offset", [1.0, 3.1e-6, 3000.0])
def test_every_weight_is_rounded_as_by_torch(path, dtype, offset):
    """Subnormal, infinite and not a number: the norm of ones is what is added to a weight."""
    weight = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    out = torch.ones(1, 2**16, dtype=dtype)
    native.Kernels(path).rms_norm(out, weight, 0.0, out, offset=offset)
    torch.testing.assert_close(out[0], (weight.float() + offset).to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 40), heads=st.integers(1, 5), half=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_rotation(path, dtype, tokens, heads, half, seed):
    torch.manual_seed(seed)
    rows, whole = within(heads * 2 * half, tokens, dtype=dtype)
    before, positions = whole.clone(), torch.randint(0, 32_768, (tokens,))
    frequencies = 1e4 ** -(torch.arange(half) / half)
    native.Kernels(path).rotate(rows, heads, positions, frequencies)
    # Angles are float32 products, as the models' are; a turn is a product of complex numbers.
    angles = (positions.view(-1, 1, 1) * frequencies).double()
    first, second = before[:, 3:-4].double().view(tokens, heads, 2, half).unbind(2)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    assert_rounded(rows, torch.stack([turned.real, turned.imag], 2).flatten(1))
    assert torch.equal(whole[:, :3], before[:, :3])
    assert torch.equal(whole[:, -4:], before[:, -4:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=25, deadline=None)
@given(
    heads=st.integers(1, 4),
    pairs=st.integers(1, 40),
    rest=st.integers(0, 9),
    interleaved=st.booleans(),
    magnitude=st.sampled_from([1.0, 0.4, 1.3]),
    seed=st.integers(0, 2**32),
)
def test_rotation_of_a_part_of_each_head(path, dtype, heads, pairs, rest, interleaved, magnitude, seed):
    """Pairs are complex numbers; `rest` elements of each head come before them, as many again after."""
    torch.manual_seed(seed)
    tokens, head_dim = 6, 2 * pairs + 2 * rest
    rows = torch.randn(tokens, heads * head_dim).to(dtype)
    before, positions = rows.clone().view(tokens, heads, head_dim), torch.randint(0, 32_768, (tokens,))
    frequencies = 1e4 ** -(torch.arange(pairs) / pairs)
    how = {"head_dim": head_dim, "interleaved": interleaved, "magnitude": magnitude}
    native.Kernels(path).rotate(rows[:, rest:], heads, positions, frequencies, **how)
    part = before[..., rest : rest + 2 * pairs].double()
    paired = part.unflatten(2, (pairs, 2) if interleaved else (2, pairs))
    first, second = paired.unbind(3 if interleaved else 2)
    angles = (positions.view(-1, 1, 1) * frequencies).double()
    turned = torch.complex(first, second) * torch.polar(torch.full_like(angles, magnitude), angles)
    together = torch.stack([turned.real, turned.imag], 3 if interleaved else 2).flatten(2)
    after = rows.view(tokens, heads, head_dim)
    assert_rounded(after[..., rest : rest + 2 * pairs], together)
    assert torch.equal(after[..., :rest], before[..., :rest])
    assert torch.equal(after[..., rest + 2 * pairs :], before[..., rest + 2 * pairs :])


@pytest.mark.parametrize("path", PATHS)
def test_more_pairs_than_a_head_has_are_refused(path):
    with pytest.raises(IndexError, match="within a head"):
        native.Kernels(path).rotate(torch.rand(2, 8), 1, torch.arange(2), torch.rand(5), head_dim=8)


@pytest.mark.parametrize("path", PATHS)
def test_no_tokens_are_no_work(path):
    kernels, none = native.Kernels(path), torch.empty(0, 8)
    kernels.rms_norm(none, torch.rand(8), 1e-5, none)
    kernels.rotate(none, 2, torch.arange(0), torch.rand(2))


@pytest.mark.parametrize("path", PATHS)
def test_neither_neighbours_nor_threads_change_a_row(path):
    kernels = native.Kernels(path)
    x, weight, out = torch.randn(900, 160), torch.rand(160), torch.empty(900, 160)
    one, positions = torch.empty(900, 160), torch.arange(900)
    on_threads(3, lambda: kernels.rms_norm(x, weight, 1e-5, out))
    kernels.rms_norm(x[500:501], weight, 1e-5, one[500:501])
    assert torch.equal(out[500], one[500])
    turned, alone = x.clone(), x[500:501].clone()
    on_threads(3, lambda: kernels.rotate(turned, 5, positions, torch.rand(16).fill_(0.25)))
    kernels.rotate(alone, 5, positions[500:501], torch.rand(16).fill_(0.25))
    assert torch.equal(turned[500], alone[0])


@pytest.mark.parametrize("path", PATHS)
def test_what_cannot_be_computed_is_left_to_torch(path):
    kernels = native.Kernels(path)
    x, weight, out = torch.randn(3, 8), torch.rand(8), torch.empty(3, 8)
    assert kernels.takes_norm(x, weight, out)
    assert not kernels.takes_norm(x.double(), weight.double(), out.double())
    assert not kernels.takes_norm(x, weight.bfloat16(), out)
    assert not kernels.takes_norm(x.T.contiguous().T, weight, out)
    heads = torch.randn(3, 4, 8)
    assert kernels.takes_norm(heads, weight, heads)
    assert not kernels.takes_norm(heads, weight, torch.empty(4, 3, 8).transpose(0, 1))
    assert not kernels.takes_norm(heads[:, ::2], weight, torch.empty(3, 2, 8))
    assert not kernels.takes_norm(heads[None], weight, heads[None])
    assert kernels.takes_rotation(x, torch.arange(3))
    assert not kernels.takes_rotation(x, torch.arange(3).int())
    assert not kernels.takes_rotation(x.T.contiguous().T, torch.arange(3))
