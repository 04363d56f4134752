"""Attention over a quantised cache by every path, against float32 attention to what its codes mean."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from executor import native
from executor.model.kv_rows import quantise, row_dtype
from executor.model.mixers.grouped_query import append_kv
from hrm.formats import SCALED_KV_FORMATS, aligned, kv_format
from tests.executor.model.tolerances import DTYPES, assert_same
from tests.executor.native import test_attention, test_latent
from tests.executor.native.support import PATHS, TILED_CASES, has_tiles, on_threads

both = pytest.mark.parametrize("form", SCALED_KV_FORMATS)
every_path = pytest.mark.parametrize("path", PATHS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def coded(kv_CW: Tensor, parts: tuple[int, ...], form: str) -> Tensor:
    """Rows of a cache that holds these numbers."""
    found = kv_format(form)
    assert found is not None
    rows_CB = torch.full((len(kv_CW), int(found.row_bytes(parts))), -1, dtype=torch.uint8).view(
        row_dtype(found, torch.float32)
    )
    quantise(kv_CW, parts, rows_CB)
    return rows_CB


def meaning(rows_CB: Tensor, parts: tuple[int, ...]) -> Tensor:
    """What rows mean, number by number."""
    plain, first = rows_CB.view(torch.uint8), aligned(sum(parts))
    scales_CP = plain[:, first : first + 2 * len(parts)].contiguous().view(torch.bfloat16).float()
    codes = rows_CB[:, : sum(parts)].float().split(parts, dim=1)
    return torch.cat([code * scale.unsqueeze(1) for code, scale in zip(codes, scales_CP.unbind(1), strict=True)], dim=1)


def grouped(dtype, form, **sizes):
    """The case with its cache quantised, and the one that it means."""
    case = test_attention.make_case(torch.float32, **sizes)
    kv_heads, head_dim = case.cache.shape[2:]
    parts = (head_dim,) * 2 * kv_heads
    rows = coded(case.cache.flatten(1), parts, form)
    wide = replace(case, qkv=case.qkv.to(dtype).float(), cache=meaning(rows, parts).view(case.cache.shape))
    made = replace(case, qkv=case.qkv.to(dtype), cache=rows)
    for kernels in (native.Kernels(path) for path in native.paths()):
        assert kernels.takes_attention(made.qkv, rows, made.qkv, heads=(kv_heads, head_dim))
    return made, wide


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_path
def test_equals_attention_to_what_codes_mean(path, dtype, form):
    """Head dimensions are whole vectors, and some more; contexts are less than a tile, and some of them."""
    for head_dim, lengths in ((64, [1, 33, 150]), (40, [9, 700, 1]), (128, [300])):
        case, wide = grouped(dtype, form, kv_heads=2, heads=6, head_dim=head_dim, lengths=lengths)
        assert_same(case.run(native.Kernels(path)), wide.run(None))


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_does_the_same(dtype, form):
    case, wide = grouped(dtype, form, kv_heads=3, heads=3, head_dim=40, lengths=[5, 70])
    assert_same(case.run(None), wide.run(None))


@both
@every_path
def test_neither_neighbours_nor_threads_change_a_result(path, form):
    lengths = [700, 1, 33, 1400, *[9] * 16]
    case, _ = grouped(torch.bfloat16, form, kv_heads=4, head_dim=128, lengths=lengths)
    kernels = native.Kernels(path)
    together = on_threads(1, lambda: case.run(kernels))
    assert torch.equal(on_threads(3, lambda: case.run(kernels)), together)
    alone = on_threads(2, lambda: case.run(kernels, requests=slice(3, 4)))
    assert torch.equal(alone[0], together[3])


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_path
def test_every_code_is_read_as_what_it_means(path, dtype, form):
    """A request with one token has its values as they are: all 256 codes, but for those that are no numbers."""
    codes, of_codes = torch.arange(256, dtype=torch.uint8), getattr(torch, SCALED_KV_FORMATS[form].codes)
    codes = codes[codes.view(of_codes).float().isfinite()]
    codes = torch.cat([codes, codes[: -len(codes) % 8]])
    row = torch.zeros(aligned(2 * len(codes)) + 16, dtype=torch.uint8)
    row[len(codes) : 2 * len(codes)] = codes
    row[aligned(2 * len(codes)) :].view(torch.bfloat16)[:2] = torch.tensor([1.0, 0.75])
    out = torch.empty(1, len(codes), dtype=dtype)
    queries, cache = torch.ones(1, len(codes), dtype=dtype), row.view(1, -1).view(of_codes)
    native.Kernels(path).decode_attention(queries, cache, [0], [1], out, heads=(1, len(codes)))
    assert torch.equal(out[0], (codes.view(of_codes).float() * 0.75).to(dtype))


@both
@every_path
@pytest.mark.parametrize("what", [torch.nan, torch.inf])
def test_what_is_not_a_number_is_not_hidden(path, form, what):
    case, _ = grouped(torch.bfloat16, form, kv_heads=2, head_dim=64, lengths=[40, 40])
    kv_1W = torch.randn(1, 256)
    kv_1W[0, 5] = what
    append_kv(case.cache, coded(kv_1W, (64,) * 4, form).view(torch.bfloat16), torch.tensor([case.starts[0] + 7]))
    out = case.run(native.Kernels(path)).unflatten(1, (8, 64))
    assert out[0, :4].isnan().all()
    assert out[0, 4:].isfinite().all()
    assert out[1].isfinite().all()


@both
@pytest.mark.parametrize(("path", "dtype"), TILED_CASES, ids=str)
def test_latent_attention_equals_that_to_what_codes_mean(path, dtype, form):
    for rank, rope in ((128, 64), (52, 10)):
        sizes = {"heads": 16 if has_tiles(path, dtype) else 7, "nope": 24, "rope": rope, "rank": rank, "value_dim": 40}
        case = test_latent.make(torch.float32, **sizes, lengths=[1, 130, 40])
        rows = coded(case.cache, (rank, rope), form)
        queries, kv_up = case.queries.to(dtype), case.kv_up.to(dtype)
        wide = replace(case, queries=queries.float(), kv_up=kv_up.float(), cache=meaning(rows, (rank, rope)))
        assert_same(replace(case, queries=queries, kv_up=kv_up, cache=rows).run(path), wide.exact())
