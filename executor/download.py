"""Checkpoints by the name of a folder, or of a model on the Hugging Face Hub."""

from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Final

from executor.checkpoint import read_config
from executor.checkpoint_files import INDEX_FILE, indexed_files
from executor.families import family_for
from hrm.errors import ModelError
from hrm.files import is_folder
from hrm.hub import HubModel, Progress
from hrm.model_spec.published_dtype import MODELOPT_FILE

# What is not weights: some are of tokenizers that are not read, which is told better with them there.
SMALL_FILES: Final = (
    "config.json",
    "generation_config.json",
    MODELOPT_FILE,
    INDEX_FILE,
    "tokenizer*",
    "tekken.json",
    "tiktoken.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)
WEIGHTS: Final = ("*.safetensors",)  # without an index
NO_WEIGHTS: Final = ("*/*", "consolidated*", "adapter_*")  # of the same model once more, or of no model


@dataclass(frozen=True, slots=True)
class Located:
    """A checkpoint's folder; `name` is the model's on the Hub, if it is from there."""

    folder: Path
    name: str = ""


def locate(model: str | Path, revision: str | None = None, progress: Progress | None = None) -> Located:
    """The folder that is named, or that of a model on the Hub once all that is needed is there.

    Of a model that cannot be run no weights are fetched: ModelError says why. `progress` is as for
    HubModel.fetch.
    """
    asked = None if isinstance(model, Path) or is_folder(Path(model)) else HubModel.named(model)
    if revision is not None:
        if asked is None or asked.revision is not None:
            rule = "must go with a model on the Hub, named without @revision"
            raise ModelError("--revision", revision, rule, "leave it out, or name the model as org/name")
        asked = HubModel(asked.repository, revision)
    if asked is None:
        return Located(Path(model))
    folder = asked.fetch(SMALL_FILES, progress=_untold)
    config = read_config(folder)
    family_for(config, asked.config_name).architecture(config, asked.config_name)
    index = folder / INDEX_FILE
    if index.exists():
        root = index.parent
        shards = {escape(file.relative_to(root).as_posix()) for file in indexed_files(index).values()}
        asked.fetch(sorted(shards), commit=folder.name, progress=progress)
    else:
        asked.fetch(WEIGHTS, ignored=NO_WEIGHTS, commit=folder.name, progress=progress)
    return Located(folder, str(asked))


def _untold(_done: int, _total: int) -> None:
    """Of small files it would be noise."""
