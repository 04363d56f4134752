"""Chat templates: messages to the text that a model continues."""

from pathlib import Path
from typing import Any, final

from executor.checkpoint import DOWNLOAD_AGAIN
from executor.errors import CheckpointError, JobError
from executor.guard import told_as
from hrm.decoding import read_json_object, read_text


@final
class ChatTemplate:
    """A checkpoint's chat template; it runs in a sandbox, for a template is code.

    Raises CheckpointError if `source`, which was read from `path`, is no template.
    """

    def __init__(self, source: str, special_tokens: dict[str, str], path: Path) -> None:
        from executor.job.template_sandbox import LimitedEnvironment

        self._environment = LimitedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self._environment.globals["raise_exception"] = _raise_exception
        where, rule = f"{path}: chat template", "must be a jinja template"
        with told_as(CheckpointError, where, rule, DOWNLOAD_AGAIN):
            self._template = self._environment.from_string(source)
        self._special_tokens = special_tokens

    @staticmethod
    def of_checkpoint(folder: Path) -> "ChatTemplate | None":
        """The template in chat_template.jinja or tokenizer_config.json; None if there is none."""
        config_path, path = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        config: dict[str, Any] = {}
        if config_path.exists():
            config = read_json_object(
                config_path, "a readable JSON file", CheckpointError, remedy=DOWNLOAD_AGAIN
            )
        if path.exists():
            source = read_text(path, "a readable text", CheckpointError, remedy=DOWNLOAD_AGAIN)
        else:
            path, source = config_path, config.get("chat_template")
        if isinstance(source, list):  # several named ones
            named = [item for item in source if isinstance(item, dict)]
            default = (x.get("template") for x in named if x.get("name") == "default")
            source = next(default, None)
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
        self._environment.begin()
        rule = "must suit the model's chat template"
        with told_as(JobError, "body: messages", rule, "correct the messages"):
            return self._template.render(
                messages=messages, add_generation_prompt=True, **self._special_tokens
            )


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
