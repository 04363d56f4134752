"""The files of a checkpoint: which there are, and that each is what its name says."""

import re
from pathlib import Path, PurePosixPath
from typing import Any, Final

from executor.errors import CheckpointError
from executor.safetensors_file import DOWNLOAD_AGAIN
from hrm.decoding import read_json_object

INDEX_FILE: Final = "model.safetensors.index.json"
SINGLE_FILE: Final = "model.safetensors"
PICKLE_SUFFIXES: Final = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError with the remedy if it is none."""
    return read_json_object(path, "a readable JSON file", CheckpointError, remedy=remedy)


def indexed_files(index_path: Path) -> dict[str, Path]:
    """The file of each tensor that an index tells; CheckpointError if one is outside of its folder."""
    weight_map = read_object(index_path, DOWNLOAD_AGAIN).get("weight_map")
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


def index_file(folder: Path) -> Path | None:
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


def unindexed_files(folder: Path) -> list[Path]:
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
