"""Packed formats that `executor quantise` writes, for plans to name the command only where it does."""

import re
from typing import Final

from hrm.formats import packed_format

LEAST_GROUP: Final = 16  # columns that kernels multiply together: groups and blocks are of a multiple of so many
_WRITTEN: Final = re.compile(r"int4-g\d+|int8|fp8|fp8-b\d+|mxfp4")
WRITTEN: Final = (
    f"int4-gN with a group size N, int8, fp8, fp8-bN with a block size N, or mxfp4, N a multiple of {LEAST_GROUP}"
)


def is_written(name: str) -> bool:
    """Whether the command writes the format of that name."""
    form = packed_format(name)
    return form is not None and bool(_WRITTEN.fullmatch(name)) and form.columns % LEAST_GROUP == 0
