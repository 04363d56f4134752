"""SentencePiece's tokenizer.model made into a tokenizer of the tokenizers library.

The file is one protocol buffer (google/sentencepiece, src/sentencepiece_model.proto), of which a few
fields matter. Texts become the tokens that transformers makes of them (5.23: LlamaConverter in
convert_slow_tokenizer.py, LlamaTokenizer): as SentencePiece does between special tokens, but that
symbols which the user of its trainer defined have no word boundary put in front.
"""

import struct
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from executor.job.tokenizer_config import TokenizerConfig

_BOUNDARY: Final = "\u2581"  # stands for a space within pieces
_UNIGRAM, _BPE = 1, 2  # models
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # pieces
_MERGED: Final = {_NORMAL, 5}  # 5: unused, which are merged on the way to others
_ADDED_FLAGS: Final = ("single_word", "lstrip", "rstrip")


@dataclass(frozen=True, slots=True)
class VocabularyPiece:
    """A token: its text, how likely it is, and of which kind."""

    text: str
    score: float = 0.0
    kind: int = _NORMAL


@final
@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What of a tokenizer.model decides on tokens; an id is -1 if there is no such piece."""

    pieces: tuple[VocabularyPiece, ...]
    kind: int
    byte_fallback: bool
    unknown_id: int
    begin_id: int
    end_id: int
    characters: bytes  # a table of what characters become first
    prefix: bool  # whether a text begins a word
    trim: bool  # whether spaces beyond one between words go

    @staticmethod
    def read(content: bytes) -> "SentencePieceModel":
        """The model in a file's bytes; ValueError if they are none, or of a kind that is not read."""
        pieces = [_piece(_bytes(value)) for number, value in _fields(content) if number == 1]
        sections = {number: dict(_fields(_bytes(value))) for number, value in _fields(content) if number in {2, 3}}
        trainer, normalizer = sections.get(2, {}), sections.get(3, {})
        if len({piece.text for piece in pieces} - {""}) < max(len(pieces), 1):
            raise ValueError("pieces must have a text, each another")
        kind = _integer(trainer, 3, _UNIGRAM)
        if kind not in {_UNIGRAM, _BPE}:
            raise ValueError(f"model {kind} must be {_UNIGRAM} (unigram) or {_BPE} (BPE)")
        if _integer(trainer, 24, 0):
            raise ValueError("word boundaries must stand before words, not after them")
        if not _integer(normalizer, 5, 1):
            raise ValueError("spaces must become word boundaries")
        return SentencePieceModel(
            tuple(pieces),
            kind,
            byte_fallback=bool(_integer(trainer, 35, 0)),
            unknown_id=_integer(trainer, 40, 0),
            begin_id=_integer(trainer, 41, 1),
            end_id=_integer(trainer, 42, 2),
            characters=_bytes(normalizer.get(2, b"")),
            prefix=bool(_integer(normalizer, 3, 1)),
            trim=bool(_integer(normalizer, 4, 1)),
        )

    def tokenizer(self, config: TokenizerConfig) -> Tokenizer:
        """The tokenizer that the model and the settings beside it make; ValueError if they do not fit."""
        texts = [piece.text for piece in self.pieces]
        for number, token in config.added.items():
            if number < len(texts):  # a placeholder that was given a name
                texts[number] = token["content"]
        if len(set(texts)) < len(texts):
            raise ValueError("added tokens must not be pieces of other ids")
        made = Tokenizer(self._model(texts, config.added))
        prefix = config.settings.get("add_prefix_space")
        self._set_spaces(made, self.prefix if prefix is None else bool(prefix), bool(config.settings.get("legacy")))
        self._add_tokens(made, texts, config)
        self._set_ends(made, texts, config)
        return made

    def _model(self, texts: list[str], added: Container[int]) -> models.Model:
        if self.kind == _UNIGRAM:
            scored = [(text, piece.score) for text, piece in zip(texts, self.pieces, strict=True)]
            return models.Unigram(scored, self.unknown_id, byte_fallback=self.byte_fallback)
        ids = {text: number for number, text in enumerate(texts)}
        return models.BPE(
            ids,
            self._merges(texts, added),
            unk_token=texts[self.unknown_id],
            fuse_unk=True,
            byte_fallback=self.byte_fallback,
        )

    def _merges(self, texts: list[str], added: Container[int]) -> list[tuple[str, str]]:
        """The pairs of pieces that make another, the likeliest first: SentencePiece stores no pairs."""
        scores = {
            texts[number]: piece.score
            for number, piece in enumerate(self.pieces)
            if piece.kind in _MERGED and number not in added
        }
        pairs = [
            (-score, cut, text)
            for text, score in scores.items()
            for cut in range(1, len(text))
            if text[:cut] in scores and text[cut:] in scores
        ]
        pairs.sort(key=lambda pair: pair[:2])
        return [(text[:cut], text[cut:]) for _, cut, text in pairs]

    def _set_spaces(self, made: Tokenizer, prefix: bool, every_part: bool) -> None:  # noqa: FBT001
        """What becomes of spaces; with `every_part` what follows a special token begins a word, too."""
        steps: list[Any] = [normalizers.Precompiled(self.characters)] if self.characters else []
        cuts: list[Any] = []
        if self.trim:
            steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        if prefix and not every_part:
            cuts.append(pre_tokenizers.Metaspace(_BOUNDARY, prepend_scheme="first", split=False))
        else:
            steps += [normalizers.Prepend(_BOUNDARY)] * prefix + [normalizers.Replace(" ", _BOUNDARY)]
        if self.kind == _UNIGRAM and self.byte_fallback:  # a text that reads as a byte's piece is none
            cuts.append(pre_tokenizers.Split(Regex("<(?=0x[0-9A-F]{2}>)"), "merged_with_previous"))
        made.normalizer = normalizers.Sequence(steps)
        if cuts:
            made.pre_tokenizer = pre_tokenizers.Sequence(cuts)
        bytes_ = [decoders.ByteFallback()] * self.byte_fallback
        first_space = [decoders.Strip(" ", 1, 0)] * prefix
        made.decoder = decoders.Sequence([decoders.Replace(_BOUNDARY, " "), *bytes_, decoders.Fuse(), *first_space])

    def _add_tokens(self, made: Tokenizer, texts: list[str], config: TokenizerConfig) -> None:
        """Tokens that are found in a text before any other: control symbols, and what files add."""
        kinds = {_CONTROL: True, _UNKNOWN: True, _USER_DEFINED: False}
        named = dict.fromkeys(config.special_tokens.values())
        tokens = {
            text: _added(text, special=kinds[piece.kind] or text in named)
            for text, piece in zip(texts, self.pieces, strict=True)
            if piece.kind in kinds
        }
        for token in config.added.values():
            text, flags = token["content"], {flag: bool(token.get(flag)) for flag in _ADDED_FLAGS}
            tokens[text] = _added(text, special=bool(token.get("special")) or text in named, **flags)
        tokens = {text: _added(text, special=True) for text in named if text not in tokens} | tokens
        # Those beyond the pieces get the ids that follow, so these must come first.
        made.add_tokens([tokens.pop(token["content"]) for token in config.added.values()])
        made.add_tokens(list(tokens.values()))
        for number, token in config.added.items():
            if made.token_to_id(token["content"]) != number:
                raise ValueError(f"added token {number} must follow the {len(texts)} pieces and other added tokens")

    def _set_ends(self, made: Tokenizer, texts: list[str], config: TokenizerConfig) -> None:
        """The tokens that are put before and behind a text; Llama's puts its first in front if unsaid."""
        settings, tokens = config.settings, config.special_tokens
        pieces = {"bos_token": self.begin_id, "eos_token": self.end_id}
        begin, end = (
            tokens.get(name, texts[number] if 0 <= number < len(texts) else None) for name, number in pieces.items()
        )
        before = [begin] if begin is not None and settings.get("add_bos_token", True) else []
        behind = [end] if end is not None and settings.get("add_eos_token", False) else []
        ids = [(text, made.token_to_id(text)) for text in dict.fromkeys([*before, *behind])]
        made.post_processor = processors.TemplateProcessing(single=[*before, "$A", *behind], special_tokens=ids)


