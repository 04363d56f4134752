"""The compiled module, and which numbers it takes."""

from functools import cache
from importlib import import_module
from typing import Any, Final

import torch

DTYPES: Final = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@cache
def module() -> Any:
    """The compiled module, or None where it was not built."""
    try:
        return import_module("executor.native._kernels")
    except ModuleNotFoundError:
        return None
