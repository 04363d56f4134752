"""The kernels by every path that this processor has, and by tiles in plain code where products are tested."""

import os

import pytest
import torch

from executor import native
from tests.executor.model.tolerances import DTYPES

_UNBUILT = pytest.mark.skip(reason="the native kernels are not built")
_THERE = native.paths()

# What is built of AMX's tiles is tested wherever there are none by plain code in their place, which only tests take;
# or by AMX's own instructions, where the environment says so and has them done in software.
TILES = os.environ.get("TESTED_TILES", "portable-tiles")
MOST_UNTILED = 8  # tokens; more of bfloat16 are multiplied by tiles, whose sums have another order

PATHS = _THERE or [pytest.param("none", marks=_UNBUILT)]
TILED_PATHS = [*_THERE, TILES] if _THERE else PATHS
WITH_TILES = [path for path in (*_THERE, TILES) if path in {"amx", TILES}] if _THERE else PATHS


def has_tiles(path, dtype):
    return path in WITH_TILES and dtype is torch.bfloat16


def dtypes_of(path):
    """Those in which it is no other path."""
    return (torch.bfloat16,) if path == TILES else DTYPES


TILED_CASES = (
    [(path, dtype) for path in TILED_PATHS for dtype in dtypes_of(path)]
    if _THERE
    else [pytest.param("none", torch.float32, marks=_UNBUILT)]
)


def on_threads(count, work):
    """What `work` does if torch, and so the kernels, may use that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return work()
    finally:
        torch.set_num_threads(before)
