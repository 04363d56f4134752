"""What the answers of a run directory depend on, so that none but the same job goes on in it."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, final

import msgspec

from executor.checkpoint import Checkpoint
from executor.errors import JobError

JOB_JSON: Final = "job.json"
SCHEMA: Final = 1
TEXT_FILES: Final = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
_SAMPLES: Final = 16  # of a file of weights that are compared, spread over all of it
_SAMPLE_BYTES: Final = 4096
_MEANING: Final = {  # the option that decides a field, and what it is called there
    "weights": ("--model", "weights"),
    "config": ("--model", "config"),
    "text": ("--model", "tokenizer or chat template"),
    "dtype": ("--policy", "dtype"),
    "seed": ("--seed", "seed"),
    "computed": ("--accelerator", "kind of accelerator"),
}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What every answer depends on besides its request, as short hashes where it is long.

    `computed` is False if the accelerator only sleeps.
    """

    schema: int = SCHEMA
    weights: str
    config: str
    text: str
    dtype: str
    seed: int
    computed: bool

    @staticmethod
    def of(checkpoint: Checkpoint, *, dtype: str, seed: int, computed: bool) -> "Identity":
        """Of a job to come. Weights are compared by samples, so that none are read in full."""
        config = json.dumps(checkpoint.config, sort_keys=True).encode()
        text = [checkpoint.folder / name for name in TEXT_FILES]
        return Identity(
            weights=_digest(_samples(path) for path in checkpoint.weight_files),
            config=_digest([config]),
            text=_digest(path.read_bytes() if path.is_file() else b"" for path in text),
            dtype=dtype,
            seed=seed,
            computed=computed,
        )

    @staticmethod
    def read(path: Path) -> "Identity | None":
        """The one that a run directory was begun with; None if it does not say.

        Raises JobError if the file is not what `write` makes.
        """
        try:
            return msgspec.json.decode(path.read_bytes(), type=Identity)
        except FileNotFoundError:
            return None
        except OSError as error:
            told: object = error.strerror
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            told = error
        raise JobError(
            str(path), f"<{told}>", "must say what the directory's answers depend on",
            "choose another --output-dir",
        )  # fmt: skip

    def write(self, path: Path) -> None:
        """Write what `read` reads; OSError if that fails."""
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")

    def check(self, begun: "Identity", directory: Path) -> None:
        """Raise JobError naming what differs from what the directory was begun with."""
        for field in fields(self):
            now, then = getattr(self, field.name), getattr(begun, field.name)
            if now == then or field.name not in _MEANING:
                continue
            option, word = _MEANING[field.name]
            is_plain = field.name in {"dtype", "seed"}
            raise JobError(
                f"{option}: {word}", now if is_plain else "<another>",
                f"must be {repr(then) if is_plain else 'the one'} with which {directory} was begun",
                "give that one, or choose another --output-dir",
            )  # fmt: skip


def digest_of_line(content: dict[str, Any]) -> str:
    """A short hash of a line's object that spaces and the order of its fields do not change."""
    return _digest([json.dumps(content, sort_keys=True).encode()])


def _samples(path: Path) -> bytes:
    """The size and some bytes of a file: its head, its end, and pieces at equal distances."""
    size = path.stat().st_size
    parts = [str(size).encode()]
    with path.open("rb") as file:
        for index in range(_SAMPLES):
            file.seek(max(size - _SAMPLE_BYTES, 0) * index // (_SAMPLES - 1))
            parts.append(file.read(_SAMPLE_BYTES))
    return b"".join(parts)


def _digest(parts: Iterable[bytes]) -> str:
    whole = blake2b(digest_size=12)
    for part in parts:
        whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()
