"""What lies beside a tokenizer: its settings, and the special tokens that they name."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from executor.checkpoint import DOWNLOAD_AGAIN
from executor.errors import CheckpointError
from hrm.decoding import read_json_object
from hrm.units import is_whole_number

TOKENIZER_CONFIG_FILE: Final = "tokenizer_config.json"
MAP_FILE: Final = "special_tokens_map.json"
ADDED_FILE: Final = "added_tokens.json"
SPECIAL_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@final
@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """A checkpoint's tokenizer_config.json and its special tokens' texts by name.

    `added` are all tokens beyond those of the vocabulary's own file, by id, as objects with a `content`.
    """

    path: Path
    settings: dict[str, Any]
    special_tokens: dict[str, str]
    added: dict[int, dict[str, Any]]

    @staticmethod
    def of_checkpoint(folder: Path) -> "TokenizerConfig":
        """What the folder's files say; of files that are missing, nothing.

        special_tokens_map.json and added_tokens.json count for old tokenizers only, as in transformers.
        Raises CheckpointError if one of the files is not what its name says.
        """
        settings = read_settings(folder / TOKENIZER_CONFIG_FILE)
        named, added = settings, settings.get("added_tokens_decoder")
        if added is None:
            named = {**settings, **read_settings(folder / MAP_FILE)}
            texts = read_settings(folder / ADDED_FILE)
            special = set(_special_tokens(named).values())
            added = {number: {"content": text, "special": text in special} for text, number in texts.items()}
        where = folder / (TOKENIZER_CONFIG_FILE if "added_tokens_decoder" in settings else ADDED_FILE)
        return TokenizerConfig(folder / TOKENIZER_CONFIG_FILE, settings, _special_tokens(named), _added(added, where))


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one if there is no such file."""
    if not path.exists():
        return {}
    return read_json_object(path, "a readable JSON file", CheckpointError, remedy=DOWNLOAD_AGAIN)


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for key in SPECIAL_TOKENS:
        value = settings.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[key] = value
    return tokens


def _added(tokens: Any, path: Path) -> dict[int, dict[str, Any]]:
    """The added tokens by id, in the order of their ids."""
    holds = isinstance(tokens, dict) and all(
        is_whole_number(str(number)) and isinstance(token, dict) and isinstance(token.get("content"), str)
        for number, token in tokens.items()
    )
    if not holds:
        raise CheckpointError(f"{path}: added tokens", "<malformed>", "must be tokens with their ids", DOWNLOAD_AGAIN)
    return dict(sorted((int(number), token) for number, token in tokens.items()))
