"""Chat templates: the same text as transformers makes of them, in the same sandbox."""

import json
from pathlib import Path
from typing import Any

import pytest

from executor.errors import CheckpointError, JobError
from executor.job.chat import ChatTemplate
from executor.job.template_sandbox import MAX_SOURCE
from tests.executor.tiny_models import edit_json

DATA = Path(__file__).parents[1] / "data"
CASES = json.loads((DATA / "templates.json").read_text(encoding="utf-8"))

CHATML = (
    "{%- if not messages[0]['role'] == 'system' %}{{ '<|im_start|>system\\nBe brief.\\n' }}"
    "{%- endif %}{%- for message in messages %}\n"
    "    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' -}}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}\n"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate!') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% endif %}"
    "{% endfor %}"
)
WITH_PARTS = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% elif part.type =="
    " 'image' %}<image>{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
)
# What published templates make use of, a kind each.
TEMPLATES = {
    "chatml": CHATML,
    "mistral": MISTRAL,
    "parts": WITH_PARTS,
    "tojson with options": "{{ messages | tojson(indent=2, sort_keys=true) }}"
    "{{ messages[0] | tojson(separators=(',', ':'), ensure_ascii=true) }}",
    "loop controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}"
    "{{ m.content }}{% break %}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% set x = 1 %}{% endgeneration %}{{ x is defined }}{% endif %}{% endfor %}",
    "absent tools": "{{ tools is none }}{{ documents is none }}{{ tools is defined }}"
    "{% if not tools %}none{% endif %}{{ nothing is defined }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ sep_token }}{{ cls_token }}"
    "{{ unk_token }}{{ mask_token }}{{ additional_special_tokens }}",
    "white space": "  {% if true %}\n    kept\n  {% endif %}\n\t{# remark #}\nend\n",
    "namespace": "{% set ns = namespace(found=false) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.found = m.content %}{% endif %}{% endfor %}{{ ns.found }}",
    "dict": "{{ dict(a=1, b='é') | tojson }}{{ dict.fromkeys(['k'], 2) }}",
    "reasoning": "{{ messages[-1].reasoning_content }}/{{ messages[-1].thinking }}",
    "filters": "{{ messages[0].content | trim | upper | replace('&', 'and') }}"
    "{{ messages | map(attribute='role') | join(',') }}{{ messages[0].content.split(' ')[0] }}",
    "macro": "{% macro say(m) %}<{{ m.role }}>{{ caller() if caller else '' }}{% endmacro %}"
    "{% for m in messages %}{{ say(m) }}{% endfor %}",
    "undefined key": "{{ messages[0].name }}|{{ messages[0]['tool_calls'] is defined }}",
}
# What the templates of whole families do, in words of our own.
FAMILIES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((DATA / "templates").glob("*.jinja"))}
# What must fail on both sides.
BROKEN = {
    "raises": "{{ raise_exception('not so') }}",
    "attribute": "{{ ''.__class__.__mro__ }}",
    "changes": "{{ messages.append(1) }}",
    "private namespace": "{% set ns = namespace() %}{% set ns._x = 1 %}",
    "private namespace at once": "{{ namespace(__init__=1) }}",
    "dict's class": "{{ dict.__class__ }}{{ dict.mro() }}",
    "undefined": "{{ nothing.at.all }}",
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": " Who's <b>é & co"}],
    "three": [
        {"role": "user", "content": "One."},
        {"role": "assistant", "content": "Two.", "reasoning": "because", "tool_calls": None},
        {"role": "user", "content": "Three\u2028."},
    ],
    "no content": [{"role": "user", "content": "Add."}, {"role": "assistant", "content": None, "thinking": "1 + 1"}],
}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": [1, "é"], "b": "two"}}}
LONGER: dict[str, list[dict[str, Any]]] = {
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi.\n"}],
    "thoughts": [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "<mind>\nso\n</mind>\n\nTwo"},
        {"role": "user", "content": "Three"},
        {"role": "assistant", "content": "Four", "reasoning_content": "\nthus\n"},
    ],
    "calls": [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": '{"sum": 3}'},
        {"role": "tool", "content": "4"},
        {"role": "user", "content": "And?"},
    ],
}
VARIABLES: list[dict[str, Any]] = [
    {},
    {"enable_thinking": False, "thinking": True, "effort": "high", "add_generation_prompt": False},
    {"documents": [{"doc_id": 7, "text": "é <b>"}, {"title": "t"}]},
]
CONFIGS: dict[str, dict[str, dict[str, Any]]] = {
    "config alone": {
        "tokenizer_config.json": {
            "bos_token": "<s>",
            "eos_token": {"content": "</s>", "__type": "AddedToken"},
            "pad_token": None,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
    },
    "map of old": {
        "tokenizer_config.json": {"bos_token": "<old>", "tokenizer_class": "PreTrainedTokenizerFast"},
        "special_tokens_map.json": {
            "bos_token": {
                "content": "<s>",
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
            },
            "eos_token": "</s>",
            "mask_token": "<mask>",
            "additional_special_tokens": ["<x>"],
        },
    },
    "map that no longer counts": {
        "tokenizer_config.json": {
            "bos_token": "<s>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": {
                "1": {
                    "content": "<s>",
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
            },
        },
        "special_tokens_map.json": {"bos_token": "<old>", "eos_token": "</old>"},
    },
}


def write_model(folder: Path, config: str = "config alone", template: object = None) -> Path:
    """The files of a tokenizer, as they lie beside a model."""
    from tokenizers import Tokenizer, models

    words = {word: i for i, word in enumerate(("<unk>", "<s>", "</s>", "<mask>", "<old>", "</old>"))}
    Tokenizer(models.WordLevel(words, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    for name, content in CONFIGS[config].items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    edit_json(folder / "tokenizer_config.json", chat_template=template)
    return folder


def theirs(folder: Path, messages: list[dict[str, Any]], **variables: Any) -> str:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(messages, **{"tokenize": False, "add_generation_prompt": True, **variables})


def ours(folder: Path, messages: list[dict[str, Any]], **variables: Any) -> str:
    template = ChatTemplate.of_checkpoint(folder)
    assert template is not None
    return template.render(messages, variables)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_published_rendering(case, tmp_path):
    assert ChatTemplate(case["template"], {}, tmp_path).render(case["messages"]) == case["rendered"]


@pytest.fixture(scope="module", params=CONFIGS)
def configured(request, tmp_path_factory):
    """A folder, and the tokenizer that transformers makes of it."""
    from transformers import AutoTokenizer

    folder = write_model(tmp_path_factory.mktemp("model"), request.param, "none")
    return folder, AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers(name, configured):
    folder, tokenizer = configured
    edit_json(folder / "tokenizer_config.json", chat_template=TEMPLATES[name])
    for messages in CONVERSATIONS.values():
        try:
            expected = tokenizer.apply_chat_template(
                messages, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True
            )
        except Exception:  # noqa: BLE001 - whatever a template that wants another conversation raises
            with pytest.raises(JobError):
                ours(folder, messages)
        else:
            assert ours(folder, messages) == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_what_families_do_renders_as_in_transformers(name, configured):
    folder, tokenizer = configured
    edit_json(folder / "tokenizer_config.json", chat_template=FAMILIES[name])
    template = ChatTemplate.of_checkpoint(folder)
    assert template is not None
    rendered = 0
    for messages in (CONVERSATIONS | LONGER).values():
        for given in VARIABLES:
            variables = {"add_generation_prompt": True, **given}
            # Thoughts pass under every name that a template may read them by.
            thoughts = (message.get("reasoning_content") for message in messages)
            said = [
                {**message, **({"thinking": thought} if thought is not None else {})}
                for message, thought in zip(messages, thoughts, strict=True)
            ]
            try:
                expected = tokenizer.apply_chat_template(
                    said, chat_template=FAMILIES[name], tokenize=False, **variables
                )
            except Exception:  # noqa: BLE001 - as above
                with pytest.raises(JobError):
                    template.render(messages, variables)
            else:
                assert template.render(messages, variables) == expected
                rendered += 1
    assert rendered >= 9


@pytest.mark.parametrize("name", BROKEN)
def test_fails_as_in_transformers(name, tmp_path):
    folder = write_model(tmp_path, template=BROKEN[name])
    with pytest.raises(Exception):  # noqa: B017 - of several kinds
        theirs(folder, CONVERSATIONS["one"])
    with pytest.raises(JobError, match="chat template"):
        ours(folder, CONVERSATIONS["one"])


def test_variables_of_a_request(tmp_path):
    source = "{{ enable_thinking }}{{ documents }}{{ add_generation_prompt }}{{ bos_token }}"
    folder = write_model(tmp_path, template=source)
    given = {
        "enable_thinking": False,
        "documents": [{"title": "a", "text": "b"}],
        "add_generation_prompt": False,
        "bos_token": "[",
    }
    assert ours(folder, CONVERSATIONS["one"], **given) == theirs(folder, CONVERSATIONS["one"], **given)


@pytest.mark.parametrize("where", ["file", "named list", "folder of more"])
def test_template_is_found_where_transformers_finds_it(where, tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "list"}]
    folder = write_model(tmp_path, template=named if where == "named list" else "old")
    if where != "named list":
        (folder / "chat_template.jinja").write_text("file", encoding="utf-8")
    if where == "folder of more":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "rag.jinja").write_text("rag", encoding="utf-8")
    assert ours(folder, CONVERSATIONS["one"]) == theirs(folder, CONVERSATIONS["one"])


def test_templates_without_a_default_are_refused(tmp_path):
    folder = write_model(tmp_path, template=[{"name": "rag", "template": "x"}])
    with pytest.raises(ValueError, match="no default"):
        theirs(folder, CONVERSATIONS["one"])
    with pytest.raises(CheckpointError, match="default"):
        ChatTemplate.of_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b"[1]"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b'{"chat_template": "{% if"}'),
        ("tokenizer_config.json", b'{"chat_template": {"default": 3}}'),
        ("chat_template.jinja", b"\xff\xfe"),
    ],
)
def test_malformed_template_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        ours(tmp_path, CONVERSATIONS["one"])


