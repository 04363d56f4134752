"""SentencePiece's tokenizer.model: the same tokens as SentencePiece and transformers make."""

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken
from transformers import LlamaTokenizer
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from executor.errors import CheckpointError
from executor.job.tokenizer import TextTokenizer, missing_tokenizer

CORPUS = [
    "In the beginning God created the heaven and the earth.",
    "Naïve café — “quoted” she says, don't !",
    "def f(x):\n    return x  +  1",
    "numbers 12345 and 67, ﬁnd ½ \uff26ULL",
    "and the Spirit of God moved upon the face of the waters",
]
TEXTS = [
    *CORPUS,
    "",
    "x",
    "unseen: 🙂 中文 \u00a0\t<0x41> \u2581",
    "two  spaces\n\n  and lines \r\n",
    "in the<s>heaven</s> and <unk>the<|end|> earth<|end|>",
    "<|end|><|end|>God",
]
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
END = {"content": "<|end|>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}


def trained(kind: str, **options: Any) -> bytes:
    made = io.BytesIO()
    given = {"vocab_size": 420, "hard_vocab_limit": False, "character_coverage": 0.98, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20), model_writer=made, model_type=kind, num_threads=1, **(given | options)
    )
    return made.getvalue()


# As Llama's, as SentencePiece does if told nothing, and as Gemma's.
LLAMA = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
STYLES = {
    "llama": LLAMA | {"split_digits": True, "allow_whitespace_only_pieces": True},
    "plain": {},
    "gemma": LLAMA | {"add_dummy_prefix": False, "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3},
}


@pytest.fixture(scope="module", params=[(kind, style) for kind in ("bpe", "unigram") for style in STYLES], ids="-".join)
def model(request) -> tuple[str, bytes]:
    kind, style = request.param
    return kind, trained(kind, **STYLES[style])


def write(folder: Path, content: bytes, **settings: Any) -> int:
    """Put the model and its settings into the folder; returns the id of a token that they add."""
    (folder / "tokenizer.model").write_bytes(content)
    end = sentencepiece.SentencePieceProcessor(model_proto=content).get_piece_size()
    added = {str(end): END | {"special": True}}
    given = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": added, **NAMED, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(given), encoding="utf-8")
    return end


def ours(folder: Path) -> TextTokenizer:
    tokenizer = TextTokenizer.of_checkpoint(folder)
    assert tokenizer is not None
    return tokenizer


def some_texts() -> list[str]:
    """The texts, and cuts of them one after the other."""
    cuts, generator = " ".join(TEXTS), random.Random(0)
    starts = [generator.randrange(len(cuts)) for _ in range(40)]
    return TEXTS + [cuts[start : start + generator.randrange(1, 60)] for start in starts]


def test_tokens_are_those_of_the_slow_tokenizer(model, tmp_path):
    """Which calls SentencePiece for what is between special tokens."""
    end = write(tmp_path, model[1], legacy=True, add_bos_token=False)
    tokenizer = ours(tmp_path)
    slow = SentencePieceBackend(
        vocab_file=str(tmp_path / "tokenizer.model"),
        added_tokens_decoder={end: AddedToken("<|end|>", special=True, normalized=False)},
        **NAMED,
    )
    for text in some_texts():
        expected = slow.encode(text, add_special_tokens=False)
        assert list(tokenizer.encode(text, add_special_tokens=True)) == expected, text
    assert tokenizer.special_id("<|end|>") == end
    assert tokenizer.special_id("the") is None


@pytest.mark.parametrize("legacy", [False, None])
def test_tokens_and_texts_are_those_of_the_fast_tokenizer(legacy, tmp_path):
    content = trained("bpe", **STYLES["llama"], user_defined_symbols=["[INST]"])
    write(tmp_path, content, add_bos_token=True, add_eos_token=True, legacy=legacy, pad_token="[PAD]")
    fast, tokenizer = LlamaTokenizer.from_pretrained(tmp_path), ours(tmp_path)
    for text in [*some_texts(), "[INST] in[INST]the"]:
        expected = fast.encode(text)
        assert list(tokenizer.encode(text, add_special_tokens=True)) == expected, text
        assert tokenizer.decode(expected) == fast.decode(expected, skip_special_tokens=True)
    assert tokenizer.id_of("[PAD]") == fast.convert_tokens_to_ids("[PAD]")


def test_first_token_is_put_in_front_unless_said_otherwise(tmp_path):
    content = trained("bpe", **STYLES["gemma"])
    write(tmp_path, content)
    assert ours(tmp_path).encode("the", add_special_tokens=True)[0] == 2
    assert ours(tmp_path).encode("the", add_special_tokens=False)[0] != 2
    write(tmp_path, content, add_bos_token=False)
    assert ours(tmp_path).encode("the", add_special_tokens=True)[0] != 2


def test_placeholders_get_the_names_that_settings_give(tmp_path):
    content = trained("bpe", **STYLES["llama"], control_symbols=["<extra_0>"])
    number = sentencepiece.SentencePieceProcessor(model_proto=content).piece_to_id("<extra_0>")
    end = write(tmp_path, content, added_tokens_decoder={str(number): END})
    assert end > number
    tokenizer = ours(tmp_path)
    assert tokenizer.encode("the<|end|>", add_special_tokens=False)[-1] == number
    assert tokenizer.id_of("<extra_0>") is None


def test_tokens_of_the_older_file_count_where_the_newer_is_missing(tmp_path):
    content = trained("bpe", **STYLES["llama"])
    end = write(tmp_path, content, added_tokens_decoder=None)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|more|>": end + 1, "<|end|>": end}))
    tokenizer = ours(tmp_path)
    assert tokenizer.encode("<|more|><|end|>", add_special_tokens=False) == (end + 1, end)


@pytest.mark.parametrize("number", [3, 1000])
def test_tokens_whose_ids_do_not_follow_are_refused(number, tmp_path):
    write(tmp_path, trained("bpe", **STYLES["llama"]))
    added = {str(number): END | {"content": "<s>" if number == 3 else "<far>"}}
    write(tmp_path, (tmp_path / "tokenizer.model").read_bytes(), added_tokens_decoder=added)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model.*added token"):
        ours(tmp_path)


def test_an_id_of_thousands_of_digits_is_refused(tmp_path):
    write(tmp_path, trained("bpe", **STYLES["llama"]), added_tokens_decoder={"9" * 5000: END})
    with pytest.raises(CheckpointError, match="added tokens is <malformed>"):
        ours(tmp_path)


@pytest.mark.parametrize("kind", ["word", "char"])
def test_other_kinds_of_models_are_refused(kind, tmp_path):
    write(tmp_path, trained(kind, use_all_vocab=True))
    with pytest.raises(CheckpointError, match=r"tokenizer\.model.*unigram.*BPE"):
        ours(tmp_path)


def test_boundaries_behind_words_are_refused(tmp_path):
    write(tmp_path, trained("unigram", treat_whitespace_as_suffix=True))
    with pytest.raises(CheckpointError, match="before words"):
        ours(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\x0a", b"\x0a\x02\x0a", b"\xff" * 20, b"\x0b", b"{}", b"\x0a\x03\x0a\x01a" * 2]
)
def test_what_is_no_model_is_refused(content, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model.*SentencePiece"):
        ours(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "tiktoken.model"])
def test_vocabularies_of_tiktoken_say_what_to_do(name, tmp_path):
    (tmp_path / name).write_text("IQ== 0\nIg== 1\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TikTokenTokenizer"}')
    assert TextTokenizer.of_checkpoint(tmp_path) is None
    for word in (name, "TikTokenTokenizer", "tokenizer.json", "token ids"):
        assert word in missing_tokenizer(tmp_path)


def test_classes_that_number_tokens_otherwise_say_what_to_do(tmp_path):
    write(tmp_path, trained("unigram"), tokenizer_class="XGLMTokenizer")
    assert TextTokenizer.of_checkpoint(tmp_path) is None
    for word in ("tokenizer.model", "XGLMTokenizer", "AutoTokenizer", "tokenizer.json"):
        assert word in missing_tokenizer(tmp_path)
