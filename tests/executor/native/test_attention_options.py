"""Sinks, caps, scales and windows of decode attention by every path, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor import native
from executor.native.mixers import Logits
from tests.executor.model.tolerances import DTYPES, assert_same
from tests.executor.native.support import PATHS, on_threads


def exact(queries_RHd, cache_C2Gd, starts, lengths, *, scale=None, softcap=0.0, sinks=None):
    """Each request by itself, with the sink as one more token whose value is zero."""
    _, heads, head_dim = queries_RHd.shape
    keys_CHd, values_CHd = cache_C2Gd.double().repeat_interleave(heads // cache_C2Gd.shape[2], 2).unbind(1)
    out = torch.empty(queries_RHd.shape, dtype=torch.float64)
    for r, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        seen = slice(start, start + length)
        logits_HC = torch.einsum("hd,chd->hc", queries_RHd[r].double(), keys_CHd[seen])
        logits_HC *= head_dim**-0.5 if scale is None else scale
        if softcap:
            logits_HC = softcap * torch.tanh(logits_HC / softcap)
        if sinks is not None:
            logits_HC = torch.cat([logits_HC, sinks.double().unsqueeze(1)], 1)
        out[r] = torch.einsum("hc,chd->hd", logits_HC.softmax(1)[:, :length], values_CHd[seen])
    return out.flatten(1).float()


def attended(path, queries_RHd, cache_C2Gd, starts, lengths, *, sinks=None, **how):
    out = torch.full_like(queries_RHd.flatten(1), torch.nan)
    kernels = native.Kernels(path)
    assert kernels.takes_attention(queries_RHd.flatten(1), cache_C2Gd, out, sinks)
    kernels.decode_attention(queries_RHd.flatten(1), cache_C2Gd, starts, lengths, out, Logits(sinks_H=sinks, **how))
    return out


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_options_together(path, dtype, data):
    kv_heads = data.draw(st.sampled_from([1, 2, 8]), "kv heads")
    heads = kv_heads * data.draw(st.integers(1, 8), "group")
    head_dim = data.draw(st.sampled_from([8, 40, 64, 256, 512]), "head_dim")
    lengths = data.draw(st.lists(st.integers(1, 140), min_size=1, max_size=3), "lengths")
    cache = torch.randn(sum(lengths), 2, kv_heads, head_dim).to(dtype)
    queries = torch.randn(len(lengths), heads, head_dim).to(dtype)
    spread = data.draw(st.sampled_from([1.0, 20.0]), "spread of sinks")
    how = {
        "scale": data.draw(st.sampled_from([None, head_dim**-0.5, 0.02, 0.5]), "scale"),
        "softcap": data.draw(st.sampled_from([0.0, 1.0, 30.0]), "softcap"),
        "sinks": torch.randn(heads) * spread if data.draw(st.booleans(), "sinks") else None,
    }
    starts = [sum(lengths[:r]) for r in range(len(lengths))]
    assert_same(attended(path, queries, cache, starts, lengths, **how), exact(queries, cache, starts, lengths, **how))


@pytest.mark.parametrize("path", PATHS)
def test_a_sink_counts_once_however_a_request_is_split(path):
    queries, cache = torch.randn(2, 8, 64), torch.randn(3000, 2, 2, 64)
    sinks = torch.linspace(-3, 8, 8)
    call = (queries, cache, [0, 2000], [2000, 1000])
    one = on_threads(1, lambda: attended(path, *call, sinks=sinks))
    assert_same(one, exact(*call, sinks=sinks))
    assert torch.equal(on_threads(2, lambda: attended(path, *call, sinks=sinks)), one)


@pytest.mark.parametrize("path", PATHS)
def test_a_sink_far_above_all_logits_leaves_nothing(path):
    queries, cache = torch.randn(1, 2, 64), torch.randn(9, 2, 1, 64)
    out = attended(path, queries, cache, [0], [9], sinks=torch.tensor([500.0, -500.0]))
    assert out[0, :64].abs().max() < 1e-30
    assert_same(out[:, 64:], exact(queries, cache, [0], [9])[:, 64:])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("what", [torch.nan, torch.inf])
def test_neither_a_cap_nor_a_sink_hides_what_is_not_a_number(path, what):
    queries, cache = torch.randn(2, 2, 64), torch.randn(9, 2, 1, 64)
    sinks = torch.tensor([what, 0.0])
    assert attended(path, queries, cache, [0, 0], [9, 9], sinks=sinks).isnan().any(1).all()
    queries[1, 1, 3] = what
    out = attended(path, queries, cache, [0, 0], [9, 9], softcap=5.0)
    assert out[0].isfinite().all()
    assert out[1, 64:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("window", [1, 7, 100])
def test_tokens_of_a_prompt_with_a_window_are_requests_whose_starts_differ(path, dtype, window):
    """The last 30 of 50 tokens, against torch's masked attention over the whole cache."""
    context, tokens, heads, kv_heads, head_dim = 50, 30, 4, 2, 16
    cache = torch.randn(context, 2, kv_heads, head_dim).to(dtype)
    queries = torch.randn(tokens, heads, head_dim).to(dtype)
    ends = range(context - tokens + 1, context + 1)
    starts = [max(0, end - window) for end in ends]
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    out = attended(path, queries, cache, starts, lengths)
    at, seen = torch.arange(context - tokens, context).view(-1, 1), torch.arange(context)
    keys, values = cache.float().permute(1, 2, 0, 3)
    masked = torch.nn.functional.scaled_dot_product_attention(
        queries.float().transpose(0, 1), keys, values, attn_mask=(seen <= at) & (seen > at - window), enable_gqa=True
    )
    assert_same(out, masked.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("path", PATHS)
def test_rows_of_a_ring_may_be_in_any_order(path):
    queries, cache = torch.randn(1, 4, 32), torch.randn(40, 2, 2, 32)
    turned = attended(path, queries, cache.roll(13, 0), [0], [40])
    assert_same(turned, attended(path, queries, cache, [0], [40]))


@pytest.mark.parametrize("path", PATHS)
def test_sinks_that_cannot_be_read_are_left_to_torch(path):
    queries, cache = torch.randn(1, 64), torch.randn(9, 2, 1, 32)
    takes = native.Kernels(path).takes_attention
    assert takes(queries, cache, queries, torch.zeros(2))
    assert not takes(queries, cache, queries, torch.zeros(2).double())
    assert not takes(queries, cache, queries, torch.zeros(4)[::2])
