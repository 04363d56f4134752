"""The kernels by every path that this processor has."""

import pytest
import torch

from executor import native

PATHS = native.paths() or [pytest.param("none", marks=pytest.mark.skip(reason="the native kernels are not built"))]


def on_threads(count, work):
    """What `work` does if torch, and so the kernels, may use that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return work()
    finally:
        torch.set_num_threads(before)
