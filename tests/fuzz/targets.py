"""What is fuzzed: every reader of users' files and texts, through to what is done with them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.fuzz.mutations import as_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One reader: valid inputs, how they are written, and what is done with an input's bytes.

    `use` gets the bytes and an empty folder. It may return or raise an HrmError; all else is a
    finding. `share` is how many inputs it gets beside the others, less where one takes long.
    """

    name: str
    bases: Callable[[], list[Any]]
    use: Callable[[bytes, Path], None]
    dump: Callable[[Any], bytes] = as_json
    has_values: bool = True
    share: float = 1.0


def written(folder: Path, name: str, content: bytes) -> Path:
    """A file of that name in the folder with the content."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def all_targets() -> dict[str, Target]:
    """Every target by its name; those of the executor import torch."""
    from tests.fuzz.targets_executor import EXECUTOR_TARGETS

    return {**targets_of_hrm(), **{target.name: target for target in EXECUTOR_TARGETS}}


def targets_of_hrm() -> dict[str, Target]:
    """Those that need no torch."""
    from tests.fuzz.targets_hrm import HRM_TARGETS

    return {target.name: target for target in HRM_TARGETS}


NAMES_OF_HRM: Final = (
    "profile",
    "gpu",
    "host",
    "diff",
    "config",
    "modelopt",
    "gguf",
    "policy",
    "run",
    "routing",
    "trace",
    "journal",
    "study",
    "texts",
)
NAMES_OF_EXECUTOR: Final = (
    "requests",
    "parquet",
    "resume",
    "job",
    "tokenizer",
    "sentencepiece",
    "added-tokens",
    "tokenizer-config",
    "template",
    "named-template",
    "special-tokens",
    "quantisation",
    "index",
    "model-config",
    "generation-config",
    "safetensors",
    "gguf-weights",
    "crossings",
    "quantised",
)
