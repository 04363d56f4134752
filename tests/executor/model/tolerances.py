"""How far fast maths may lie from the float32 reference, by dtype."""

import torch

# Rounding of inputs, weights and intermediate results: 24, 11 and 8 bits of mantissa.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}
DTYPES = tuple(TOLERANCE)


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def assert_same(fast, slow):
    """Compare relative to the greatest element of the reference."""
    assert fast.shape == slow.shape
    tolerance = TOLERANCE[fast.dtype] * max(1.0, slow.abs().max().item())
    torch.testing.assert_close(fast.float(), slow.float(), rtol=0, atol=tolerance)
