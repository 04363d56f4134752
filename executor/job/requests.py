"""Reads OpenAI batch lines; a bad line is rejected by itself and the others run."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from zlib import crc32

from tokenizers import Tokenizer

from executor.batching import Request
from executor.errors import JobError
from executor.guard import told_as
from executor.job.chat import ChatTemplate
from executor.sampling import SamplingParams
from hrm.decoding import Malformed, decode_json

COMPLETIONS: Final = "/v1/completions"
CHAT: Final = "/v1/chat/completions"
_SAMPLING: Final = {
    "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "ignore_eos",
    "stop_token_ids",
}  # fmt: skip
_IGNORED: Final = {"model", "user", "metadata", "store"}
_ONLY: Final[dict[str, tuple[Any, ...]]] = {
    "n": (1, None), "best_of": (1, None), "stream": (False, None), "echo": (False, None),
    "logprobs": (None, False), "suffix": (None, ""), "presence_penalty": (0, None),
    "frequency_penalty": (0, None), "logit_bias": (None, {}),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rejected:
    """A line that cannot be run, and why."""

    name: str
    message: str


@dataclass(frozen=True, slots=True)
class LineReader:
    """Turns lines into requests; `seed` is the job's, for requests without one."""

    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    seed: int

    def read(self, path: Path, skip: frozenset[str]) -> Iterator[Request | Rejected]:
        """Every line of the file that is not blank and whose custom_id is not in `skip`."""
        seen: set[str] = set()
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.strip():
                    continue
                name = f"line-{number}"
                try:
                    line = _object(_parse(raw), "line")
                    name = self._name(line, name, seen)
                    if name not in skip:
                        yield self._request(line, name)
                except JobError as error:
                    if name not in skip:
                        yield Rejected(name, f"{path.name}: line {number}: {error}")

    @staticmethod
    def _name(line: dict[str, Any], default: str, seen: set[str]) -> str:
        name = line.get("custom_id")
        if not isinstance(name, str) or not name:
            raise JobError(
                "custom_id", "<missing>" if name is None else name, "must be a text",
                f"name the request; it is reported as {default}",
            )  # fmt: skip
        if name in seen:
            raise JobError("custom_id", name, "must not occur twice", "give it a name of its own")
        seen.add(name)
        return name

    def _request(self, line: dict[str, Any], name: str) -> Request:
        unknown = line.keys() - {"custom_id", "method", "url", "body"}
        if unknown:
            raise JobError(
                min(unknown), line[min(unknown)],
                "is no field of a batch line: custom_id, method, url, body", "remove it",
            )  # fmt: skip
        if line.get("method", "POST") != "POST":
            raise JobError("method", line["method"], "must be POST", "correct it")
        url = line.get("url", COMPLETIONS)
        body = _object(line.get("body"), "body")
        params = sampling_params(body, self.seed ^ crc32(name.encode()))
        if url == COMPLETIONS:
            prompt = self._prompt(_field(body, "prompt", {"prompt"}))
        elif url == CHAT:
            prompt = self._chat(_field(body, "messages", {"messages"}))
        else:
            raise JobError("url", url, f"must be {COMPLETIONS} or {CHAT}", "correct it")
        if params.stop and self.tokenizer is None:
            raise JobError(
                "body: stop", params.stop, "needs a tokenizer, and the checkpoint has none",
                "use stop_token_ids",
            )  # fmt: skip
        return Request(name, prompt, params, chat=url == CHAT)

    def _prompt(self, prompt: Any) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return self._encode(prompt, "body: prompt", add_special_tokens=True)
        if isinstance(prompt, list) and all(type(token) is int for token in prompt):
            return tuple(prompt)
        raise JobError(
            "body: prompt", prompt if not isinstance(prompt, list) else "<a list>",
            "must be a text or a list of token ids", "write one request per prompt",
        )  # fmt: skip

    def _chat(self, messages: Any) -> tuple[int, ...]:
        if self.template is None:
            raise JobError(
                "url", CHAT, "needs a chat template, and the checkpoint has none",
                f"use {COMPLETIONS}",
            )  # fmt: skip
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise JobError(
                "body: messages", "<malformed>", "must be a list of objects", "correct it"
            )
        text = self.template.render(messages)
        return self._encode(text, "body: messages", add_special_tokens=False)

    def _encode(self, text: str, where: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        if self.tokenizer is None:
            raise JobError(
                where, "<a text>", "needs a tokenizer, and the checkpoint has no tokenizer.json",
                "give token ids",
            )  # fmt: skip
        with told_as(JobError, where, "must be a text that the tokenizer takes", "shorten it"):
            return tuple(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)


def sampling_params(body: dict[str, Any], default_seed: int) -> SamplingParams:
    """The sampling parameters of a request's body, by OpenAI's names and defaults."""
    values = {key: body[key] for key in _SAMPLING if body.get(key) is not None}
    if "max_completion_tokens" in values:
        values["max_tokens"] = values.pop("max_completion_tokens")
    if "stop" in values:
        stop = values["stop"]
        values["stop"] = (stop,) if isinstance(stop, str) else _tuple(stop, "stop")
    if "stop_token_ids" in values:
        values["stop_token_ids"] = _tuple(values["stop_token_ids"], "stop_token_ids")
    return SamplingParams(**{"seed": default_seed, **values})


def _parse(raw: bytes) -> Any:
    try:
        return decode_json(raw)
    except Malformed as error:
        raise JobError(
            "line", f"<{error}>", "must be a JSON object in UTF-8", "correct it"
        ) from error


def _tuple(value: Any, field: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise JobError(f"body: {field}", value, "must be a list", "correct the request")
    return tuple(value)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        shown = "<missing>" if value is None else f"<{type(value).__name__}>"
        raise JobError(where, shown, "must be an object", "correct the line")
    return value


def _field(body: dict[str, Any], needed: str, own: set[str]) -> Any:
    """The field that is needed, after a look at all others."""
    for key, value in body.items():
        if key in _ONLY and value not in _ONLY[key]:
            raise JobError(
                f"body: {key}", value, f"must be {_ONLY[key][0]!r}; more is not supported",
                "remove it",
            )  # fmt: skip
        if key not in own | _SAMPLING | _IGNORED | _ONLY.keys():
            raise JobError(f"body: {key}", value, "is no field known here", "remove it")
    if needed not in body:
        raise JobError(f"body: {needed}", "<missing>", "must be given", "add it")
    return body[needed]
