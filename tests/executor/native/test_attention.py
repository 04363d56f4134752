"""Decode attention by every path against torch in float32, from the same inputs."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from executor import native
from executor.model import Architecture, decode_attention
from tests.executor.model.tolerances import DTYPES, assert_same
from tests.executor.native.support import PATHS, on_threads
from tests.executor.tiny_models import tiny_arch


@dataclass
class Case:
    arch: Architecture
    qkv: Tensor
    cache: Tensor
    starts: list[int]
    lengths: list[int]

    def run(self, kernels, *, requests=slice(None)):
        """What the kernels compute for those requests, or torch if there are none."""
        qkv = self.qkv[requests]
        out = torch.full((len(qkv), self.arch.spec.query_size), 7.0, dtype=qkv.dtype)
        with native.using(kernels):
            decode_attention(
                self.arch.spec.attention, qkv, self.cache, self.starts[requests], self.lengths[requests], out
            )
        return out

    def exact(self):
        """What torch computes in float32."""
        wide = Case(self.arch, self.qkv.float(), self.cache.float(), self.starts, self.lengths)
        return wide.run(None)


def make_case(dtype, *, heads=8, kv_heads=2, head_dim=64, lengths, scale=1.0, gap=3):
    arch = tiny_arch(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    spec = arch.spec
    starts = [gap + sum(lengths[:r]) + gap * r for r in range(len(lengths))]
    cache = torch.full((starts[-1] + lengths[-1] + gap, 2, kv_heads, head_dim), torch.nan)
    for start, length in zip(starts, lengths, strict=True):
        cache[start : start + length] = torch.randn(length, 2, kv_heads, head_dim)
    qkv = torch.randn(len(lengths), spec.query_size + 2 * spec.kv_size) * scale
    return Case(arch, qkv.to(dtype), cache.to(dtype), starts, lengths)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=40)
@given(data=st.data())
def test_equals_torch(path, dtype, data):
    """Nothing outside a request's part of the cache is looked at: it is not a number."""
    kv_heads = data.draw(st.sampled_from([1, 2, 3, 8]), "kv heads")
    case = make_case(
        dtype,
        heads=kv_heads * data.draw(st.integers(1, 9), "group"),
        kv_heads=kv_heads,
        head_dim=8 * data.draw(st.integers(1, 33), "head_dim / 8"),
        lengths=data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=4), "lengths"),
        scale=data.draw(st.sampled_from([0.0, 0.1, 1.0, 30.0]), "scale"),
    )
    assert_same(case.run(native.Kernels(path)), case.exact())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_long_contexts_are_split_and_merged(path, dtype):
    case = make_case(dtype, kv_heads=4, head_dim=128, lengths=[1, 1500, 383, 384, 385])
    assert_same(case.run(native.Kernels(path)), case.exact())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 4), (20, 2)])  # the latter are merged by several threads
def test_neither_neighbours_nor_threads_change_a_result(path, dtype, heads, kv_heads):
    kernels = native.Kernels(path)
    lengths = [700, 1, 33, 1400, 128, *[9] * 16]
    case = make_case(dtype, heads=heads, kv_heads=kv_heads, head_dim=128, lengths=lengths)
    together = on_threads(1, lambda: case.run(kernels))
    for threads in (2, 3, 5):
        assert torch.equal(on_threads(threads, lambda: case.run(kernels)), together)
    for r in range(5):
        alone = on_threads(2, lambda r=r: case.run(kernels, requests=slice(r, r + 1)))
        assert torch.equal(alone[0], together[r])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_one_logit_far_above_the_others_takes_all(path, dtype):
    """Logits in the thousands, rising to the end: earlier sums are scaled down to nothing."""
    case = make_case(dtype, heads=4, kv_heads=1, lengths=[90])
    start, length = case.starts[0], case.lengths[0]
    case.qkv.fill_(16.0)
    keys = torch.linspace(-40, 40, length).to(dtype).view(-1, 1, 1).expand(-1, 1, 64)
    case.cache[start : start + length, 0] = keys
    last = case.cache[start + length - 1, 1]
    assert torch.equal(case.run(native.Kernels(path)).view(4, 64), last.expand(4, 64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("what", [torch.nan, torch.inf])
def test_what_is_not_a_number_is_not_hidden(path, dtype, what):
    case = make_case(dtype, lengths=[40, 40])
    case.qkv[0, 5] = what
    out = case.run(native.Kernels(path))
    assert out[0, :64].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_mean_of_equal_values_is_that_value(path):
    """Weights are rounded before they are summed, so that they add up to one."""
    case = make_case(torch.bfloat16, lengths=[1000])
    case.cache[:, 1] = 0.7109375
    assert (case.run(native.Kernels(path)) == 0.7109375).all()


@pytest.mark.parametrize("path", PATHS)
def test_a_request_outside_the_cache_is_refused(path):
    case = make_case(torch.float32, lengths=[5, 6])
    for starts, lengths in (([0, 99], [5, 6]), ([-1, 3], [5, 6]), ([0, 3], [5, 0])):
        case.starts, case.lengths = starts, lengths
        with pytest.raises(IndexError, match="within the cache"):
            case.run(native.Kernels(path))


@pytest.mark.parametrize("path", PATHS)
def test_other_head_sizes_are_left_to_torch(path):
    case = make_case(torch.float32, head_dim=12, lengths=[5, 6])
    kernels = native.Kernels(path)
    assert not kernels.takes_attention(case.qkv, case.cache, case.qkv)
    assert torch.equal(case.run(kernels), case.run(None))
