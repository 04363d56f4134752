"""Chat templates: messages to the text that a model continues, every call of jinja2 but those of its sandbox.

Templates run as in transformers' `apply_chat_template` (5.23, utils/chat_template_utils.py): the
same sandbox, filters, functions, tags and variables, so that they render the same text.
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from executor.errors import CheckpointError, JobError
from executor.guard import told_as
from executor.job.tokenizer_config import TokenizerConfig, read_settings
from executor.safetensors_file import DOWNLOAD_AGAIN
from hrm.decoding import read_text

if TYPE_CHECKING:
    from jinja2 import Template

    from executor.job.template_sandbox import LimitedEnvironment

TEMPLATE_FILE: Final = "chat_template.jinja"
TEMPLATE_FOLDER: Final = "additional_chat_templates"
TEMPLATES: Final = "*.jinja"  # in that folder
PROCESSOR_FILE: Final = "chat_template.json"
DEFAULT: Final = "default"
# The names that a message's reasoning is passed under; the first is what templates read.
REASONING: Final = ("reasoning_content", "thinking", "reasoning")
OWN_VARIABLES: Final = ("messages", "tools", "documents", "add_generation_prompt")
_MARK: Final = "QXZ"  # stands for a text in the messages that find out what a template reads


@final
class ChatTemplate:
    """A checkpoint's chat template; it runs in a sandbox, for a template is code.

    `source` was read from `path`. It is compiled when the first messages come.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], path: Path) -> None:
        self._source, self._path = source, path
        self._special_tokens = dict(special_tokens)

    @staticmethod
    def of_checkpoint(folder: Path) -> "ChatTemplate | None":
        """The template of the files beside a tokenizer; None if there is none.

        Files of templates count before tokenizer_config.json and that before chat_template.json, and
        among several named ones the one named default. Raises CheckpointError if a file cannot be
        read, or none is the default.
        """
        config = TokenizerConfig.of_checkpoint(folder)
        path, named = _templates(folder, config)
        if not named:
            return None
        source = named.get(DEFAULT)
        if source is None:
            raise CheckpointError(
                f"{path}: chat templates",
                f"<{', '.join(sorted(named))}>",
                f"must have one named {DEFAULT}",
                f"add it as {TEMPLATE_FILE}",
            )
        return ChatTemplate(source, config.special_tokens, path)

    def render(self, messages: list[Any], variables: Mapping[str, Any] | None = None) -> str:
        """The prompt that asks for the assistant's next message.

        `variables` are further ones, or other values of those that the template has, but for the
        messages. Raises JobError if the prompt cannot be made and CheckpointError if the template
        is none.
        """
        template = self._template
        messages = [
            _with_reasoning(_joined(message, index, self._reads_parts)) for index, message in enumerate(messages)
        ]
        rule = "must suit the model's chat template"
        with told_as(JobError, "body: messages", rule, "correct the messages"):
            return self._render(template, messages, variables or {})

    def _render(self, template: "Template", messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        self._environment.begin()
        given = {"tools": None, "documents": None, "add_generation_prompt": True}
        return template.render({**given, **self._special_tokens, **variables, "messages": messages})

    @cached_property
    def _template(self) -> "Template":
        where, rule = f"{self._path}: chat template", "must be a jinja template"
        with told_as(CheckpointError, where, rule, DOWNLOAD_AGAIN):
            return self._environment.from_string(self._source)

    @cached_property
    def _environment(self) -> "LimitedEnvironment":
        from executor.job.template_environment import environment

        return environment()

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the template takes content that is a list of parts, found out by trying."""

        def rendered(content: object) -> str:
            return self._render(self._template, [{"role": "user", "content": content}], {})

        try:
            parts = rendered([{"type": "text", "text": _MARK}])
        except Exception:  # noqa: BLE001 - a template is code and may fail in any way
            return False
        # One that takes texts alone shows the list as Python or JSON writes it.
        return _MARK in parts and f"text': '{_MARK}" not in parts and f'text": "{_MARK}' not in parts


# -- messages ---------------------------------------------------------------------------------


def _joined(message: dict[str, Any], index: int, reads_parts: bool) -> dict[str, Any]:  # noqa: FBT001
    """A message without nulls, its parts joined by line breaks if the template takes none."""
    message = {key: value for key, value in message.items() if value is not None}
    content = message.get("content", "")
    where = f"body: messages[{index}].content"
    if isinstance(content, str):
        return message
    if not isinstance(content, list):
        raise JobError(where, f"<{type(content).__name__}>", "must be a text or a list of parts", "correct it")
    texts = [_text_of_part(part, f"{where}[{number}]") for number, part in enumerate(content)]
    if reads_parts:
        return {**message, "content": [{"type": "text", "text": text} for text in texts]}
    return {**message, "content": "\n".join(texts)}


def _text_of_part(part: Any, where: str) -> str:
    """The text of a part; JobError naming its type if it has none."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise JobError(where, f"<{type(part).__name__}>", "must be an object", "correct it")
    kind = part.get("type", "text")
    key = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}.get(
        kind if isinstance(kind, str) else ""
    )
    if key is None:
        raise JobError(
            f"{where}.type",
            kind,
            "must be text: the model reads no images, sounds or files",
            "leave the part out or describe it in words",
        )
    text = part.get(key)
    if not isinstance(text, str):
        raise JobError(f"{where}.{key}", "<malformed>", "must be a text", "correct it")
    return text


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning under the names that templates read."""
    given = next((message[key] for key in REASONING if key in message), None)
    if given is None:
        return message
    return {"thinking": given, **message, "reasoning_content": given}


# -- files ------------------------------------------------------------------------------------


def _templates(folder: Path, config: TokenizerConfig) -> tuple[Path, dict[str, str]]:
    """Where the templates are, and their texts by name."""
    path = folder / TEMPLATE_FILE
    named = {DEFAULT: _read_text(path)} if path.exists() else {}
    others = sorted((folder / TEMPLATE_FOLDER).glob(TEMPLATES))
    named |= {other.stem: _read_text(other) for other in others}
    if named:
        return (path if DEFAULT in named else others[0]), named
    path, source = config.path, config.settings.get("chat_template")
    if source is None:  # what processors of pictures were saved with before there were files of templates
        path = folder / PROCESSOR_FILE
        source = read_settings(path).get("chat_template")
    named = _named(source)
    if not all(isinstance(template, str) for template in named.values()):
        raise CheckpointError(
            f"{path}: chat_template", "<malformed>", "must be a text, or a list of named ones", DOWNLOAD_AGAIN
        )
    return path, named


def _named(source: Any) -> dict[Any, Any]:
    """The templates by name that a file gives as a list, or as one without a name."""
    if isinstance(source, list):
        return {
            item["name"]: item["template"]
            for item in source
            if isinstance(item, dict) and isinstance(item.get("name"), str) and "template" in item
        }
    return {} if source is None else {DEFAULT: source}


def _read_text(path: Path) -> str:
    return read_text(path, "a readable UTF-8 text", CheckpointError, remedy=DOWNLOAD_AGAIN)
