"""Attention to sinks, within windows and in chunks, in every form, against all scores at once."""

from itertools import pairwise

import pytest
import torch

from executor import native
from executor.model import GpuKernels, PromptNumbers, Reach, RowNumbers, Workspace, decode_attention, prefill_attention
from executor.model.softmax import Softmax
from tests.executor.model.tolerances import assert_same, name_of
from tests.executor.runtime.queued_backend import flash
from tests.executor.tiny_models import tiny_arch

BLOCK = tiny_arch(num_heads=6, num_kv_heads=2, head_dim=16).spec.attention
REACHES = [Reach(), Reach(7), Reach(150), Reach(7, chunked=True)]
FORMS = {"native": None, "torch": None, "plain": GpuKernels(), "fast": GpuKernels(flash)}
TOKENS = 140  # more than a block of queries


@pytest.fixture(autouse=True)
def without_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def exact(qkv, softmax):
    """Every token's attention to all before it, one score for each pair."""
    q, k, v = qkv.double().view(len(qkv), -1, 16).split((6, 2, 2), dim=1)
    k, v = k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * (0.25 if softmax.scale is None else softmax.scale)
    for at in range(len(qkv)):
        rows = softmax.reach.rows or len(qkv)
        first = at // rows * rows if softmax.reach.chunked else max(0, at + 1 - rows)
        scores[:, at, :first] = scores[:, at, at + 1 :] = -torch.inf
    if softmax.sinks_H is not None:
        sinks = softmax.sinks_H.double().view(-1, 1, 1).expand(-1, len(qkv), 1)
        scores = torch.cat([scores, sinks], dim=2)
    weights = scores.softmax(-1)[..., : len(qkv)]
    return torch.einsum("hqk,khd->qhd", weights, v).flatten(1)


def softmax_of(reach, sinks, scale=None):
    return Softmax(scale, torch.randn(6) if sinks else None, reach)


def workspace():
    return Workspace(torch.empty(10**6, dtype=torch.uint8))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_prompts(form, reach, sinks, dtype):
    softmax, qkv = softmax_of(reach, sinks, 0.3), torch.randn(TOKENS, 10 * 16).to(dtype)
    wanted = exact(qkv, softmax).float()
    cache = torch.full((TOKENS, 2, 2, 16), torch.nan, dtype=dtype)
    with native.using(native.kernels() if form == "native" else None):
        for first, last in pairwise([0, 3, 60, TOKENS]):  # parts of a prompt, after what is kept of it
            out = torch.empty(last - first, 6 * 16, dtype=dtype)
            part = (BLOCK, qkv[first:last])
            if (kernels := FORMS[form]) is None:
                prefill_attention(*part, [last - first], [cache[:last]], out, workspace(), softmax)
            else:
                numbers = PromptNumbers.write(torch.empty(400, dtype=torch.int64), [first], [last - first])
                kernels.prefill_attention(*part, numbers, [cache[:last]], out, workspace(), softmax)
            assert_same(out, wanted[first:last])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("reach", REACHES)
def test_new_tokens(form, reach, sinks):
    """Over rows that are filled in turn, in whatever order they come to lie."""
    softmax, lengths = softmax_of(reach, sinks), [1, 5, 9, 40]
    texts = [torch.randn(length, 10 * 16) for length in lengths]
    wanted = torch.stack([exact(text, softmax)[-1].float() for text in texts])
    starts = [10, 20, 30, 40]
    cache = torch.full((80, 2, 2, 16), torch.nan)
    for text, start in zip(texts, starts, strict=True):
        for token, row in enumerate(text):
            cache[start + reach.row(token)] = row[6 * 16 :].view(2, 2, 16)
    newest, out = torch.stack([text[-1] for text in texts]), torch.empty(4, 6 * 16)
    reached = [reach.length(length) for length in lengths]
    with native.using(native.kernels() if form == "native" else None):
        if (kernels := FORMS[form]) is None:
            decode_attention(BLOCK, newest, cache, starts, reached, out, softmax)
        else:
            rows, there = RowNumbers(torch.arange(4), torch.arange(4), starts, reached), torch.zeros(20).long()
            rows.write(there)
            kernels.decode_attention(BLOCK, newest, cache, rows.at(there), out, spare_bytes=9000, softmax=softmax)
    assert_same(out, wanted)
