"""Chat templates: messages to the text that a model continues."""

import json
from pathlib import Path
from typing import Any, final

from executor.errors import CheckpointError, JobError


@final
class ChatTemplate:
    """A checkpoint's chat template; it runs in a sandbox, for a template is code.

    Raises CheckpointError if `source`, which was read from `path`, is no template.
    """

    def __init__(self, source: str, special_tokens: dict[str, str], path: Path) -> None:
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise_exception
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise CheckpointError(
                f"{path}: chat template", f"<{error}>", "must be a jinja template",
                "download the file again",
            ) from error  # fmt: skip
        self._special_tokens = special_tokens

    @staticmethod
    def of_checkpoint(folder: Path) -> "ChatTemplate | None":
        """The template in chat_template.jinja or tokenizer_config.json; None if there is none."""
        config_path, path = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        config = _read_config(config_path) if config_path.exists() else {}
        if path.exists():
            source = _read_text(path)
        else:
            path, source = config_path, config.get("chat_template")
        if isinstance(source, list):  # several named ones
            named = {item.get("name"): item.get("template") for item in source}
            source = named.get("default")
        if not isinstance(source, str):
            return None
        tokens: dict[str, str] = {}
        for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
            value = config.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                tokens[key] = value
        return ChatTemplate(source, tokens, path)

    def render(self, messages: list[Any]) -> str:
        """The prompt that asks for the assistant's next message; JobError if it cannot be made."""
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=True, **self._special_tokens
            )
        except Exception as error:  # a template is code and may fail in any way
            raise JobError(
                "body: messages", f"<{error}>", "must suit the model's chat template",
                "correct the messages",
            ) from error  # fmt: skip


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            str(path), f"<{error}>", "must be a readable UTF-8 text", "download the file again"
        ) from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(_read_text(path))
        if not isinstance(config, dict):
            raise TypeError(type(config).__name__)  # noqa: TRY301 - told with the other mistakes
    except (TypeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(
            str(path), f"<{error}>", "must be a JSON object", "download the file again"
        ) from error
    return config


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
