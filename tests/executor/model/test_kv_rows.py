"""Rows of quantised caches: how near their meaning is, and that no token's depends on another."""

import pytest
import torch

from executor.model.kv_rows import dequantised, quantise, row_dtype
from hrm.formats import SCALED_KV_FORMATS, kv_format

PARTS = (24, 24, 7, 40)
HALF_A_STEP = {"int8": 0.5 / 127, "fp8": 0.5 / 8 * 1.001}  # of the greatest; of a number itself, above subnormals


def rows_of(kv_TW, form):
    found = kv_format(form)
    assert found is not None
    rows = torch.full((len(kv_TW), int(found.row_bytes(PARTS))), 77, dtype=torch.uint8).view(
        row_dtype(found, torch.float32)
    )
    quantise(kv_TW, PARTS, rows)
    return rows


@pytest.mark.parametrize("form", SCALED_KV_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_rounded_to_the_nearest_that_has_a_code(form, dtype):
    torch.manual_seed(0)
    kv = (torch.randn(50, sum(PARTS)) * torch.logspace(-4, 2, 50).unsqueeze(1)).to(dtype)
    kv[3] = 0
    got = dequantised(rows_of(kv, form), PARTS, torch.float32)
    for x, y in zip(kv.float().split(PARTS, dim=1), got.split(PARTS, dim=1), strict=True):
        greatest = x.abs().amax(1, keepdim=True)
        sizes = greatest if form == "int8" else torch.maximum(x.abs(), greatest * 2**-6 / 448)
        # The scale has eight bits: what is greatest may be cut to the last code.
        assert (x - y).abs().le(HALF_A_STEP[form] * 1.01 * sizes + 2**-8 * 0.5 / 127 * greatest).all()
        assert y.abs().amax(1, keepdim=True).allclose(greatest, rtol=1 / 200)
    assert got[3].eq(0).all()


@pytest.mark.parametrize("form", SCALED_KV_FORMATS)
def test_a_token_is_quantised_alone_and_rows_are_kept_by_it(form):
    torch.manual_seed(0)
    kv = torch.randn(9, sum(PARTS))
    rows = rows_of(kv, form)
    for t in range(9):
        assert torch.equal(rows_of(kv[t : t + 1], form).view(torch.uint8)[0], rows[t].view(torch.uint8))
