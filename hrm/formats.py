"""How numbers are stored: the bytes of weights, of the KV cache, and of what is computed with.

A format knows its bytes, and nothing else does. What is asked for is told as the sizes of a tensor,
one after the other, or as a single number of elements.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Final, NamedTuple, overload

from hrm.numeric import Number

# What lies in memory as one begins and ends at a multiple of this: kernels read so many bytes at once.
ALIGNMENT_BYTES: Final = 16


def aligned(num_bytes: int) -> int:
    """So many bytes and what fills them up to where the next thing may begin."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store numbers, in which every element has a size of its own.

    Of elements of several formats together the size is a mean, and may be a fraction. If some have to be
    written out as plain numbers before they are used, so many bytes are moved and kernels launched for each.
    Where most are packed, `code` is that of the packed ones.
    """

    name: str
    element_bytes: float
    code: str = ""
    written_out_bytes: float = 0.0
    written_out_launches: float = 0.0

    @overload
    def bytes_of(self, *sizes: int) -> int: ...

    @overload
    def bytes_of(self, *sizes: Number) -> Number: ...

    def bytes_of(self, *sizes: Number) -> Number:
        """Bytes of a tensor of these sizes, a whole number unless the format is a mean of several.

        A single size is a number of elements.
        """
        num_bytes: Number = self.element_bytes
        for size in sizes:
            num_bytes = num_bytes * size
        return num_bytes

    def elements_in(self, num_bytes: int) -> int:
        """How many whole elements so many bytes hold."""
        return int(num_bytes // self.element_bytes)


FORMATS: Final[Mapping[str, Format]] = {
    row.name: row for row in (Format("float32", 4), Format("bfloat16", 2), Format("float16", 2))
}


@dataclass(frozen=True, slots=True)
class KvFormat:
    """How a token lies in a KV cache: in plain numbers, or in codes of a byte that a head has a scale for.

    `codes` is the dtype that they have in torch. With it a token's row has the codes of all its parts, one part after
    the other, and from `scales_at` on a scale for each part; both are filled up to ALIGNMENT_BYTES, so that rows are
    read in whole vectors. A part is what one head has of keys or values. Scales are bfloat16: it has the range of
    float32, and as codes are made with the scale that is stored, its few digits cost next to nothing.
    """

    name: str
    element_bytes: int
    codes: str = ""

    @property
    def is_scaled(self) -> bool:
        """Whether numbers are codes that need their scale."""
        return bool(self.codes)

    def row_bytes(self, parts: Sequence[int]) -> int:
        """Bytes of a token's row, whose parts have so many elements."""
        if self.is_scaled:
            return scales_at(parts) + aligned(_DTYPE_BYTES[KV_SCALES] * len(parts))
        return self.element_bytes * sum(parts)


KV_SCALES: Final = "bfloat16"


def scales_at(parts: Sequence[int]) -> int:
    """The byte at which a row's scales begin, whose parts have so many codes."""
    return aligned(sum(parts))


SCALED_KV_FORMATS: Final[Mapping[str, KvFormat]] = {
    row.name: row for row in (KvFormat("fp8", 1, codes="float8_e4m3fn"), KvFormat("int8", 1, codes="int8"))
}


def kv_format(name: str) -> KvFormat | None:
    """The format of a KV cache by that name; None if there is none.

    It may be any of FORMATS or of SCALED_KV_FORMATS.
    """
    plain = FORMATS.get(name)
    return SCALED_KV_FORMATS.get(name) if plain is None else KvFormat(name, int(plain.element_bytes))


class PackedPart(NamedTuple):
    """A part of a packed matrix, by the names that dtypes have in torch."""

    name: str
    dtype: str
    shape: tuple[int, int]

    @property
    def num_bytes(self) -> int:
        """Its bytes."""
        return prod(self.shape) * _DTYPE_BYTES[self.dtype]


