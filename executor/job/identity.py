"""What the answers of a run directory depend on, so that none but the same job goes on in it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from hashlib import blake2b
from os import SEEK_END
from pathlib import Path
from typing import Any, Final, final

import msgspec

from executor.checkpoint import Checkpoint
from executor.errors import CheckpointError, JobError
from executor.job.chat import PROCESSOR_FILE, TEMPLATE_FILE, TEMPLATE_FOLDER, TEMPLATES
from executor.job.sampling_defaults import OPENAI, SamplingDefaults
from executor.job.tokenizer import SENTENCEPIECE_FILE, TOKENIZER_FILE
from executor.job.tokenizer_config import ADDED_FILE, MAP_FILE, TOKENIZER_CONFIG_FILE
from executor.safetensors_file import DOWNLOAD_AGAIN
from hrm.decoding import read_json
from hrm.files import open_regular, read_regular
from hrm.policy import Policy

JOB_JSON: Final = "job.json"
SCHEMA: Final = 1
TEXT_FILES: Final = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, MAP_FILE, TEMPLATE_FILE)
_SAMPLES: Final = 16  # of a file of weights that are compared, spread over all of it
_SAMPLE_BYTES: Final = 4096
_MEANING: Final = {  # the option that decides a field, and what it is called there
    "weights": ("--model", "weights"),
    "config": ("--model", "config"),
    "text": ("--model", "tokenizer or chat template"),
    "dtype": ("--policy", "dtype"),
    "kv_format": ("--policy", "kv_format"),
    "seed": ("--seed", "seed"),
    "sampling": ("--sampling-defaults", "what requests do not say"),
    "computed": ("--accelerator", "kind of accelerator"),
}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What every answer depends on besides its request, as short hashes where it is long.

    `computed` is False if the accelerator only sleeps. `sampling` is what requests that do not say get, and
    `kv_format` that of the KV cache, empty if it is the dtype.
    """

    schema: int = SCHEMA
    weights: str
    config: str
    text: str
    dtype: str
    seed: int
    computed: bool
    sampling: str = OPENAI
    kv_format: str = ""

    @staticmethod
    def of(
        checkpoint: Checkpoint, policy: Policy, *, seed: int, computed: bool, sampling: SamplingDefaults
    ) -> "Identity":
        """Of a job to come. Weights are compared by samples, so that none are read in full."""
        config = json.dumps(checkpoint.config, sort_keys=True).encode()
        folder = checkpoint.folder
        return Identity(
            weights=_digest(_samples(path) for path in checkpoint.weight_files),
            config=_digest([config]),
            text=_digest(part for path in _text_files(folder) for part in (path.name.encode(), _content(path))),
            dtype=policy.dtype,
            kv_format=policy.other_kv_format,
            seed=seed,
            computed=computed,
            sampling=str(sampling),
        )

    @staticmethod
    def read(path: Path) -> "Identity | None":
        """The one that a run directory was begun with; None if it does not say.

        Raises JobError if the file is not what `write` makes.
        """
        if not path.exists():
            return None
        what, remedy = "what the directory's answers depend on", "choose another --output-dir"
        content = read_json(path, what, JobError, remedy=remedy)
        try:
            return msgspec.convert(content, Identity)
        except msgspec.ValidationError as error:
            raise JobError(str(path), f"<{error}>", f"must be {what}", remedy) from error

    def json(self) -> bytes:
        """What `read` reads."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n"

    def check(self, begun: "Identity", directory: Path) -> None:
        """Raise JobError naming what differs from what the directory was begun with."""
        for field in fields(self):
            now, then = getattr(self, field.name), getattr(begun, field.name)
            if now == then or field.name not in _MEANING:
                continue
            option, word = _MEANING[field.name]
            is_plain = field.name in {"dtype", "kv_format", "seed", "sampling"}
            if field.name == "kv_format":
                now, then = now or self.dtype, then or begun.dtype
            raise JobError(
                f"{option}: {word}",
                now if is_plain else "<another>",
                f"must be {repr(then) if is_plain else 'the one'} with which {directory} was begun",
                "give that one, or choose another --output-dir",
            )


def digest_of_line(content: dict[str, Any]) -> str:
    """A short hash of a line's object that spaces and the order of its fields do not change."""
    return _digest([json.dumps(content, sort_keys=True).encode()])


def _samples(path: Path) -> bytes:
    """The size and some bytes of a file: its head, its end, and pieces at equal distances."""
    with open_regular(path, "a file of weights", CheckpointError, remedy=DOWNLOAD_AGAIN) as file:
        size = file.seek(0, SEEK_END)
        parts = [str(size).encode()]
        for index in range(_SAMPLES):
            file.seek(max(size - _SAMPLE_BYTES, 0) * index // (_SAMPLES - 1))
            parts.append(file.read(_SAMPLE_BYTES))
    return b"".join(parts)


def _text_files(folder: Path) -> list[Path]:
    """The files that decide what texts and messages are as tokens, also such as are missing."""
    names = list(TEXT_FILES)
    if not (folder / TOKENIZER_FILE).exists():
        names += [name for name in (SENTENCEPIECE_FILE, ADDED_FILE) if (folder / name).exists()]
    names += [PROCESSOR_FILE] if (folder / PROCESSOR_FILE).exists() else []
    return [*(folder / name for name in names), *sorted((folder / TEMPLATE_FOLDER).glob(TEMPLATES))]


def _content(path: Path) -> bytes:
    """All bytes of a file; none if there is no such file."""
    if not path.exists():
        return b""
    return read_regular(path, "a readable file", CheckpointError, remedy=DOWNLOAD_AGAIN)


def _digest(parts: Iterable[bytes]) -> str:
    whole = blake2b(digest_size=12)
    for part in parts:
        whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()
