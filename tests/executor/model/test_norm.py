"""Norms whose weights are stored around zero."""

import pytest
import torch
from torch.nn import functional

from executor.model import Norm, Workspace, normed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offset_is_added_and_weights_stay_as_they_are(dtype):
    x_TD, weight_D = torch.randn(5, 16).to(dtype), torch.randn(16).to(dtype)
    before, workspace = weight_D.clone(), Workspace(torch.empty(4096, dtype=torch.uint8))
    norm = Norm(eps=1e-6, offset=1.0)
    exact = functional.rms_norm(x_TD.float(), (16,), weight_D.float() + 1, 1e-6)
    for _ in range(2):
        torch.testing.assert_close(normed(norm, x_TD, weight_D, workspace), exact.to(dtype))
    assert torch.equal(weight_D, before)
