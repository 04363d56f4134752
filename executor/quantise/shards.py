"""Safetensors files that are written tensor by tensor, in any order: where each one lies is known before."""

import errno
import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Final, NamedTuple, Self, final

import torch
from torch import Tensor

from executor.safetensors_file import LENGTH_BYTES
from hrm.files import open_plain

HEADER_ALIGNMENT: Final = 8  # tensors begin at a multiple of it, as safetensors itself writes them
DTYPE_NAMES: Final = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}


class Entry(NamedTuple):
    """A tensor of a file to be: its dtype by safetensors' name, its shape and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int

    @staticmethod
    def like(tensor: Tensor, *several: int) -> "Entry":
        """One that holds such a tensor, or `several` of them."""
        return Entry(DTYPE_NAMES[tensor.dtype], (*several, *tensor.shape), prod(several) * tensor.nbytes)


@final
class Shard:
    """A new safetensors file with those tensors; a context manager. All methods raise OSError.

    All its bytes are reserved at once, so that a full disk is told before the work.
    """

    def __init__(self, path: Path, entries: Mapping[str, Entry]) -> None:
        told, end = dict[str, object](), 0
        self._starts: dict[str, int] = {}
        for name, entry in entries.items():
            self._starts[name], end = end, end + entry.num_bytes
            offsets = [self._starts[name], end]
            told[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        text = json.dumps({"__metadata__": {"format": "pt"}, **told}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % HEADER_ALIGNMENT)
        self._first = LENGTH_BYTES + len(text)
        self._handle = open_plain(path, os.O_WRONLY | os.O_EXCL)
        try:
            _reserve(self._handle, self._first + end)
            self._put(len(text).to_bytes(LENGTH_BYTES, "little") + text, 0)
        except BaseException:
            os.close(self._handle)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Have it on the disk and close it."""
        try:
            if exception[0] is None:
                os.fsync(self._handle)
        finally:
            os.close(self._handle)

    def write(self, name: str, part: Tensor, offset: int = 0) -> None:
        """Put numbers where a tensor has them from `offset` bytes on."""
        self._put(part.contiguous().view(-1).view(torch.uint8).numpy().data, self._starts[name] + self._first + offset)

    def _put(self, content: bytes | memoryview, start: int) -> None:
        rest = memoryview(content)
        while rest:
            count = os.pwrite(self._handle, rest, start)
            rest, start = rest[count:], start + count


def _reserve(handle: int, num_bytes: int) -> None:
    try:
        os.posix_fallocate(handle, 0, num_bytes)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.EOPNOTSUPP}:  # file systems that cannot
            raise
        os.ftruncate(handle, num_bytes)
