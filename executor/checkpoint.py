"""Reads weights out of safetensors files, never unpickled."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Protocol, Self, final

import torch
from torch import Tensor

from executor.checkpoint_files import CONFIG_FILE, INDEX_FILE, index_file, indexed_files, read_object, unindexed_files
from executor.checkpoint_names import AHEAD_SUFFIX, QUANTISED_NAMES, TEXT_PREFIXES, is_harmless, layer_number
from executor.errors import CheckpointError
from executor.formats import Packed
from executor.safetensors_file import DOWNLOAD_AGAIN, DTYPES, SafetensorsFile, StoredTensor
from hrm.formats import PackedFormat

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

    def read_into(self, name: str, out: Tensor, first_row: int = 0) -> None:
        """Fill `out` with the tensor's rows from `first_row`, converted to the dtype of `out`.

        Whatever axes it is stored with, its rows here are as long as those of `out`, one after the
        other: of a stack of matrices first all of one, of a stack of vectors single elements.
        """
        ...

    def read_packed_into(self, name: str, out: Packed, first_row: int = 0) -> None:
        """Fill `out` with the rows of a packed matrix, or of a stack of them, from `first_row` on, exactly."""
        ...


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
        self._open_files: dict[Path, SafetensorsFile] = {}
        self._renamed: dict[str, str] = {}  # stored names by those that they have here

    @classmethod
    def open(cls, folder: str | Path, name: str = "") -> Self:
        """Open the checkpoint in `folder`, reading headers only. Messages have its `name`, if it has one.

        Raises CheckpointError if it is no folder, lacks its config or safetensors, holds a file
        that is not what its name says, or has an index that leads out of the folder.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(
                "--model", str(folder), "must be a folder with a config.json and safetensors files", "check the path"
            )
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
        """Names of the stored tensors."""
        return self._file_of.keys()

    @property
    def config_path(self) -> str:
        """Where the config was read, for messages; models are named after its folder."""
        return f"{self._name.partition('@')[0]}/{CONFIG_FILE}" if self._name else str(self.folder / CONFIG_FILE)

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files that hold its tensors, sorted."""
        return sorted(set(self._file_of.values()))

    def check(self, expected: Mapping[str, Expected]) -> None:
        """Raise CheckpointError unless it holds the expected float tensors and no others that matter.

        Axes of one element make no difference. Reads headers only.
        """
        self._check_not_quantised()
        self._check_there(expected)
        for name, (shape, _) in expected.items():
            part = self._told(name)
            where = f"{self._file_of[name]}: {self._stored_name(name)}"
            if _without_ones(part.shape) != _without_ones(shape):
                raise CheckpointError(
                    where,
                    f"<shape {part.shape}>",
                    f"must have the shape {shape} that {CONFIG_FILE} leads to",
                    "use the config.json that belongs to these weights",
                )
            if part.dtype not in DTYPES:
                raise CheckpointError(
                    where, f"<dtype {part.dtype}>", f"must be one of {FLOATS}", "use an unquantised checkpoint"
                )
        self._check_no_others(expected)

    def _check_there(self, expected: Mapping[str, Expected]) -> None:
        missing = [name for name in expected if name not in self._file_of]
        if missing:
            raise CheckpointError(
                f"{self.folder}: {missing[0]}",
                f"<missing{_and_others(missing)}>",
                "must be among the tensors of the safetensors files",
                self._remedy_if_missing(),
            )

    def _check_no_others(self, expected: Mapping[str, Expected]) -> None:
        """Raise CheckpointError naming tensors that the model should have used, for all we know."""
        ahead = self._layers_ahead(expected)
        others = sorted(name for name in self._file_of if name not in expected and not is_harmless(name, ahead))
        if others:
            raise CheckpointError(
                f"{self._file_of[others[0]]}: {self._stored_name(others[0])}",
                f"<not used{_and_others([self._stored_name(name) for name in others])}>",
                f"must be tensors that a {self.config.get('model_type')} model of this {CONFIG_FILE} has",
                "use a checkpoint of a supported architecture, with its own config.json",
            )

    def _layers_ahead(self, expected: Iterable[str]) -> set[int]:
        """Layers after the last one that predict tokens further ahead, as the config says or their tensors."""
        num_layers = max((number for name in expected if (number := layer_number(name)) is not None), default=-1) + 1
        sections = (self.config, *(part for part in self.config.values() if isinstance(part, dict)))
        told = (section.get("num_nextn_predict_layers") for section in sections)
        count = max((count for count in told if type(count) is int), default=0)
        ahead = {layer_number(name) for name in self._file_of if name.endswith(AHEAD_SUFFIX)}
        numbers = {number for name in self._file_of if (number := layer_number(name)) is not None}
        return {n for n in numbers if n >= num_layers and (n < num_layers + count or n in ahead)}

    def tensor(self, name: str) -> Tensor:
        """The whole tensor as stored."""
        told = self._told(name)
        out = torch.empty(told.shape, dtype=DTYPES[told.dtype])
        self.read_into(name, out.view(-1))
        return out

    def read_into(self, name: str, out: Tensor, first_row: int = 0) -> None:
        """Fill `out` with rows of the tensor; see WeightSource. Several threads may read at once."""
        self._file(self._file_of[name]).read_into(self._stored_name(name), out, first_row)

    def read_packed_into(self, name: str, out: Packed, first_row: int = 0) -> None:
        """Fill `out` with rows of a packed matrix; see WeightSource."""
        raise CheckpointError(
            f"{self._file_of[name]}: {self._stored_name(name)}",
            f"<{out.format.name}, rows from {first_row}>",
            "must not be quantised",
            "use an unquantised checkpoint",
        )

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

    def _file(self, path: Path) -> SafetensorsFile:
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

    def _check_not_quantised(self) -> None:
        for name, path in self._file_of.items():
            found = QUANTISED_NAMES.search(name)
            if found is not None:
                raise CheckpointError(
                    f"{path}: {name}",
                    "<part of a quantised matrix>",
                    f"must not be there: quantised weights are not read, only {FLOATS}",
                    "use an unquantised checkpoint",
                )


def read_config(folder: Path) -> dict[str, Any]:
    """The config of a checkpoint with the token ids of its generation_config.json; CheckpointError if there is none."""
    config = read_object(folder / CONFIG_FILE, "download the model's config.json too")
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
