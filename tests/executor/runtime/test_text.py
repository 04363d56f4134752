"""Prompts and stops given as text, and the text of what is generated."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from executor.batching import Request
from executor.errors import CheckpointError
from executor.generate import Completion
from executor.job.outputs import completion_line, text_of
from executor.job.requests import LineReader, Rejected
from executor.job.room import AnswerRoom
from executor.job.tokenizer import TextTokenizer
from executor.sampling import SamplingParams
from tests.executor.runtime.support import make_policy, requests
from tests.executor.tiny_models import tiny_arch

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>"]
CORPUS = (
    "In the beginning God created the heaven and the earth . Naïve café 中文字 — “quoted” 🙂🙃 and"
    " the spirit moved upon the face of the waters ; don't say it 's two  spaces , or\nlines ."
)
ROOM = AnswerRoom(share_tokens=64, gen_len=8, most_tokens=128)


def sentencepiece() -> Tokenizer:
    """As Llama's and Mixtral's: spaces are part of words, and one is put in front of a text."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1)]
    )
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL + alphabet, limit_alphabet=30)
    made.train_from_iterator([CORPUS], trainer)
    kept = json.loads(made.to_str())
    kept["added_tokens"] = [t for t in kept["added_tokens"] if t["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(kept))


def metaspace() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    made.train_from_iterator([CORPUS] * 5, trainer)
    return made


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [CORPUS], trainers.BpeTrainer(vocab_size=350, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    return made


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece(cleanup=False)
    made.train_from_iterator([CORPUS], trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL))
    return made


def words() -> Tokenizer:
    known = {"user": 3, "assistant": 4, "[": 5, "]": 6, "hi": 7}
    made = Tokenizer(models.WordLevel({**dict(zip(SPECIAL[:3], range(3), strict=True)), **known}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


STYLES = {"sentencepiece": sentencepiece, "metaspace": metaspace, "bytes": byte_level, "pieces": word_piece}


@pytest.fixture(scope="module", params=STYLES)
def style(request) -> Tokenizer:
    return STYLES[request.param]()


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint's folder, as far as text is concerned."""
    path = tmp_path / "model"
    path.mkdir()
    words().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TEMPLATE, "bos_token": {"content": "<s>"}})
    )
    return path


def read(folder: Path, *, tell=lambda _: None, **line):
    path = folder / "prompts.jsonl"
    path.write_text(json.dumps({"custom_id": "a", **line}))
    (item,) = LineReader(folder, ROOM, 0, tell).read(path)
    return item


def chat(folder: Path, *messages: str, tell=lambda _: None, **body):
    said = [{"role": "user", "content": text} for text in messages]
    return read(folder, url="/v1/chat/completions", body={"messages": said, **body}, tell=tell)


# -- prompts ----------------------------------------------------------------------------------


def test_text_is_encoded(folder):
    item = read(folder, body={"prompt": "hi user"})
    assert isinstance(item, Request)
    assert item.prompt == (7, 3)
    assert item.params.max_tokens == 16
    assert not item.chat


@pytest.mark.parametrize("where", ["file", "call"])
def test_truncation_and_padding_of_the_file_are_not_for_prompts(folder, where):
    path = folder / "tokenizer.json"
    made = Tokenizer.from_file(str(path))
    made.enable_truncation(max_length=2)
    made.enable_padding(length=24, pad_id=2, pad_token="</s>")
    if where == "file":
        made.save(str(path))
        tokenizer = TextTokenizer.of_checkpoint(folder)
        assert tokenizer is not None
    else:
        tokenizer = TextTokenizer(made)
    assert tokenizer.encode("hi hi user hi", add_special_tokens=True) == (7, 7, 3, 7)


def test_tokenizer_of_a_folder(folder):
    path = folder / "tokenizer.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        TextTokenizer.of_checkpoint(folder)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="a pipe"):
        TextTokenizer.of_checkpoint(folder)
    path.unlink()
    assert TextTokenizer.of_checkpoint(folder) is None
    (folder / "tekken.json").touch()
    item = read(folder, body={"prompt": "hi"})
    assert isinstance(item, Rejected)
    for part in ("tokenizer.json", "tekken.json", "AutoTokenizer", "token ids"):
        assert part in item.message


def test_conversation_goes_through_the_template(folder):
    item = chat(folder, "hi")
    assert isinstance(item, Request)
    assert item.prompt[-6:] == (3, 6, 7, 5, 4, 6)
    assert item.chat
    body = completion_line(Completion(item, (7,), "length"), "m", "hi", chat=True)["response"]
    assert body["body"]["choices"][0]["message"] == {"role": "assistant", "content": "hi"}
    refused = chat(folder)
    assert isinstance(refused, Rejected)
    assert "must hold a message" in refused.message


def test_template_is_compiled_for_chat_lines_alone(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{% if"}))
    assert isinstance(read(folder, body={"prompt": "hi"}), Request)
    item = chat(folder, "hi")
    assert isinstance(item, Rejected)
    assert "tokenizer_config.json: chat template" in item.message


def test_variables_reach_the_template(folder):
    (folder / "chat_template.jinja").write_text(
        "{% if thinking %}assistant {% endif %}{% if add_generation_prompt %}hi {% endif %}"
        "{% for d in documents %}{{ d.text }} {% endfor %}"
    )
    item = chat(
        folder, "x", chat_template_kwargs={"thinking": True}, documents=[{"text": "user"}], add_generation_prompt=False
    )
    assert isinstance(item, Request)
    assert item.prompt == (4, 3)  # assistant user
    item = chat(folder, "x", chat_template_kwargs={"messages": []})
    assert isinstance(item, Rejected)
    assert "chat_template_kwargs: messages" in item.message
    item = chat(folder, "x", documents=["text"])
    assert isinstance(item, Rejected)
    assert "body: documents" in item.message


# -- how long an answer may be ----------------------------------------------------------------


def test_chat_without_max_tokens_takes_its_share_of_the_cache_and_says_so_once(folder):
    told: list[str] = []
    item = chat(folder, "hi", tell=told.append)
    assert isinstance(item, Request)
    assert item.params.max_tokens == 64 - len(item.prompt)
    assert len(told) == 1
    assert "max_tokens" in told[0]
    assert "--gen-len" in told[0]
    path = folder / "many.jsonl"
    message = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": None}
    line = {"url": "/v1/chat/completions", "body": message}
    path.write_text("\n".join(json.dumps({"custom_id": str(i), **line}) for i in range(3)))
    told.clear()
    assert len(list(LineReader(folder, ROOM, 0, told.append).read(path))) == 3
    assert len(told) == 1
    told.clear()
    for key in ("max_tokens", "max_completion_tokens"):
        item = chat(folder, "hi", tell=told.append, **{key: 3})
        assert isinstance(item, Request)
        assert item.params.max_tokens == 3
    assert not told


@pytest.mark.parametrize(("prompt", "expected"), [(10, 54), (60, 8), (64, 8), (124, 4), (128, 1), (500, 1)])
def test_room_of_an_answer(prompt, expected):
    assert ROOM.max_tokens(prompt) == expected


@pytest.mark.parametrize(("prompt", "expected"), [(10, 30), (32, 8), (33, 31), (60, 8)])
def test_an_answer_that_may_be_short_keeps_a_text_short(prompt, expected):
    assert replace(ROOM, short_tokens=40).max_tokens(prompt) == expected


def test_room_fits_the_cache_whatever_the_policy():
    for micro_batch, tokens in ((1, 16), (3, 256), (16, 256), (40, 256)):
        policy = make_policy(2, batch_size=micro_batch, micro_batch_size=micro_batch, kv_tokens_per_micro_batch=tokens)
        room = AnswerRoom.of(policy, 12, replace(tiny_arch(), max_position_embeddings=200))
        for length in range(1, min(tokens, 200)):
            request = Request("a", (3,) * length, SamplingParams(max_tokens=room.max_tokens(length)))
            assert length + request.params.max_tokens <= 200
            assert request.kv_tokens <= tokens
            if room.max_tokens(length) > 12:  # as many as the policy has run together
                assert micro_batch * request.kv_tokens <= tokens


# -- what was generated -----------------------------------------------------------------------


def ids_of(tokenizer: Tokenizer, generator: random.Random) -> list[int]:
    """Tokens of texts, and such as no text has: cut characters, special tokens, any order."""
    some = tokenizer.encode(CORPUS, add_special_tokens=False).ids
    ids = [*some, *generator.choices(range(tokenizer.get_vocab_size()), k=12), *some]
    start = generator.randrange(len(some))
    return ids[start : start + generator.randrange(4, 40)]


def test_continuation_is_what_the_whole_has_more(style):
    """The oracle is transformers' own way: decode all, and take off what the prompt decodes to."""
    text, generator = TextTokenizer(style), random.Random(0)
    compared = 0
    for _ in range(300):
        ids = ids_of(style, generator)
        cut = generator.randrange(len(ids))
        head, whole = style.decode(ids[:cut]), style.decode(ids)
        if whole.startswith(head):
            assert text.continuation(ids[:cut], ids[cut:]) == whole[len(head) :], (ids, cut)
            compared += 1
    assert compared > 200


def test_leading_space_is_kept(style):
    text = TextTokenizer(style)
    prompt = text.encode("the heaven", add_special_tokens=False)
    whole = text.encode("the heaven and the earth", add_special_tokens=False)
    assert whole[: len(prompt)] == prompt
    assert text.continuation(prompt, whole[len(prompt) :]) == " and the earth"


def test_leading_space_is_kept_behind_special_tokens():
    tokenizer = sentencepiece()
    text = TextTokenizer(tokenizer)
    end = text.special_id("<|end|>")
    assert end is not None
    prompt = [*text.encode("the heaven", add_special_tokens=False), *[end] * 20]
    tokens = text.encode("x and", add_special_tokens=False)[1:]
    while not str(tokenizer.id_to_token(tokens[0])).startswith("▁"):
        tokens = tokens[1:]
    assert text.continuation(prompt, tokens) == " and"


def test_character_that_the_prompt_began_is_whole_in_the_answer():
    text = TextTokenizer(byte_level())
    ids = text.encode("🙂", add_special_tokens=False)
    if len(ids) == 1:
        ids = text.encode("\U0001f984", add_special_tokens=False)
    assert text.continuation(ids[:1], ids[1:]) in {"🙂", "\U0001f984"}


def test_stop_texts_are_found_as_soon_as_they_are_there(style):
    """Against a search of the whole text after each token."""
    text, generator = TextTokenizer(style), random.Random(1)
    found = 0
    for _ in range(150):
        ids = ids_of(style, generator)
        cut = generator.randrange(1, len(ids))
        prompt, tokens = tuple(ids[:cut]), ids[cut:]
        said = text.continuation(prompt, tokens)
        if len(said) < 4:
            continue
        start = generator.randrange(len(said) - 2)
        stops = (said[start : start + generator.randrange(1, 12)].strip("\ufffd") or "zz",)
        steps = range(1, len(tokens) + 1)
        ends = [any(stop in text.continuation(prompt, tokens[:n]) for stop in stops) for n in steps]
        first = ends.index(True) if True in ends else len(ends)
        for n in steps[: first + 1]:
            assert text.has_stopped(prompt, tokens[:n], stops) == ends[n - 1], (tokens[:n], stops)
        found += first < len(ends)
    assert found > 80


def test_stop_text_with_a_leading_space_is_found():
    text = TextTokenizer(sentencepiece())
    prompt = text.encode("the heaven", add_special_tokens=False)
    tokens = text.encode("the heaven and", add_special_tokens=False)[len(prompt) :]
    assert text.has_stopped(prompt, tokens, (" and",))
    assert not text.has_stopped((*prompt, *tokens), tokens[-1:], ("heaven and",))


def test_prompt_is_not_searched_for_stop_texts():
    text = TextTokenizer(byte_level())
    prompt = text.encode("waters", add_special_tokens=False)
    tokens = text.encode(" upon", add_special_tokens=False)
    assert not text.has_stopped(prompt, tokens, ("waters",))
    assert not text.has_stopped(prompt, tokens, ("s upon",))


def test_stop_text_that_is_a_special_token_is_its_id(folder):
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_special_tokens(["<|im_end|>"])
    made.add_tokens(["<plain>"])
    made.save(str(folder / "tokenizer.json"))
    item = read(folder, body={"prompt": "hi", "stop": ["<|im_end|>", "user", "<plain>"]})
    assert isinstance(item, Request)
    assert item.params.stop_token_ids == (made.token_to_id("<|im_end|>"),)
    assert item.params.stop == ("<|im_end|>", "user", "<plain>")
    done = Completion(item, (7, *item.params.stop_token_ids), "stop")
    assert text_of(done, TextTokenizer(made), frozenset()) == " hi"


def test_stop_text_and_end_token_are_cut_off():
    tokenizer = TextTokenizer(words())
    (request,) = requests([[7]], stop=("user",))
    assert text_of(Completion(request, (7, 3, 7), "stop"), tokenizer, frozenset({2})) == " hi "
    assert text_of(Completion(request, (7, 2), "stop"), tokenizer, frozenset({2})) == " hi"
    assert text_of(Completion(request, (7, 7), "length"), None, frozenset()) == ""