_DTYPE_BYTES: Final = {"uint8": 1, "int8": 1, "int32": 4, "float32": 4, "bfloat16": 2, "float16": 2}
_CODE_BITS: Final = {"fp8": 8, "int8": 8, "int4": 4, "fp4": 4}
_SCALES: Final = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "e8m0": "uint8", "e4m3": "uint8"}
_NAME: Final = re.compile(
    rf"(?P<code>{'|'.join(_CODE_BITS)})(-b(?P<block>\d+))?(-g(?P<group>\d+))?(-(?P<scale>{'|'.join(_SCALES)}))?"
    r"(?P<zeros>-z)?(?P<row_scales>-r)?(?P<ordered>-o)?"
)
# The short names under which people know some of them.
_KNOWN_AS: Final = {"mxfp4": "fp4-g32-e8m0", "nvfp4": "fp4-g16-e4m3-r"}
_SHORT: Final = {full: short for short, full in _KNOWN_AS.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedFormat:
    """Matrices (N, W) of narrow numbers, of which groups share a scale.

    `code` is what a weight is: fp8 (e4m3), int8, or two to a byte, the even column in its low half: int4
    (0 to 15, for -8 to 7 if there are no zeros) or fp4 (e2m1). A group is `rows` × `columns` of them,
    where 0 columns are a whole row; the last ones of a matrix may be smaller. A weight is its code,
    less the group's zero point if there are `zeros` (a byte each), times the group's scale, which is
    stored as `scale` says, times the row's float32 one if there are `row_scales`. With `ordered`,
    each column says (int32) which of the groups it belongs to.
    """

    code: str
    rows: int = 1
    columns: int = 0
    scale: str = "f32"
    zeros: bool = False
    row_scales: bool = False
    ordered: bool = False

    @property
    def name(self) -> str:
        """How it is called in files and on the command line."""
        group = f"-b{self.columns}" if self.rows > 1 else f"-g{self.columns}" if self.columns else ""
        plain = "f32" if self.rows > 1 or not self.columns else "bf16"
        scale = f"-{self.scale}" if self.scale != plain else ""
        marks = "-z" * self.zeros + "-r" * self.row_scales + "-o" * self.ordered
        full = f"{self.code}{group}{scale}{marks}"
        return _SHORT.get(full, full)

    @property
    def code_bits(self) -> int:
        """Bits of a weight without its share of scales."""
        return _CODE_BITS[self.code]

    def groups(self, width: int) -> int:
        """Groups beside one another in a row of so many columns."""
        return -(-width // self.columns) if self.columns else 1

    def takes(self, shape: tuple[int, ...], parts: Sequence[int] = ()) -> bool:
        """Whether a tensor can be stored so: it is a matrix of whole bytes a row.

        What it joins, `parts` of its rows, has to have whole groups.
        """
        whole = all(part % self.rows == 0 for part in parts[:-1])
        return len(shape) == 2 and shape[1] * self.code_bits % 8 == 0 and whole

    def parts(self, num_rows: int, width: int) -> tuple[PackedPart, ...]:
        """The parts of a matrix in the order in which they lie in memory, each aligned."""
        groups = self.groups(width)
        shape = -(-num_rows // self.rows), groups
        parts = [
            PackedPart("codes", "uint8", (num_rows, width * self.code_bits // 8)),
            PackedPart("scales", _SCALES[self.scale], shape),
        ]
        if self.zeros:
            parts.append(PackedPart("zeros", "uint8", shape))
        if self.row_scales:
            parts.append(PackedPart("row_scales", "float32", (num_rows, 1)))
        if self.ordered:
            parts.append(PackedPart("order", "int32", (1, width)))
        return tuple(parts)

    @cache  # noqa: B019 - there are few formats, and they stay
    def bytes_of(self, num_rows: int, width: int) -> int:
        """Bytes of a matrix."""
        return sum(aligned(part.num_bytes) for part in self.parts(num_rows, width))


def packed_format(name: str) -> PackedFormat | None:
    """The packed format of that name; None if there is none.

    `fp8` and `int8` have one scale a row, fp8-b128 one for each 128 × 128 weights, int4-g32 one for each
    32 of a row; `mxfp4` and `nvfp4` are as the standards say. Scales are float32 for rows and blocks and
    bfloat16 for groups, if the name does not say another (int4-g128-f16); -z, -r and -o add zero
    points, scales of rows and an order of columns.
    """
    found = _NAME.fullmatch(_KNOWN_AS.get(name, name))
    if found is None or (found["block"] and found["group"]):
        return None
    columns = int(found["block"] or found["group"] or 0)
    made = PackedFormat(
        code=found["code"],
        rows=int(found["block"] or 1),
        columns=columns,
        scale=found["scale"] or ("bf16" if found["group"] else "f32"),
        zeros=bool(found["zeros"]),
        row_scales=bool(found["row_scales"]),
        ordered=bool(found["ordered"]),
    )
    return made if made.name == name and columns <= MOST_GROUPED else None


# What most people use of each code; it stands for all of the code where their products are measured.
USUAL_FORMATS: Final[Mapping[str, str]] = {"fp8": "fp8", "int8": "int8", "int4": "int4-g32", "fp4": "mxfp4"}
USUAL_PACKED: Final = tuple(USUAL_FORMATS.values())
MOST_GROUPED: Final = 1 << 16  # columns of a group; any more are a mistake


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """The formats of a plan.

    `weights` are parameters as they lie in memory and cross the link, where a model does not say that
    they are packed. `kv_cache` is keys and values from when they leave for the cache, so also on their
    way over the link; states are none. `compute` is the dtype of hidden states, queries, activations and
    logits, and the one whose GEMM rate counts.
    """

    weights: Format
    kv_cache: KvFormat
    compute: Format

    def numbers_bytes(self, parts: Sequence[int]) -> int:
        """Bytes of a token's cached parts as numbers: as they lie in the cache, or as its codes mean them."""
        return self.compute.bytes_of(sum(parts)) if self.kv_cache.is_scaled else self.kv_cache.row_bytes(parts)

    @staticmethod
    def of(dtype: str) -> "Formats":
        """One dtype for all three."""
        return Formats.named(dtype)

    @staticmethod
    @cache
    def named(dtype: str, *, weights: str = "", kv_cache: str = "") -> "Formats":
        """The dtype that is computed in, and for the others the same where no name is given."""
        cached = kv_format(kv_cache or dtype)
        assert cached is not None, kv_cache
        return Formats(weights=FORMATS[weights or dtype], kv_cache=cached, compute=FORMATS[dtype])
