"""How files keep a packed matrix: which tensors there are for it, and how they are read into `Packed`, exactly.

N rows, W columns, E experts, G groups in a row. Codes of fewer bits than a byte lie in words of 32 bits
or in bytes, the first one in the lowest bits, so that most packings are the bytes of ours.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Final, NamedTuple, Protocol, final

import torch
from torch import Tensor

from executor.errors import CheckpointError
from executor.formats.cut import Cut
from executor.formats.packed import Packed
from hrm.formats import PackedFormat
from hrm.model_spec.gguf import TYPES
from hrm.model_spec.quantisation import Packing

Shape = tuple[int, ...]
FLOAT_SCALES: Final = ("F32", "BF16", "F16")
WORD_BITS: Final = 32
AWQ_COLUMNS: Final = (0, 2, 4, 6, 1, 3, 5, 7)  # of eight in a word of AutoAWQ's, in the order in which they lie
DAMAGED: Final = "download the file again, or use another checkpoint"


class StoredPart(NamedTuple):
    """A tensor that a packed matrix has in a file, by what its name ends with; axes of one element do not count."""

    suffix: str
    dtypes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    optional: bool = False


class RawTensors(Protocol):
    """The tensors of files as they are stored."""

    @property
    def names(self) -> Collection[str]:
        """Their names."""
        ...

    def tensor(self, name: str) -> Tensor:
        """A whole tensor."""
        ...

    def raw_into(self, name: str, out: Tensor, first_row: int = 0, cut: Cut | None = None) -> None:
        """Fill `out`, of the stored dtype, with rows as long as its own, or as those of a matrix that it is cut of."""
        ...

    def where(self, name: str) -> str:
        """The file of a tensor and its name there, for messages."""
        ...


class Scheme(ABC):
    """One way to keep packed matrices in files; `module` is what their names begin with."""

    scales: tuple[str, ...]
    stacked: bool = False  # all experts of a layer in one tensor, as transformers stores plain ones: (E, W, N)

    def is_packed(self, module: str, names: Collection[str]) -> bool:
        """Whether the module's matrix is packed: whether its scales are there."""
        return any(module + suffix in names for suffix in self.scales)

    def scales_of(self, module: str, names: Collection[str]) -> str:
        """What the scales of a module's matrix are called."""
        return next((suffix for suffix in self.scales if module + suffix in names), self.scales[0])

    @abstractmethod
    def parts(self, form: PackedFormat, shape: Shape, scales: str) -> Iterator[StoredPart]:
        """The tensors of a matrix of that shape, or of stacked ones, whose scales are called so."""

    @abstractmethod
    def read(self, source: RawTensors, module: str, into: Packed, expert: int, cut: Cut) -> None:
        """Fill a part of a matrix, or of that of an expert of stacked ones, that has whole groups.

        CheckpointError if what is stored makes no sense.
        """


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class InRows(Scheme):
    """Codes row by row, in words of 32 bits if in `words`, which are shifted to be without signs.

    A matrix may have a factor for all of its scales, or its `reciprocal`.
    """

    codes: str = ".weight"
    scales: tuple[str, ...] = (".weight_scale",)
    factor: str = ""
    reciprocal: bool = False
    words: bool = False
    stacked: bool = False

    def parts(self, form: PackedFormat, shape: Shape, scales: str) -> Iterator[StoredPart]:
        """Codes, scales, and what the format has besides."""
        rows, width = shape[-2:]
        if self.stacked:
            rows, width = width, rows
            bytes_of = form.columns * form.code_bits // 8
            yield StoredPart(self.codes, ("U8",), ((shape[0], rows, form.groups(width), bytes_of),))
            yield StoredPart(scales, ("U8",), ((shape[0], rows, form.groups(width)),))
        else:
            bits = WORD_BITS if self.words else 8
            yield StoredPart(self.codes, (self._dtype(form),), ((rows, -(-width * form.code_bits // bits)),))
            yield StoredPart(scales, *_scales_told(form, rows, width))
        if form.row_scales:
            yield StoredPart(self.factor, ("F32",), ((),))
        if form.zeros:
            packed = -(-rows * form.code_bits // WORD_BITS)
            yield StoredPart(".weight_zero_point", ("I32",), ((packed, form.groups(width)),))
        if form.ordered:
            yield StoredPart(".weight_g_idx", ("I32", "I64"), ((width,),))
        if self.words:
            yield StoredPart(".weight_shape", ("I64", "I32"), ((2,),), optional=True)

    def _dtype(self, form: PackedFormat) -> str:
        return "I32" if self.words else {"fp8": "F8_E4M3", "int8": "I8"}.get(form.code, "U8")

    def read(self, source: RawTensors, module: str, into: Packed, expert: int, cut: Cut) -> None:
        """Codes straight to where they stay."""
        rows, form = into.shape[0], into.format
        first_row = expert * cut.shape[0] if self.stacked else 0
        self._read_codes(source, module + self.codes, into, first_row, cut)
        scales, groups = module + self.scales_of(module, source.names), _Groups.of(into, cut)
        if self.stacked:
            of_expert = torch.empty(into.scales.shape, dtype=torch.uint8)
            source.raw_into(scales, of_expert, first_row, Cut(groups.shape, groups.rows.start, groups.columns.start))
            fill_scales(source, scales, of_expert, into)
        else:
            fill_scales(source, scales, groups.within(source.tensor(scales)), into)
        if into.row_scales is not None:
            factor = source.tensor(module + self.factor).float().reshape(1, 1)
            factor = _finite(source, module + self.factor, 1 / factor if self.reciprocal else factor)
            into.row_scales.copy_(factor.expand(rows, 1))
        if into.zeros is not None:
            along_rows = _matrix(source, module + ".weight_zero_point", -1, groups.shape[1]).T.contiguous()
            of_rows = _nibbles(along_rows)[:, cut.row : cut.row + rows]
            into.zeros.copy_(of_rows[groups.columns].T)
        if form.ordered:
            fill_order(source, module + ".weight_g_idx", into)
        shape = module + ".weight_shape"
        if self.words and shape in source.names and source.tensor(shape).tolist() != list(cut.shape):
            told = f"<{source.tensor(shape).tolist()}>"
            raise CheckpointError(source.where(shape), told, f"must be {list(cut.shape)}", DAMAGED)

    def _read_codes(self, source: RawTensors, name: str, into: Packed, first_row: int, cut: Cut) -> None:
        (height, breadth), dtype = into.codes.shape, _TORCH[self._dtype(into.format)]
        codes, size, bits = into.codes, dtype.itemsize, into.format.code_bits
        first, words = cut.column * bits // 8, -(-cut.width * bits // (8 * size))
        if first % size or breadth % size:  # words have bytes that are not ours
            whole = _matrix(source, name, cut.shape[0])
            codes.copy_(whole.view(torch.uint8)[cut.row :, first:][:height, :breadth])
        else:
            source.raw_into(name, codes.view(dtype), first_row, Cut((cut.shape[0], words), cut.row, first // size))
        if self.words and into.format.code == "int8":
            codes.bitwise_xor_(0x80)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class InColumns(Scheme):
    """GPTQ's and AWQ's: the matrix on its side (W, N), groups of zeros and scales (G, N), all in words.

    GPTQ's words run along W and zeros along N, and AWQ's both along N, in an order of its own
    (`interleaved`). GPTQ's zeros are less by `zeros_less`.
    """

    interleaved: bool = False
    zeros_less: int = 0
    scales: tuple[str, ...] = (".scales",)

    def parts(self, form: PackedFormat, shape: Shape, scales: str) -> Iterator[StoredPart]:
        """Codes, zeros, scales and the groups of columns."""
        (rows, width), groups = shape, form.groups(shape[1])
        in_words, row_words = (-(-size * form.code_bits // WORD_BITS) for size in (width, rows))
        yield StoredPart(".qweight", ("I32",), ((width, row_words) if self.interleaved else (in_words, rows),))
        yield StoredPart(".qzeros", ("I32",), ((groups, row_words),))
        yield StoredPart(scales, FLOAT_SCALES, ((groups, rows),))
        if not self.interleaved:
            yield StoredPart(".g_idx", ("I32", "I64"), ((width,),), optional=not form.ordered)

    def read(self, source: RawTensors, module: str, into: Packed, expert: int, cut: Cut) -> None:  # noqa: ARG002 - of stacks
        """Turn codes and groups over."""
        width, form, groups = cut.width, into.format, _Groups.of(into, cut)
        self._read_codes(source, module + ".qweight", into, cut)
        if form.code == "int8":
            into.codes.bitwise_xor_(0x80)
        self._read_zeros(source, module + ".qzeros", into, groups)
        scales = module + ".scales"
        fill_scales(source, scales, groups.within(_matrix(source, scales, *groups.shape[::-1]).T), into)
        order = module + ".g_idx"
        if form.ordered:
            fill_order(source, order, into)
        elif order in source.names:
            plain = torch.arange(width) // (form.columns or width)
            if not source.tensor(order).equal(plain.to(source.tensor(order).dtype)):
                rule = "must have columns in the order of their groups, as config.json says by desc_act"
                raise CheckpointError(source.where(order), "<another order>", rule, "set desc_act to true")

    def _read_codes(self, source: RawTensors, name: str, into: Packed, cut: Cut) -> None:
        """Those words that have any of ours, along columns or along rows."""
        (rows, width), bits = into.shape, into.format.code_bits
        in_word = WORD_BITS // bits
        if self.interleaved:
            words, ahead = -(-cut.shape[0] // in_word), cut.row % in_word
            stored = torch.empty(width, -(-(ahead + rows) // in_word), dtype=torch.int32)
            source.raw_into(name, stored, 0, Cut((cut.width, words), cut.column, cut.row // in_word))
            codes = into.codes if not ahead else torch.empty(ahead + rows, into.codes.shape[1], dtype=torch.uint8)
            _fill_from_columns(stored, codes)
            if ahead:
                into.codes.copy_(codes[ahead:])
        else:
            words, ahead = -(-cut.width // in_word), cut.column % in_word
            stored = torch.empty(-(-(ahead + width) // in_word), rows, dtype=torch.int32)
            source.raw_into(name, stored, 0, Cut((words, cut.shape[0]), cut.column // in_word, cut.row))
            of_rows = stored.T.contiguous().view(torch.uint8)
            into.codes.copy_(of_rows[:, ahead * bits // 8 :][:, : into.codes.shape[1]])

    def _read_zeros(self, source: RawTensors, name: str, into: Packed, groups: "_Groups") -> None:
        stored, bits = _matrix(source, name, groups.shape[1]), into.format.code_bits
        if self.interleaved:
            zeros = _columns(stored)
        else:
            packed = stored.contiguous()
            zeros = _nibbles(packed) if bits == 4 else packed.view(torch.uint8)
        zeros = (zeros[groups.columns, groups.rows] + self.zeros_less & (1 << bits) - 1).T
        if into.zeros is not None:
            into.zeros.copy_(zeros)
        elif (zeros != 1 << bits - 1).any():
            rule = f"must have zero points of {1 << bits - 1}, as config.json says by sym"
            raise CheckpointError(source.where(name), "<other zero points>", rule, "set sym to false")


@final
class InBlocks(Scheme):
    """GGUF's: scale and codes of 32 numbers beside one another; of half bytes, the low ones come first."""

    scales = (".weight",)

    def parts(self, form: PackedFormat, shape: Shape, scales: str) -> Iterator[StoredPart]:
        """One tensor of rows of bytes."""
        rows, width = shape
        kind = _BLOCK_TYPES[form.name]
        yield StoredPart(scales, (kind.name,), ((rows, -(-width // kind.size) * kind.num_bytes),))

    def read(self, source: RawTensors, module: str, into: Packed, expert: int, cut: Cut) -> None:  # noqa: ARG002 - of stacks
        """Take blocks apart."""
        form, name, (rows, width) = into.format, module + ".weight", into.shape
        kind = _BLOCK_TYPES[form.name]
        stored = torch.empty(rows, form.groups(width) * kind.num_bytes, dtype=torch.uint8)
        whole = cut.shape[0], form.groups(cut.width) * kind.num_bytes
        source.raw_into(name, stored, 0, Cut(whole, cut.row, cut.column // kind.size * kind.num_bytes))
        blocks = stored.unflatten(1, (-1, kind.num_bytes))
        of_scale = kind.num_bytes - kind.size * form.code_bits // 8
        scales = blocks[..., :of_scale].contiguous()
        fill_scales(source, name, scales if form.scale == "e8m0" else scales.view(torch.float16), into)
        codes = blocks[..., of_scale:]
        if form.code_bits == 4:
            each = torch.cat([codes & 15, codes >> 4], dim=-1)
            codes = each[..., ::2] | each[..., 1::2] << 4
        into.codes.copy_(codes.flatten(1))


class _Groups(NamedTuple):
    """Which of a matrix's groups, of that shape, are those of a part of it."""

    shape: tuple[int, int]
    rows: slice
    columns: slice

    @staticmethod
    def of(into: Packed, cut: Cut) -> "_Groups":
        form, (height, breadth) = into.format, into.scales.shape
        row, column = cut.row // form.rows, cut.column // form.columns if form.columns else 0
        shape = -(-cut.shape[0] // form.rows), form.groups(cut.width)
        return _Groups(shape, slice(row, row + height), slice(column, column + breadth))

    def within(self, stored: Tensor) -> Tensor:
        """Of what is stored for all groups that of these; what stands for all of them as it is."""
        return stored.reshape(self.shape)[self.rows, self.columns] if stored.numel() == prod(self.shape) else stored


_BLOCK_TYPES: Final = {kind.format: kind for kind in TYPES.values() if kind.format}
SCHEMES: Final[Mapping[Packing, Scheme]] = {
    Packing.FP8: InRows(scales=(".weight_scale_inv", ".weight_scale")),
    Packing.MXFP4: InRows(codes="_blocks", scales=("_scales",), stacked=True),
    Packing.GPTQ: InColumns(zeros_less=1),
    Packing.GPTQ_V2: InColumns(),
    Packing.AWQ: InColumns(interleaved=True),
    Packing.PACKED_INT: InRows(codes=".weight_packed", words=True),
    Packing.PLAIN_INT: InRows(),
    Packing.PLAIN_FLOAT: InRows(),
    Packing.PACKED_NVFP4: InRows(codes=".weight_packed", factor=".weight_global_scale", reciprocal=True),
    Packing.PACKED_MXFP4: InRows(codes=".weight_packed"),
    Packing.MODELOPT: InRows(factor=".weight_scale_2"),
    Packing.GGUF: InBlocks(),
}

_TORCH: Final = {"I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn, "I8": torch.int8, "U8": torch.uint8}


def _scales_told(form: PackedFormat, rows: int, width: int) -> tuple[tuple[str, ...], tuple[Shape, ...]]:
    """The dtypes and shapes that scales may have of matrices of that shape; one for a whole matrix will do for rows."""
    if form.scale in ("e8m0", "e4m3"):
        dtypes = ("F8_E4M3",) if form.scale == "e4m3" else ("U8", "F8_E8M0")
    else:
        dtypes = (*FLOAT_SCALES, "F8_E8M0")
    each = (-(-rows // form.rows), form.groups(width))
    return dtypes, (each, ()) if not form.columns else (each,)


def _matrix(source: RawTensors, name: str, rows: int, width: int = -1) -> Tensor:
    """A stored matrix of so many rows, or of that width; files may leave out an axis of one element."""
    return source.tensor(name).reshape(rows, width)


def fill_scales(source: RawTensors, name: str, stored: Tensor, into: Packed) -> None:
    """Fill scales from what is stored, whose dtype must not lose anything in that of ours."""
    shape, form = into.scales.shape, into.format
    if form.scale in ("e8m0", "e4m3"):
        bits = stored.contiguous().view(torch.uint8)
        no_number = bits == 255 if form.scale == "e8m0" else bits & 127 == 127
        _check(source, name, no_number)
        into.scales.copy_(bits.reshape(shape))
        return
    values = _finite(source, name, stored.float())
    kept = values.to(into.scales.dtype)
    if not kept.float().equal(values):
        told = f"<{stored.dtype} beyond {into.scales.dtype}>".replace("torch.", "")
        rule = f"must have scales that {form.name} can hold, which config.json leads to"
        raise CheckpointError(source.where(name), told, rule, "set its torch_dtype to that of the scales")
    into.scales.copy_(kept.reshape(shape) if kept.numel() == into.scales.numel() else kept.expand(shape))


def fill_order(source: RawTensors, name: str, into: Packed) -> None:
    """Fill the group of each column, which must be one that there is."""
    assert into.order is not None
    order, groups = source.tensor(name), into.format.groups(into.shape[-1])
    if order.min() < 0 or order.max() >= groups:
        told = f"<{int(order.min())} to {int(order.max())}>"
        raise CheckpointError(source.where(name), told, f"must be numbers of {groups} groups", DAMAGED)
    into.order.copy_(order.reshape(1, -1))


def _finite(source: RawTensors, name: str, values: Tensor) -> Tensor:
    _check(source, name, ~values.isfinite())
    return values


def _check(source: RawTensors, name: str, no_number: Tensor) -> None:
    if no_number.any():
        told = f"<{int(no_number.sum())} scales that are no numbers>"
        raise CheckpointError(source.where(name), told, "must be finite", DAMAGED)


def _nibbles(words: Tensor) -> Tensor:
    """The numbers of four bits in rows of words, the lowest first."""
    halves = words.view(torch.uint8)
    return torch.stack([halves & 15, halves >> 4], dim=-1).flatten(-2)


def _columns(words: Tensor) -> Tensor:
    """The columns that AWQ's words hold, in order."""
    stored = _nibbles(words).unflatten(-1, (-1, len(AWQ_COLUMNS)))
    columns = torch.empty_like(stored)
    columns[..., list(AWQ_COLUMNS)] = stored
    return columns.flatten(-2)


def _fill_from_columns(words: Tensor, codes: Tensor) -> None:
    """Fill codes from AWQ's words (W, N in words): of each column's numbers two to a byte."""
    even, odd = words.view(torch.uint8).unflatten(0, (-1, 2)).unflatten(-1, (-1, 4)).unbind(1)
    halves = even & 15 | odd << 4, even >> 4 | odd & 0xF0
    for place, column in enumerate(AWQ_COLUMNS):
        rows = codes[column :: len(AWQ_COLUMNS)]
        rows.copy_(halves[place % 2][..., place // 2].T[: len(rows)])
