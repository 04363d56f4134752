"""Text to tokens and back; with `sentencepiece`, every call of the tokenizers library that a job makes."""

import re
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final, final

from tokenizers import Tokenizer

from executor.errors import CheckpointError
from executor.guard import told_as
from executor.job.sentencepiece import SentencePieceModel
from executor.job.tokenizer_config import TokenizerConfig
from executor.safetensors_file import DOWNLOAD_AGAIN
from hrm.files import open_regular, read_regular

TOKENIZER_FILE: Final = "tokenizer.json"
SENTENCEPIECE_FILE: Final = "tokenizer.model"
# The classes of transformers whose ids are those of the pieces in tokenizer.model; others move them.
SENTENCEPIECE_CLASSES: Final = {"", "Llama", "Gemma", "PreTrained", "TokenizersBackend", "SentencePieceBackend"}
OTHER_FILES: Final = (SENTENCEPIECE_FILE, "tekken.json", "tiktoken.model", "vocab.json")
TAIL_TOKENS: Final = 6  # of a prompt, which settle how its continuation begins
REPLACEMENT: Final = "\ufffd"  # what a character decodes to whose bytes are not all there
_TIKTOKEN: Final = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")  # a token in base64 and its id


@final
class TextTokenizer:
    """A checkpoint's tokenizer, without the truncation and padding that its file may ask for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer

    @staticmethod
    def of_checkpoint(folder: Path) -> "TextTokenizer | None":
        """The tokenizer in tokenizer.json, else in SentencePiece's tokenizer.model; None if there is none.

        Raises CheckpointError if the file is no tokenizer.
        """
        path = folder / TOKENIZER_FILE
        if path.exists():
            what = "a tokenizer of the tokenizers library"
            content = read_regular(path, what, CheckpointError, remedy=DOWNLOAD_AGAIN)
            with told_as(CheckpointError, str(path), f"must be {what}", DOWNLOAD_AGAIN):
                return TextTokenizer(Tokenizer.from_buffer(content))
        path = folder / SENTENCEPIECE_FILE
        if not path.exists() or _unread(folder) is not None:
            return None
        what = "a model of SentencePiece that suits the tokenizer_config.json beside it"
        content = read_regular(path, what, CheckpointError, remedy=DOWNLOAD_AGAIN)
        with told_as(CheckpointError, str(path), f"must be {what}", DOWNLOAD_AGAIN):
            config = TokenizerConfig.of_checkpoint(folder)
            return TextTokenizer(SentencePieceModel.read(content).tokenizer(config))

    def encode(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        """The token ids of a text, all of them; with those that begin or end one, if asked."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens that stand alone, without special ones."""
        return self._tokenizer.decode(list(tokens))

    def id_of(self, text: str) -> int | None:
        """The id of the token whose text it is; None if it is none."""
        return self._tokenizer.token_to_id(text)

    def special_id(self, text: str) -> int | None:
        """The id of the special token that the text is; None if it is none."""
        return self._special_ids.get(text)

    @cached_property
    def _special_ids(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}

    def continuation(self, before: Sequence[int], tokens: Sequence[int]) -> str:
        """The text that the tokens add to that of those before them.

        It is not what they decode to alone: many tokenizers drop a space at the beginning of a
        text, or put none before its first word.
        """
        tail, head = self._tail(before)
        whole = self.decode([*tail, *tokens])
        if not whole.startswith(head):  # the tokens complete a character that was begun
            head = head.rstrip(REPLACEMENT)
        same = next(
            (i for i, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b), min(len(head), len(whole))
        )
        return whole[same:]

    def _tail(self, before: Sequence[int]) -> tuple[Sequence[int], str]:
        """The last tokens, enough of them to have a text if any has, and that text."""
        count = TAIL_TOKENS
        while True:
            tail = before[max(len(before) - count, 0) :]
            text = self.decode(tail)
            if text.strip(REPLACEMENT) or count >= len(before):
                return tail, text
            count *= 2

    def has_stopped(self, prompt: Sequence[int], tokens: Sequence[int], stops: Collection[str]) -> bool:
        """Whether the last token completes one of the stop texts in what the tokens say.

        Decodes no more of the tokens than the stop texts may reach back to.
        """
        wanted = max(map(len, stops), default=0) + len(self.decode(tokens[-1:]))
        count = min(wanted + TAIL_TOKENS, len(tokens))
        while True:
            first = len(tokens) - count
            before = tokens[:first] if first > TAIL_TOKENS else [*prompt, *tokens[:first]]
            text = self.continuation(before, tokens[first:])
            if len(text) >= wanted or not first:
                return any(stop in text for stop in stops)
            count = min(2 * count, len(tokens))


def missing_tokenizer(folder: Path) -> str:
    """Says what the folder has in place of a tokenizer that can be read, and what to do about it."""
    found = [name for name in OTHER_FILES if (folder / name).exists()]
    if not found:
        return f"download the model's {TOKENIZER_FILE} too, or give token ids"
    if (reason := _unread(folder)) is not None:
        return reason
    return f"it has {found[0]}, which {_CONVERTED}; or give token ids"


_CONVERTED: Final = f"transformers makes into {TOKENIZER_FILE} (AutoTokenizer.from_pretrained(…).save_pretrained(…))"


def _unread(folder: Path) -> str | None:
    """Why a folder's tokenizer is not read though it has one, and what to do; None if it is."""
    config = TokenizerConfig.of_checkpoint(folder)
    kind = str(config.settings.get("tokenizer_class") or "")
    tiktoken = next((name for name in (SENTENCEPIECE_FILE, "tiktoken.model") if _is_tiktoken(folder / name)), None)
    if tiktoken is not None:
        return (
            f"it has {tiktoken}, which {kind or 'code'} of its own reads, and code of others is not run: put a"
            f" {TOKENIZER_FILE} of the same model beside it, or encode the prompts where you trust that code and give"
            " token ids"
        )
    known = kind.removesuffix("Fast").removesuffix("Tokenizer") in SENTENCEPIECE_CLASSES
    if not known and (folder / SENTENCEPIECE_FILE).exists():
        return f"its {SENTENCEPIECE_FILE} is for a {kind}, which may number tokens otherwise and {_CONVERTED}"
    return None


def _is_tiktoken(path: Path) -> bool:
    if not path.exists():
        return False
    with open_regular(path, "a readable file", CheckpointError, remedy=DOWNLOAD_AGAIN) as file:
        return _TIKTOKEN.match(file.read(4096)) is not None