def test_template_of_a_processor_counts_where_there_is_no_other(tmp_path):
    folder = write_model(tmp_path)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "[{{ messages[0].content }}]"}))
    assert ours(folder, [{"role": "user", "content": "hi"}]) == "[hi]"
    edit_json(folder / "tokenizer_config.json", chat_template="config")
    assert ours(folder, CONVERSATIONS["one"]) == theirs(folder, CONVERSATIONS["one"]) == "config"


def test_template_without_bounds_is_refused(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("x" * (MAX_SOURCE + 1))
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja.*1,000,000 characters"):
        ours(tmp_path, CONVERSATIONS["one"])


def test_checkpoint_without_template(tmp_path):
    assert ChatTemplate.of_checkpoint(tmp_path) is None


# -- content in parts -------------------------------------------------------------------------

PARTS = [{"type": "text", "text": "Who took"}, {"type": "text", "text": "away the gods?"}]


@pytest.mark.parametrize("name", ["chatml", "mistral", "filters"])
def test_parts_are_joined_for_a_template_that_takes_texts(name, tmp_path):
    folder = write_model(tmp_path, template=TEMPLATES[name])
    joined = [{"role": "user", "content": "Who took\naway the gods?"}]
    rendered = ours(folder, [{"role": "user", "content": PARTS}])
    assert rendered == ours(folder, joined) == theirs(folder, joined)


def test_parts_are_passed_to_a_template_that_takes_them(tmp_path):
    folder = write_model(tmp_path, template=WITH_PARTS)
    messages = [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "I."}]
    assert ours(folder, messages) == theirs(folder, messages)
    assert "Who tookaway" in ours(folder, messages)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image_url", "image_url": {"url": "data:,"}}, ["[1].type", "image_url"]),
        ({"type": "input_audio", "input_audio": {}}, ["[1].type", "input_audio"]),
        ({"type": "text"}, ["[1].text", "a text"]),
        ({"type": ["text"]}, ["[1].type"]),
        (3, ["[1]", "an object"]),
    ],
)
def test_other_parts_are_refused_by_name(part, words, tmp_path):
    template = ChatTemplate(WITH_PARTS, {}, tmp_path)
    with pytest.raises(JobError) as caught:
        template.render([{"role": "user", "content": [PARTS[0], part]}])
    for word in ("messages[0].content", *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("content", [3, {"type": "text", "text": "a"}, True])
def test_content_of_another_kind_is_refused(content, tmp_path):
    with pytest.raises(JobError, match="must be a text or a list of parts"):
        ChatTemplate(CHATML, {}, tmp_path).render([{"role": "user", "content": content}])
