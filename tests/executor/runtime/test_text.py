"""Prompts and stops given as text, and conversations through a chat template."""

import json
from pathlib import Path

import pytest

from executor.batching import Request
from executor.errors import CheckpointError, JobError
from executor.generate import Completion
from executor.job.chat import ChatTemplate
from executor.job.outputs import completion_line, text_of
from executor.job.requests import LineReader, Rejected
from tests.executor.runtime.support import requests

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if not messages %}{{ raise_exception('no message') }}{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "user": 3, "assistant": 4, "[": 5, "]": 6, "hi": 7}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def read(tmp_path: Path, reader: LineReader, **line):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"custom_id": "a", **line}))
    (item,) = reader.read(path, frozenset())
    return item


def test_text_is_encoded(tmp_path, tokenizer):
    item = read(tmp_path, LineReader(tokenizer, None, 0), body={"prompt": "hi user"})
    assert isinstance(item, Request)
    assert item.prompt == (7, 3)
    assert item.params.max_tokens == 16
    assert not item.chat


def test_conversation_goes_through_the_template(tmp_path, tokenizer):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": TEMPLATE, "bos_token": {"content": "<s>"}})
    )
    template = ChatTemplate.of_checkpoint(folder)
    assert template is not None
    assert template.render([{"role": "user", "content": "hi"}]) == "<s>[user] hi\n[assistant]"
    reader = LineReader(tokenizer, template, 0)
    message = {"role": "user", "content": "hi"}
    item = read(tmp_path, reader, url="/v1/chat/completions", body={"messages": [message]})
    assert isinstance(item, Request)
    assert item.prompt[-6:] == (3, 6, 7, 5, 4, 6)
    assert item.chat
    body = completion_line(Completion(item, (7,), "length"), "m", "hi", chat=True)["response"]
    assert body["body"]["choices"][0]["message"] == {"role": "assistant", "content": "hi"}
    refused = read(tmp_path, reader, url="/v1/chat/completions", body={"messages": []})
    assert isinstance(refused, Rejected)
    assert "no message" in refused.message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b"[1]"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b'{"chat_template": "{% if"}'),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_malformed_template_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        ChatTemplate.of_checkpoint(tmp_path)


def test_template_cannot_reach_out_of_its_sandbox(tmp_path):
    template = ChatTemplate("{{ ''.__class__.__mro__[1].__subclasses__() }}", {}, tmp_path)
    with pytest.raises(JobError, match="chat template"):
        template.render([])


def test_checkpoint_without_template(tmp_path):
    assert ChatTemplate.of_checkpoint(tmp_path) is None


def test_stop_text_and_end_token_are_cut_off(tokenizer):
    (request,) = requests([[1]], stop=("user",))
    assert text_of(Completion(request, (7, 3, 7), "stop"), tokenizer, frozenset({2})) == "hi "
    assert text_of(Completion(request, (7, 2), "stop"), tokenizer, frozenset({2})) == "hi"
    assert text_of(Completion(request, (7, 7), "length"), None, frozenset()) == ""
