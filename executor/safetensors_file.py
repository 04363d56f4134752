"""One safetensors file: where its tensors lie in it, and their bytes, each read straight to its place."""

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from executor.errors import CheckpointError
from executor.formats import Cut
from hrm.decoding import Malformed, decode_json
from hrm.files import open_regular
from hrm.model_spec.gguf import TYPES
from hrm.units import MIB

FLOAT_DTYPES: Final = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Those and what quantised matrices are made of.
DTYPES: Final = {
    **FLOAT_DTYPES,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    **dict.fromkeys((kind.name for kind in TYPES.values() if kind.format), torch.uint8),
}
DOWNLOAD_AGAIN: Final = "download the file again"
PICKLE_STARTS: Final = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
LENGTH_BYTES: Final = 8  # of the header, before it
PART_BYTES: Final = 16 * MIB  # that are read at once of what cannot be read in place
LEAST_GAP_BYTES: Final = 8192  # between rows that are read one by one: to read as many takes as long as another call
STRIP_ROWS: Final = 64  # of a matrix that are transposed at once: as much as the caches hold


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file, as its header tells it: where its numbers begin, and how many bytes they are if it says."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int = 0


class TensorFile:
    """A file open for reading, and where its tensors lie in it."""

    def __init__(self, path: Path, what: str) -> None:
        self.path = path
        self._file = open_regular(path, what, CheckpointError, remedy=DOWNLOAD_AGAIN)
        self.tensors: dict[str, StoredTensor] = {}

    def close(self) -> None:
        """Nothing is read any more."""
        self._file.close()

    def read_into(self, name: str, out: Tensor, first_row: int, cut: Cut | None = None) -> None:
        """Fill `out` with rows of a tensor, converted to its dtype.

        Rows are as long as those of `out`, or as those of the matrix from `first_row` on that it is cut of.
        """
        if not out.numel():
            return
        told, here = self.tensors[name], cut or Cut(tuple(out.shape))
        dtype, width = DTYPES[told.dtype], prod(here.shape[1:])
        first = (first_row + here.row) * width + here.column
        assert first + (len(out) - 1) * width + prod(out.shape[1:]) <= prod(told.shape), (name, told, out.shape, here)
        start, pitch = told.start + first * dtype.itemsize, width * dtype.itemsize
        direct = out.device.type == "cpu" and out.dtype == dtype and out.is_contiguous()
        if direct and width == prod(out.shape[1:]):
            self._read(start, out)
            return
        some = max(PART_BYTES // pitch, 1)
        room = out if direct else torch.empty((min(some, len(out)), *out.shape[1:]), dtype=dtype)
        for rows in out.split(some):
            part = rows if direct else room[: len(rows)]
            self._read_rows(start, part, pitch)
            start += len(part) * pitch
            if direct:
                continue
            if rows.is_contiguous():
                rows.copy_(part)
                continue
            strips = STRIP_ROWS if out.device.type == "cpu" else len(rows)
            for strip, stored in zip(rows.split(strips), part.split(strips), strict=True):
                strip.T.copy_(stored.T.contiguous())  # what torch transposes fast is of this form

    def _read_rows(self, start: int, out: Tensor, pitch: int) -> None:
        """Fill contiguous rows with those that begin so many bytes apart in the file.

        Where little lies between them that is read too: this is faster, and it is in the same pages of the file.
        """
        row = out.nbytes // len(out)
        if row < pitch < row + LEAST_GAP_BYTES:
            whole = torch.empty((len(out) - 1) * pitch + row, dtype=torch.uint8)
            self._read(start, whole)
            out.view(len(out), -1).view(torch.uint8).copy_(whole.as_strided((len(out), row), (pitch, 1)))
        else:
            self._read(start, out, row, pitch)

    def _read(self, start: int, out: Tensor, row: int = 0, pitch: int = 0) -> None:
        """Fill a contiguous tensor with the file's bytes from `start` on, or rows of it with those so far apart."""
        memory = out.view(-1).view(torch.uint8).numpy().data
        if row == pitch:
            self._fill(memory, start)
            return
        for first in range(0, len(memory), row):
            self._fill(memory[first : first + row], start)
            start += pitch

    def _fill(self, left: memoryview, start: int) -> None:
        while left:
            try:
                count = os.preadv(self._file.fileno(), [left], start)
            except OSError as error:
                rule, told = "must be readable to its end", f"<{error.strerror or error}>"
                raise CheckpointError(str(self.path), told, rule, "check the disk") from error
            if not count:
                raise CheckpointError(str(self.path), "<cut short>", "must not change while it is read", DOWNLOAD_AGAIN)
            left, start = left[count:], start + count


@final
class SafetensorsFile(TensorFile):
    """A safetensors file, its header read; CheckpointError if it is not a whole one."""

    def __init__(self, path: Path) -> None:
        _check(path)
        super().__init__(path, "a readable safetensors file")
        self.tensors = self._header()

    def _header(self) -> dict[str, StoredTensor]:
        length = int.from_bytes(self._file.read(LENGTH_BYTES), "little")
        try:
            header: dict[str, Any] = decode_json(self._file.read(length))  # an object, as was checked
        except Malformed as error:
            self.close()
            raise CheckpointError(str(self.path), f"<{error}>", "must have a whole header", DOWNLOAD_AGAIN) from error
        header.pop("__metadata__", None)
        first = LENGTH_BYTES + length
        return {
            name: StoredTensor(told["dtype"], tuple(told["shape"]), first + start, end - start)
            for name, told in header.items()
            for start, end in (told["data_offsets"],)
        }

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The bytes of a tensor as they are stored, whatever its dtype, PART_BYTES at most at once."""
        told = self.tensors[name]
        for start in range(0, told.num_bytes, PART_BYTES):
            piece = torch.empty(min(PART_BYTES, told.num_bytes - start), dtype=torch.uint8)
            self._read(told.start + start, piece)
            yield piece


def _check(path: Path) -> None:
    """Raise CheckpointError unless the file is what its name says."""
    what, remedy = "a readable safetensors file", "download all files of the checkpoint"
    open_regular(path, what, CheckpointError, remedy=remedy).close()  # a pipe would be waited for
    try:
        safe_open(path, framework="pt")
    except OSError as error:
        raise CheckpointError(str(path), f"<{error.strerror or error}>", f"must be {what}", remedy) from error
    except SafetensorError as error:
        start = b""
        with suppress(OSError), path.open("rb") as file:
            start = file.read(4)
        if start.startswith(PICKLE_STARTS):
            raise CheckpointError(
                str(path),
                "<a pickle>",
                "must be safetensors; pickles can run code and are not read",
                "download the safetensors file or convert the checkpoint to it",
            ) from error
        raise CheckpointError(
            str(path),
            f"<{path.stat().st_size} bytes, {error}>",
            "must be a whole safetensors file (this one is truncated or damaged)",
            DOWNLOAD_AGAIN,
        ) from error
