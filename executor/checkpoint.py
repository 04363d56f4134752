"""Reads weights out of safetensors files, memory-mapped and never unpickled."""

import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Final, Protocol, Self, final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from executor.errors import CheckpointError
from hrm.decoding import read_json_object
from hrm.files import open_regular

CONFIG_FILE: Final = "config.json"
GENERATION_CONFIG_FILE: Final = "generation_config.json"
INDEX_FILE: Final = "model.safetensors.index.json"
SINGLE_FILE: Final = "model.safetensors"
PICKLE_SUFFIXES: Final = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
PICKLE_STARTS: Final = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
DTYPES: Final = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Buffers that follow from the config; old checkpoints carry them along.
IGNORED_SUFFIXES: Final = (
    ".rotary_emb.inv_freq",
    ".rotary_emb.original_inv_freq",
    ".rotary_emb.cos_cached",
    ".rotary_emb.sin_cached",
    ".rope.freqs",
)
# What the parts of a quantised matrix are called, by the tools that write them.
QUANTISED_NAMES: Final = re.compile(
    r"\.(?P<part>qweight|qzeros|g_idx|scales|biases|weight_packed|weight_scale|weight_scale_inv"
    r"|weight_scale_2|weight_zero_point|input_scale|k_scale|v_scale|absmax|quant_map|SCB"
    r"|\w+_blocks|\w+_scales)$|\.(?P<state>quant_state\.\w+)$"
)

DOWNLOAD_AGAIN: Final = "download the file again"


class WeightSource(Protocol):
    """Where a family reads its weights: a checkpoint, or random numbers in its place.

    `names` are those of the tensors that are stored; random numbers have none.
    """

    @property
    def names(self) -> Collection[str]:
        """Names of the stored tensors."""
        ...

    def read_into(self, name: str, out: Tensor, first_row: int = 0) -> None:
        """Fill `out` with the tensor's rows from `first_row`, converted to the dtype of `out`.

        A tensor of several matrices has the rows of one after those of the other; `out` lies
        within one of them.
        """
        ...