def _added(text: str, *, special: bool, **flags: bool) -> AddedToken:
    # Looked for in the text as it is given, as SentencePiece and the slow tokenizers do.
    return AddedToken(text, normalized=False, special=special, **flags)


# -- protocol buffers -------------------------------------------------------------------------


def _piece(content: bytes) -> VocabularyPiece:
    fields = dict(_fields(content))
    score = fields.get(2, bytes(4))
    (value,) = struct.unpack("<f", _bytes(score))
    return VocabularyPiece(_bytes(fields.get(1, b"")).decode(), value, _integer(fields, 3, _NORMAL))


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of a message's fields: integers, or bytes of texts, messages and floats."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        match key & 7:
            case 0:
                value, at = _varint(content, at)
                yield key >> 3, value
                continue
            case 1:
                size = 8
            case 2:
                size, at = _varint(content, at)
            case 5:
                size = 4
            case kind:
                raise ValueError(f"byte {at}: no field is of kind {kind}")
        if at + size > len(content):
            raise ValueError(f"byte {at}: {size} bytes must follow")
        yield key >> 3, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """An integer of seven bits a byte, and where what follows begins."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(content):
            break
        byte = content[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError(f"byte {at}: an integer must end")


def _integer(fields: Mapping[int, int | bytes], number: int, default: int) -> int:
    """An integer of 32 bits with a sign."""
    value = fields.get(number, default)
    if not isinstance(value, int):
        raise ValueError(f"field {number} must be an integer")  # noqa: TRY004 - of the file, not of ours
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError(f"{value} must be a text or a message")  # noqa: TRY004
    return value
