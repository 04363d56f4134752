"""Latent attention by every path, against keys and values that are projected up in float64."""

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from executor import native
from executor.native.mixers import SplitQuery
from tests.executor.model.tolerances import assert_same
from tests.executor.native.support import PATHS, TILED_CASES, has_tiles, on_threads


@dataclass
class Case:
    queries: Tensor  # (R, H, nope + rope)
    nope: int
    cache: Tensor  # (C, rank + rope)
    kv_up: Tensor  # (H, nope + value_dim, rank)
    starts: list[int]
    lengths: list[int]
    scale: float

    def run(self, path, *, requests=slice(None)):
        queries = self.queries[requests]
        heads, up_rows, _ = self.kv_up.shape
        value_dim = up_rows - self.nope
        out = torch.full((len(queries), heads * value_dim + 3), torch.nan, dtype=queries.dtype)
        values = out[:, : heads * value_dim].view(-1, heads, value_dim)
        query = SplitQuery(queries[..., : self.nope], queries[..., self.nope :])
        kernels = native.Kernels(path)
        assert kernels.takes_latent(query, self.cache, self.kv_up, values)
        kernels.latent_attention(
            query, self.cache, self.kv_up, self.starts[requests], self.lengths[requests], self.scale, values
        )
        assert out[:, heads * value_dim :].isnan().all()
        return values

    def exact(self):
        rank = self.kv_up.shape[2]
        out = []
        for query, start, length in zip(self.queries.double(), self.starts, self.lengths, strict=True):
            rows = self.cache[start : start + length].double()
            up = torch.einsum("hnr,cr->hcn", self.kv_up.double(), rows[:, :rank])
            keys, values = up.split((self.nope, self.kv_up.shape[1] - self.nope), dim=2)
            logits = torch.einsum("hn,hcn->hc", query[:, : self.nope], keys)
            logits += query[:, self.nope :] @ rows[:, rank:].T
            out.append(torch.einsum("hc,hcv->hv", (logits * self.scale).softmax(1), values))
        return torch.stack(out).float()


def make(dtype, *, heads, nope, rope, rank, value_dim, lengths):
    """What lies between the requests' rows is not a number."""
    starts = [2 + sum(lengths[:r]) + 2 * r for r in range(len(lengths))]
    cache = torch.full((starts[-1] + lengths[-1] + 2, rank + rope), torch.nan)
    for start, length in zip(starts, lengths, strict=True):
        cache[start : start + length] = torch.randn(length, rank + rope)
    return Case(
        torch.randn(len(lengths), heads, nope + rope).to(dtype),
        nope,
        cache.to(dtype),
        (torch.randn(heads, nope + value_dim, rank) * rank**-0.5).to(dtype),
        starts,
        lengths,
        (nope + rope) ** -0.5,
    )


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(("path", "dtype"), TILED_CASES, ids=str)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_equals_keys_and_values_projected_up(path, dtype, data):
    case = make(
        dtype,
        heads=data.draw(st.integers(1, 70) | st.sampled_from([16, 32, 48]), "heads"),
        nope=data.draw(st.integers(1, 40), "nope"),
        rope=data.draw(st.integers(1, 40), "rope"),
        rank=data.draw(st.integers(1, 150), "rank"),
        value_dim=data.draw(st.integers(1, 80), "value_dim"),
        lengths=data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=8), "lengths"),
    )
    assert_same(case.run(path), case.exact())


@cache
def published(dtype: torch.dtype) -> tuple[Case, Tensor]:
    """DeepSeek-V2-Lite's sizes and a context long enough to be split, with what is exact."""
    torch.manual_seed(0)
    lengths = [1500 if dtype is torch.float32 else 2200, 7, 121]
    case = make(dtype, heads=16, nope=128, rope=64, rank=512, value_dim=128, lengths=lengths)
    return case, case.exact()


@pytest.mark.parametrize(("path", "dtype"), TILED_CASES, ids=str)
def test_sizes_of_published_models(path, dtype):
    case, exact = published(dtype)
    assert_same(case.run(path), exact)


@pytest.mark.parametrize(("path", "dtype"), TILED_CASES, ids=str)
def test_neither_neighbours_nor_threads_change_a_result(path, dtype):
    """More requests than are computed at once, one of them in splits and one in halves."""
    lengths = [7000, 3, 1100, *[9] * 64, 40]
    heads = 16 if has_tiles(path, dtype) else 9
    case = make(dtype, heads=heads, nope=24, rope=8, rank=120, value_dim=20, lengths=lengths)
    together = on_threads(1, lambda: case.run(path))
    for threads in (2, 5):
        assert torch.equal(on_threads(threads, lambda: case.run(path)), together)
    for r in (0, 2, 66, 67):
        alone = on_threads(2, lambda r=r: case.run(path, requests=slice(r, r + 1)))
        assert torch.equal(alone[0], together[r])


@pytest.mark.parametrize(("path", "dtype"), TILED_CASES, ids=str)
def test_what_is_not_a_number_is_not_hidden(path, dtype):
    heads = 16 if has_tiles(path, dtype) else 3
    case = make(dtype, heads=heads, nope=8, rope=8, rank=32, value_dim=8, lengths=[40, 40])
    case.queries[0, 1, 12] = torch.nan
    out = case.run(path)
    assert out[0, 1].isnan().all()
    assert out[0, 0].isfinite().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_a_request_outside_the_cache_is_refused(path):
    case = make(torch.float32, heads=2, nope=8, rope=8, rank=16, value_dim=8, lengths=[5])
    for starts, lengths in (([99], [5]), ([-1], [5]), ([0], [0])):
        with pytest.raises(IndexError, match="within the cache"):
            replace(case, starts=starts, lengths=lengths).run(path)


@pytest.mark.parametrize("path", PATHS)
def test_what_cannot_be_computed_is_left_to_torch(path):
    def takes(nope, rope, *others):
        return native.Kernels(path).takes_latent(SplitQuery(nope, rope), *others)

    q, cache, kv_up, out = torch.zeros(2, 3, 8), torch.zeros(9, 24), torch.zeros(3, 16, 16), torch.zeros(2, 3, 8)
    assert takes(q, q, cache, kv_up, out)
    assert not takes(q.double(), q.double(), cache.double(), kv_up.double(), out.double())
    assert not takes(q, q.bfloat16(), cache, kv_up, out)
    assert not takes(q, q, cache.T.contiguous().T, kv_up, out)
    assert not takes(q, q, cache, kv_up.transpose(1, 2), out)
    assert not takes(q, q, cache, kv_up, torch.zeros(3, 2, 8).transpose(0, 1))
