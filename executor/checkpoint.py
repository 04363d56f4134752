"""Reads weights out of safetensors files, never unpickled."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Protocol, Self, final

import torch
from torch import Tensor

from executor.checkpoint_files import INDEX_FILE, index_file, indexed_files, read_object, unindexed_files
from executor.checkpoint_names import ACTIVATION_SCALES, AHEAD_SUFFIX, QUANTISED_NAMES, is_harmless, layer_number
from executor.errors import CheckpointError
from executor.formats import Cut, Packed, read_numbers
from executor.formats.schemes import SCHEMES, Scheme
from executor.gguf_file import GgufFile
from executor.safetensors_file import DOWNLOAD_AGAIN, DTYPES, FLOAT_DTYPES, SafetensorsFile, StoredTensor, TensorFile
from hrm.formats import PackedFormat
from hrm.hub import CONFIG_FILE
from hrm.model_spec import BUILT_IN_MODELS, decoder_keys
from hrm.model_spec.gguf import SUFFIX, read_header
from hrm.model_spec.published_dtype import with_quantisation
from hrm.model_spec.quantisation import TEXT_PREFIXES, Quantisation, quantisation

GENERATION_CONFIG_FILE: Final = "generation_config.json"
FLOATS: Final = "float64, float32, bfloat16, float16"
NAMES_TOLD: Final = 3  # of tensors that are missing or too many


class Expected(NamedTuple):
    """What a checkpoint should have under a name: a tensor of that shape, packed if it has a format for that."""

    shape: tuple[int, ...]
    packed: PackedFormat | None = None


class WeightSource(Protocol):
    """Where a family reads its weights: a checkpoint, or random numbers in its place.

    `names` are those of the tensors that are stored, a packed one's that of the whole; random numbers
    have none.
    """

    @property
    def names(self) -> Collection[str]:
        """Names of the stored tensors."""
        ...

    def read_into(self, name: str, out: Tensor, first_row: int = 0, cut: Cut | None = None) -> None:
        """Fill `out` with the tensor's rows from `first_row`, converted to the dtype of `out`.

        Whatever axes it is stored with, its rows here are as long as those of `out`, one after the
        other: of a stack of matrices first all of one, of a stack of vectors single elements. With a
        `cut` what begins there is a matrix of its shape, and `out` the part of it that is told.
        """
        ...

    def read_packed_into(self, name: str, out: Packed, first_row: int = 0, cut: Cut | None = None) -> None:
        """Fill `out` with a packed matrix, or with that of a stack of them that starts in `first_row`, exactly.

        With a `cut` it is a part of that matrix, of whole groups.
        """
        ...


class Kept(NamedTuple):
    """How a matrix is packed: what its tensors begin with, their scheme and its format."""

    module: str
    scheme: Scheme
    format: PackedFormat


@final
class Checkpoint:
    """A folder with a config.json and safetensors files, open for reading.

    The text part of a multimodal model has the names that it has on its own. `config` is
    config.json's object, its end-of-sequence and other token ids overridden by
    generation_config.json where that has them.
    """

    def __init__(self, folder: Path, config: dict[str, Any], file_of: dict[str, Path], name: str = "") -> None:
        self.folder, self.config, self._name = folder, config, name
        self._file_of = file_of
        self._open_files: dict[Path, TensorFile] = {}
        self._renamed: dict[str, str] = {}  # stored names by those that they have here

    @classmethod
    def open(cls, folder: str | Path, name: str = "") -> Self:
        """Open the checkpoint in `folder`, or a GGUF file, reading headers only. Messages have its `name`, if any.

        Raises CheckpointError if it is no folder, lacks its config or safetensors, holds a file
        that is not what its name says, or has an index that leads out of the folder.
        """
        folder = Path(folder)
        if folder.suffix == SUFFIX and folder.is_file():
            return cls._of_gguf(folder, name)
        if not folder.is_dir():
            remedy = "check the path"
            if str(folder) in BUILT_IN_MODELS:
                remedy = "built-in names have no weights: give a folder, or org/name on the Hub"
            rule = "must be a folder with a config.json and safetensors files"
            raise CheckpointError("--model", str(folder), rule, remedy)
        config = read_config(folder)
        index_path = index_file(folder)
        indexed = indexed_files(index_path) if index_path is not None else {}
        checkpoint = cls(folder, config, indexed, name)
        try:
            if index_path is None:
                checkpoint._add_files(unindexed_files(folder))
            else:
                checkpoint._check_indexed_names(index_path.name)
            checkpoint._name_text_part()
        except CheckpointError:
            checkpoint.close()
            raise
        return checkpoint

    @classmethod
    def _of_gguf(cls, path: Path, name: str) -> Self:
        """The checkpoint in a GGUF file, whose tokenizer is in the same folder."""
        header = read_header(path)
        checkpoint = cls(path.parent, header.config(), dict.fromkeys(header.tensors, path), name or str(path))
        checkpoint._open_files[path] = GgufFile(path, header)
        return checkpoint

    def close(self) -> None:
        """Close the files."""
        for file in self._open_files.values():
            file.close()
        self._open_files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def names(self) -> Collection[str]:
        """Names of the stored tensors, and of the matrices that some of them are parts of."""
        return self._names

    @cached_property
    def _names(self) -> Collection[str]:
        names = dict.fromkeys(self._file_of)
        for packing in {how.packing for _, how in self._quantisation.groups} if self._quantisation is not None else ():
            scheme = SCHEMES[packing]
            modules = (name[: -len(end)] for name in self._file_of for end in scheme.scales if name.endswith(end))
            names.update(dict.fromkeys(module + ".weight" * (not scheme.stacked) for module in modules))
        return names.keys()

    @property
    def config_path(self) -> str:
        """Where the config was read, for messages; models are named after its folder."""
        if self._name.endswith(SUFFIX):
            return self._name
        return f"{self._name.partition('@')[0]}/{CONFIG_FILE}" if self._name else str(self.folder / CONFIG_FILE)

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files that hold its tensors, sorted."""
        return sorted(set(self._file_of.values()))

    def check(self, expected: Mapping[str, Expected]) -> None:
        """Raise CheckpointError unless it holds the expected tensors and no others that matter.

        Those are floats, or packed as the config says. Axes of one element make no difference. Reads headers only.
        """
        parts: dict[str, tuple[tuple[int, ...], ...]] = {}
        dtypes: dict[str, Collection[str]] = {}
        for name, (shape, form) in expected.items():
            packed = self._packed(name, surely=form is not None and name not in self._file_of)
            if form is not None:
                packed = self._packed_as(form, name, packed)
            if packed is None:
                parts[name] = (shape,)
                continue
            module, scheme, _ = packed
            matrix = shape if len(shape) > 1 else (1, *shape)
            for part in scheme.parts(packed.format, matrix, scheme.scales_of(module, self.names)):
                if not part.optional or module + part.suffix in self._file_of:
                    parts[module + part.suffix] = part.shapes
                    dtypes[module + part.suffix] = part.dtypes
        self._check_not_quantised(parts)
        self._check_there(parts)
        for name, shapes in parts.items():
            self._check_tensor(name, shapes, dtypes.get(name))
        self._check_no_others(parts)

    def _check_tensor(self, name: str, shapes: tuple[tuple[int, ...], ...], dtypes: Collection[str] | None) -> None:
        """Raise CheckpointError unless it has one of the shapes and dtypes, which are floats if none are told."""
        told = self._told(name)
        if _without_ones(told.shape) not in [_without_ones(shape) for shape in shapes]:
            raise CheckpointError(
                self.where(name),
                f"<shape {told.shape}>",
                f"must have the shape {shapes[0]} that {CONFIG_FILE} leads to",
                "use the config.json that belongs to these weights",
            )
        if told.dtype not in (dtypes or FLOAT_DTYPES):
            rule = f"must be {' or '.join(dtypes)}" if dtypes else f"must be one of {FLOATS}"
            raise CheckpointError(self.where(name), f"<dtype {told.dtype}>", rule, "use an unquantised checkpoint")

    def _check_there(self, expected: Iterable[str]) -> None:
        missing = [name for name in expected if name not in self._file_of]
        if missing:
            raise CheckpointError(
                f"{self.folder}: {missing[0]}",
                f"<missing{_and_others(missing)}>",
                "must be among the tensors of the safetensors files",
                self._remedy_if_missing(),
            )

    def _check_no_others(self, expected: Collection[str]) -> None:
        """Raise CheckpointError naming tensors that the model should have used, for all we know."""
        others = sorted(self._others(expected))
        if others:
            raise CheckpointError(
                self.where(others[0]),
                f"<not used{_and_others([self._stored_name(name) for name in others])}>",
                f"must be tensors that a {self.config.get('model_type')} model of this {CONFIG_FILE} has",
                "use a checkpoint of a supported architecture, with its own config.json",
            )

    def _others(self, expected: Collection[str]) -> Iterator[str]:
        """Tensors that are not expected, and may not be left out as far as we know."""
        ahead, quantised = self._layers_ahead(expected), self._quantisation is not None
        for name in self._file_of:
            if name in expected or is_harmless(name, ahead):
                continue
            if not quantised or not (ACTIVATION_SCALES.search(name) or self._is_added_bias(name)):
                yield name

    def _is_added_bias(self, name: str) -> bool:
        """Whether it is noughts that a tool has added to a packed matrix, as AutoGPTQ did."""
        module = name.removesuffix(".bias")
        return module != name and self._packed(module) is not None and not self.tensor(name).any()

    def _layers_ahead(self, expected: Iterable[str]) -> set[int]:
        """Layers after the last one that predict tokens further ahead, as the config says or their tensors."""
        num_layers = max((number for name in expected if (number := layer_number(name)) is not None), default=-1) + 1
        sections = (self.config, *(part for part in self.config.values() if isinstance(part, dict)))
        told = (section.get("num_nextn_predict_layers") for section in sections)
        count = max((count for count in told if type(count) is int), default=0)
        ahead = {layer_number(name) for name in self._file_of if name.endswith(AHEAD_SUFFIX)}
        numbers = {number for name in self._file_of if (number := layer_number(name)) is not None}
        return {n for n in numbers if n >= num_layers and (n < num_layers + count or n in ahead)}

    def read_into(self, name: str, out: Tensor, first_row: int = 0, cut: Cut | None = None) -> None:
        """Fill `out` with rows of the tensor; see WeightSource. Several threads may read at once.

        Where it is packed, `out` is a matrix of it, or a part of one.
        """
        packed = self._packed(name)
        if packed is None:
            self.raw_into(name, out, first_row, cut)
            return
        module, scheme, form = packed
        cut = cut or Cut(tuple(out.shape))
        if out.ndim == 1:  # a matrix of one row
            out, cut = out[None], Cut((1, *cut.shape), 0, cut.row)
        elif scheme.stacked:
            out, cut = out.T, Cut(cut.shape[::-1], cut.column, cut.row)
        expert = first_row // cut.width
        read_numbers(form, cut, out, lambda matrix, of: scheme.read(self, module, matrix, expert, of))

    def read_packed_into(self, name: str, out: Packed, first_row: int = 0, cut: Cut | None = None) -> None:
        """Fill a packed matrix; see WeightSource. CheckpointError if it is not stored so."""
        packed = self._packed_as(out.format, name, self._packed(name))
        cut = cut or Cut(out.shape)
        assert not first_row % cut.width, (name, first_row, cut)
        packed.scheme.read(self, packed.module, out, first_row // cut.width, cut)

    def tensor(self, name: str) -> Tensor:
        """The whole tensor as stored."""
        told = self._told(name)
        out = torch.empty(told.shape, dtype=DTYPES[told.dtype])
        self.raw_into(name, out.view(-1))
        return out

    def raw_into(self, name: str, out: Tensor, first_row: int = 0, cut: Cut | None = None) -> None:
        """Fill `out` with rows of the stored tensor of that name, a part of a packed matrix or a plain one."""
        self._file(self._file_of[name]).read_into(self._stored_name(name), out, first_row, cut)

    def where(self, name: str) -> str:
        """The file of a tensor and its name there, for messages."""
        return f"{self._file_of[name]}: {self._stored_name(name)}"

    @cached_property
    def _quantisation(self) -> Quantisation | None:
        """How its weights are quantised; ModelError if they are in a way that is not read."""
        return quantisation(decoder_keys(self.config, self.config_path))

    def _packed(self, name: str, *, surely: bool = False) -> Kept | None:
        """How a matrix is packed; None if it is plain, which any may be that is not surely packed."""
        module = name.removesuffix(".weight")
        how = self._quantisation.of(module) if self._quantisation is not None else None
        if how is None:
            return None
        scheme = SCHEMES[how.packing]
        return Kept(module, scheme, how.format) if surely or scheme.is_packed(module, self.names) else None

    def _packed_as(self, form: PackedFormat, name: str, packed: Kept | None) -> Kept:
        """How it is packed, which must be in that format."""
        if packed is not None and packed.format == form:
            return packed
        told, rule = packed.format.name if packed else "plain", f"must be stored as {form.name}, as {CONFIG_FILE} says"
        raise CheckpointError(f"{self.folder}: {name}", f"<{told}>", rule, "use the config.json of these weights")

    def _told(self, name: str) -> StoredTensor:
        return self._file(self._file_of[name]).tensors[self._stored_name(name)]

    def _stored_name(self, name: str) -> str:
        return self._renamed.get(name, name)

    def _remedy_if_missing(self) -> str:
        if "tok_embeddings.weight" in self._file_of:
            return "these are named as in Mistral's own releases: use those for transformers"
        if "embed_tokens.weight" in self._file_of:
            return "these were saved without the LM head around them: save the whole model"
        return "download all files of the checkpoint, or use the config.json of these weights"

    def _file(self, path: Path) -> TensorFile:
        if path not in self._open_files:
            self._open_files[path] = SafetensorsFile(path)
        return self._open_files[path]

    def _add_files(self, paths: Iterable[Path]) -> None:
        for path in paths:
            for name in self._file(path).tensors:
                if name in self._file_of:
                    raise CheckpointError(
                        f"{path}: {name}",
                        "<a tensor>",
                        f"must not be in {self._file_of[name].name} too, as no {INDEX_FILE} says which counts",
                        "download the index, or remove the file that is not meant",
                    )
                self._file_of[name] = path

    def _check_indexed_names(self, index_name: str) -> None:
        for name, path in self._file_of.items():
            if name not in self._file(path).tensors:
                raise CheckpointError(
                    f"{path}: {name}",
                    "<missing>",
                    f"must be there as {index_name} says",
                    "download the file and the index again",
                )

    def _name_text_part(self) -> None:
        """Call the text part of a multimodal model as if it were on its own."""
        for prefix, plain in TEXT_PREFIXES:
            for name in [name for name in self._file_of if name.startswith(prefix)]:
                new = plain + name.removeprefix(prefix)
                if new not in self._file_of:
                    self._file_of[new] = self._file_of.pop(name)
                    self._renamed[new] = self._renamed.pop(name, name)

    def _check_not_quantised(self, expected: Collection[str]) -> None:
        """Raise CheckpointError naming a part of a quantised matrix of which the config does not say that it is one."""
        for name in self._others(expected):
            if QUANTISED_NAMES.search(name):
                raise CheckpointError(
                    self.where(name),
                    "<part of a quantised matrix>",
                    f"must not be there: {CONFIG_FILE} does not say that the matrix is quantised so",
                    "use the config.json that belongs to these weights, or an unquantised checkpoint",
                )


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a checkpoint with the token ids of its generation_config.json; CheckpointError if there is none."""
    config = with_quantisation(read_object(folder / CONFIG_FILE, "download the model's config.json too"), folder)
    generation_path = folder / GENERATION_CONFIG_FILE
    if generation_path.exists():
        generation = read_object(generation_path, DOWNLOAD_AGAIN)
        for key in ("bos_token_id", "eos_token_id"):
            if generation.get(key) is not None:
                config[key] = generation[key]
    return config


def _without_ones(shape: Iterable[int]) -> list[int]:
    return [size for size in shape if size != 1]


def _and_others(names: Sequence[str]) -> str:
    """A few of the names after the first."""
    told, more = ", ".join(names[1:NAMES_TOLD]), len(names) - NAMES_TOLD
    return f", as are {told}{f' and {more} more' if more > 0 else ''}" if told else ""