@final
class Checkpoint:
    """A folder with a config.json and safetensors files, open for reading.

    `config` is config.json's object, its end-of-sequence and other token ids overridden by
    generation_config.json where that has them.
    """

    def __init__(self, folder: Path, config: dict[str, Any], file_of: dict[str, Path]) -> None:
        self.folder, self.config = folder, config
        self._file_of = file_of
        self._open_files: dict[Path, Any] = {}

    @classmethod
    def open(cls, folder: str | Path) -> Self:
        """Open the checkpoint in `folder`, reading headers only.

        Raises CheckpointError if it is no folder, lacks its config or safetensors, holds a file
        that is not what its name says, or has an index that leads out of the folder.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(
                "--model", str(folder), "must be a folder with a config.json and safetensors files", "check the path"
            )
        config = _read_object(folder / CONFIG_FILE, "download the model's config.json too")
        generation_path = folder / GENERATION_CONFIG_FILE
        if generation_path.exists():
            generation = _read_object(generation_path, DOWNLOAD_AGAIN)
            for key in ("bos_token_id", "eos_token_id"):
                if generation.get(key) is not None:
                    config[key] = generation[key]
        index_path = _index_file(folder)
        indexed = _indexed_files(index_path) if index_path is not None else {}
        checkpoint = cls(folder, config, indexed)
        try:
            if index_path is None:
                checkpoint._add_files(_unindexed_files(folder))
            else:
                checkpoint._check_indexed_names(index_path.name)
        except CheckpointError:
            checkpoint.close()
            raise
        return checkpoint

    def close(self) -> None:
        """Unmap the files; tensors handed out stay valid."""
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
        """Where the config was read, for messages."""
        return str(self.folder / CONFIG_FILE)

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files that hold its tensors, sorted."""
        return sorted(set(self._file_of.values()))

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise CheckpointError unless it holds the expected float tensors and no others.

        Reads headers only.
        """
        self._check_not_quantised()
        for name, shape in expected.items():
            part = self._slice(name)
            where = f"{self._file_of[name]}: {name}"
            if tuple(part.get_shape()) != shape:
                raise CheckpointError(
                    where,
                    f"<shape {tuple(part.get_shape())}>",
                    f"must have the shape {shape} that {CONFIG_FILE} leads to",
                    "use the config.json that belongs to these weights",
                )
            if part.get_dtype() not in DTYPES:
                raise CheckpointError(
                    where,
                    f"<dtype {part.get_dtype()}>",
                    f"must be one of {', '.join(DTYPES.values())}",
                    "use an unquantised checkpoint",
                )
        for name in self._file_of.keys() - expected.keys():
            if not name.endswith(IGNORED_SUFFIXES):
                raise CheckpointError(
                    f"{self._file_of[name]}: {name}",
                    "<a tensor>",
                    f"must be one that a {self.config.get('model_type')} model of this {CONFIG_FILE} has",
                    "use a checkpoint of a supported architecture",
                )

    def tensor(self, name: str) -> Tensor:
        """The whole tensor as stored, mapped from its file; CheckpointError if it is missing."""
        return self._slice(name)[:]

    def read_into(self, name: str, out: Tensor, first_row: int = 0) -> None:
        """Fill `out` with the tensor's rows from `first_row`, converted to the dtype of `out`.

        A tensor of several matrices has the rows of one after those of the other; `out` lies
        within one of them.
        """
        stored, matrix = self._slice(name), ()
        if len(shape := stored.get_shape()) > 2:
            matrix, first_row = (first_row // shape[1],), first_row % shape[1]
        rows = stored[(*matrix, slice(first_row, first_row + out.shape[0]))]
        assert rows.shape == out.shape, (name, rows.shape, out.shape)
        out.copy_(rows)

    def _slice(self, name: str) -> Any:
        path = self._file_of.get(name)
        if path is None:
            raise CheckpointError(
                f"{self.folder}: {name}",
                "<missing>",
                "must be among the tensors of the safetensors files",
                self._remedy_if_missing(),
            )
        return self._file(path).get_slice(name)

    def _remedy_if_missing(self) -> str:
        if "tok_embeddings.weight" in self._file_of:
            return "these are named as in Mistral's own releases: use those for transformers"
        if "embed_tokens.weight" in self._file_of:
            return "these were saved without the LM head around them: save the whole model"
        return "download all files of the checkpoint, or use the config.json of these weights"

    def _file(self, path: Path) -> Any:
        if path not in self._open_files:
            self._open_files[path] = _open_safetensors(path)
        return self._open_files[path]

    def _add_files(self, paths: Iterable[Path]) -> None:
        for path in paths:
            for name in self._file(path).keys():  # noqa: SIM118 - no dictionary
                if name in self._file_of:
                    raise CheckpointError(
                        f"{path}: {name}",
                        "<a tensor>",
                        f"must not be in {self._file_of[name].name} too, as no {INDEX_FILE} says which counts",
                        "download the index, or remove the file that is not meant",
                    )
                self._file_of[name] = path

    def _check_indexed_names(self, index_name: str) -> None:
        names_in = {path: set(self._file(path).keys()) for path in set(self._file_of.values())}
        for name, path in self._file_of.items():
            if name not in names_in[path]:
                raise CheckpointError(
                    f"{path}: {name}",
                    "<missing>",
                    f"must be there as {index_name} says",
                    "download the file and the index again",
                )

    def _check_not_quantised(self) -> None:
        for name, path in self._file_of.items():
            found = QUANTISED_NAMES.search(name)
            if found is not None:
                raise CheckpointError(
                    f"{path}: {name}",
                    "<part of a quantised matrix>",
                    f"must not be there: quantised weights are not read, only {', '.join(DTYPES.values())}",
                    "use an unquantised checkpoint",
                )


def _read_object(path: Path, remedy: str) -> dict[str, Any]:
    return read_json_object(path, "a readable JSON file", CheckpointError, remedy=remedy)


def _indexed_files(index_path: Path) -> dict[str, Path]:
    weight_map = _read_object(index_path, DOWNLOAD_AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index_path}: weight_map",
            "<missing>" if weight_map is None else weight_map,
            "must map names of tensors to names of files",
            DOWNLOAD_AGAIN,
        )
    for name, file in weight_map.items():
        relative = PurePosixPath(file) if isinstance(file, str) else None
        if (
            relative is None
            or relative.suffix != ".safetensors"
            or relative.is_absolute()
            or ".." in relative.parts
            or "\\" in str(relative)
            or not file.isprintable()
        ):
            raise CheckpointError(
                f"{index_path}: weight_map: {name}",
                file,
                "must be a safetensors file inside the checkpoint's folder",
                "use an index that you trust",
            )
    return {name: index_path.parent / file for name, file in weight_map.items()}


def _index_file(folder: Path) -> Path | None:
    """The index of a sharded checkpoint; None if its one file or its shards are read without.

    As in transformers, `model.safetensors` counts before an index.
    """
    if (folder / SINGLE_FILE).exists():
        return None
    path = folder / INDEX_FILE
    others = sorted(folder.glob("*.safetensors.index.json"))
    if path.exists() or not others:
        return path if path.exists() else None
    if len(others) > 1:
        raise CheckpointError(
            f"{folder}: weights",
            f"<{', '.join(other.name for other in others)}>",
            f"must have one index, best named {INDEX_FILE}",
            "keep the one that is meant",
        )
    return others[0]


def _unindexed_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint without an index, whatever they are called."""
    path = folder / SINGLE_FILE
    if path.exists():
        return [path]
    paths = sorted(folder.glob("*.safetensors"))
    # Mistral's releases have all weights a second time, under names of their own.
    paths = [path for path in paths if not path.name.startswith("consolidated")] or paths
    if paths:
        _check_shards(folder, paths)
        return paths
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"{folder}: weights",
            pickles[0],
            "must be safetensors; pickles can run code and are not read",
            "download the safetensors files or convert the checkpoint to them",
        )
    raise CheckpointError(
        f"{folder}: weights",
        "<missing>",
        f"must be in {SINGLE_FILE}, or in files that {INDEX_FILE} lists",
        "download the safetensors files and their index",
    )


def _check_shards(folder: Path, paths: list[Path]) -> None:
    """Refuse an adapter in place of a model, and shards of which some are missing."""
    if paths[0].name.startswith("adapter_"):
        raise CheckpointError(
            f"{folder}: weights",
            paths[0].name,
            "must be a whole model's, not an adapter's alone",
            "merge the adapter into its model first",
        )
    counts = {found[1] for path in paths if (found := re.search(r"-of-(\d+)\.", path.name))}
    for count in counts:
        there = sum(f"-of-{count}." in path.name for path in paths)
        if there != int(count):
            raise CheckpointError(
                f"{folder}: weights",
                f"<{there} of {int(count)} shards>",
                "must all be there",
                "download all files of the checkpoint",
            )


def _open_safetensors(path: Path) -> Any:
    what = "a readable safetensors file"
    remedy = "download all files of the checkpoint"
    open_regular(path, what, CheckpointError, remedy=remedy).close()  # a pipe would be waited for
    try:
        return safe_open(path, framework="pt")
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
