"""Reads OpenAI batch lines; a bad line is rejected by itself and the others run."""

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, final
from zlib import crc32

from executor.batching import Request
from executor.errors import JobError
from executor.guard import told_as
from executor.job.chat import OWN_VARIABLES, ChatTemplate
from executor.job.fields import CHAT, COMPLETIONS, URLS, checked_fields, needed, sampling_params, truth
from executor.job.identity import digest_of_line
from executor.job.input_file import MAX_LINE_BYTES, Input, is_parquet, lines_in, open_input, path_of, told_of_reading
from executor.job.parquet import lines_of_parquet
from executor.job.room import AnswerRoom
from executor.job.sampling_defaults import SamplingDefaults
from executor.job.tokenizer import TextTokenizer, missing_tokenizer
from executor.job.tokenizer_config import TokenizerConfig
from executor.sampling import SamplingParams
from hrm.decoding import Malformed, decode_json
from hrm.errors import HrmError
from hrm.units import format_bytes


@dataclass(frozen=True, slots=True)
class Rejected:
    """A line that cannot be run, and why."""

    name: str
    message: str


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the input that is not blank: its custom_id and object, or what is wrong with it."""

    number: int
    name: str
    content: dict[str, Any]
    error: JobError | None = None


def lines_of(path: Input) -> Iterator[Line]:
    """Every line of the file that is not blank, or every row; of those that are broken `name` is empty."""
    seen: set[str] = set()
    with open_input(path) as file, told_of_reading(path):
        rows = lines_of_parquet(file, f"--input: {path}") if is_parquet(file) else None
        for number, raw in enumerate(lines_in(file) if rows is None else rows, start=1):
            if isinstance(raw, bytes) and not raw.strip():
                continue
            try:
                content = _object(parsed(raw, "line"), "line") if isinstance(raw, bytes) else with_body(raw)
                name = _name(content, seen)
            except JobError as error:
                yield Line(number, "", {}, error)
            else:
                yield Line(number, name, content)


@final
class LineReader:
    """Turns lines into requests for the model whose checkpoint is in `folder`.

    `seed` and `defaults` are for requests that do not say. `tell` is called with what the user should
    know of them, once each. Raises CheckpointError if the folder's tokenizer cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        room: AnswerRoom,
        seed: int = 0,
        tell: Callable[[str], object] = print,
        defaults: SamplingDefaults | None = None,
    ) -> None:
        self.tokenizer = TextTokenizer.of_checkpoint(folder)
        self._folder, self._room, self._seed, self._tell = folder, room, seed, tell
        self.defaults = defaults or SamplingDefaults()
        self._told = set[str]()

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The token that ends a text by the tokenizer's settings, which config.json may not name."""
        if self.tokenizer is None:
            return ()
        end = TokenizerConfig.of_checkpoint(self._folder).special_tokens.get("eos_token")
        number = None if end is None else self.tokenizer.id_of(end)
        return () if number is None else (number,)

    def read(
        self, path: Input, answered: Container[str] = (), names: Mapping[int, str] | None = None
    ) -> Iterator[Request | Rejected]:
        """Every line of the file that is not blank and whose custom_id is not yet answered.

        `names` are those of broken lines, by their numbers [default: `line-2` and the like].
        """
        for line in lines_of(path):
            if line.name in answered:
                continue
            name = line.name or (names or {}).get(line.number, f"line-{line.number}")
            try:
                yield self.request(line)
            except HrmError as error:  # of the line, or of a file that it alone needs
                yield Rejected(name, f"{path_of(path).name}: line {line.number}: {error}")

    def request(self, line: Line) -> Request:
        """The request of a line; HrmError if it cannot be run."""
        if line.error is not None:
            raise line.error
        rule = "must be what the model's tokenizer takes"
        with told_as(JobError, "body", rule, "shorten or correct it"):
            return self._request(line.content, line.name)

    def _request(self, line: dict[str, Any], name: str) -> Request:
        digest = digest_of_line(line)
        line = {key: value for key, value in line.items() if value is not None}
        unknown = line.keys() - {"custom_id", "method", "url", "body"}
        if unknown:
            raise JobError(
                min(unknown),
                line[min(unknown)],
                "is no field of a batch line: custom_id, method, url, body",
                "remove it",
            )
        if line.get("method", "POST") != "POST":
            raise JobError("method", line["method"], "must be POST", "correct it")
        url = line.get("url", COMPLETIONS)
        if url not in URLS:
            raise JobError("url", url, f"must be {' or '.join(URLS)}", "correct it")
        fields = checked_fields(_object(line.get("body"), "body"), url)
        params = sampling_params(fields, self._seed ^ crc32(name.encode()), self.defaults.values)
        params = self._with_special_stops(params)
        if self.defaults.decides(fields):
            self._tell_once(self.defaults.notice)
        if self.defaults.left_out:
            self._tell_once(self.defaults.left_out_notice)
        chat = url == CHAT
        prompt = self._chat(fields) if chat else self._prompt(fields)
        open_ended = chat and not fields.keys() & {"max_tokens", "max_completion_tokens"}
        if open_ended:
            self._tell_once(self._room.notice)
            params = replace(params, max_tokens=self._room.max_tokens(len(prompt)))
        return Request(name, prompt, params, chat=chat, open_ended=open_ended, digest=digest)

    def _tell_once(self, notice: str) -> None:
        if notice not in self._told:
            self._told.add(notice)
            self._tell(notice)

    def _with_special_stops(self, params: SamplingParams) -> SamplingParams:
        """A stop text that is a special token stops at its id, which decodes to no text."""
        if not params.stop:
            return params
        if self.tokenizer is None:
            raise JobError(
                "body: stop", "<a text>", "needs a tokenizer, and the checkpoint has none", "use stop_token_ids"
            )
        ids = [number for stop in params.stop if (number := self.tokenizer.special_id(stop)) is not None]
        return replace(params, stop_token_ids=(*params.stop_token_ids, *ids))

    def _prompt(self, fields: dict[str, Any]) -> tuple[int, ...]:
        prompt = needed(fields, "prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            prompt = prompt[0]
        if isinstance(prompt, str):
            special = truth(fields, "add_special_tokens", default=True)
            return self._encode(prompt, "body: prompt", add_special_tokens=special)
        if isinstance(prompt, list) and all(type(token) is int for token in prompt):
            return tuple(prompt)
        raise JobError(
            "body: prompt",
            prompt if not isinstance(prompt, list) else "<a list>",
            "must be a text or a list of token ids",
            "write one request per prompt",
        )

    def _chat(self, fields: dict[str, Any]) -> tuple[int, ...]:
        messages = needed(fields, "messages")
        template = self._template
        if template is None:
            raise JobError("url", CHAT, "needs a chat template, and the checkpoint has none", f"use {COMPLETIONS}")
        if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
            raise JobError("body: messages", "<malformed>", "must be a list of objects", "correct it")
        if not messages:
            raise JobError("body: messages", "<empty>", "must hold a message", "add one")
        text = template.render(messages, _template_variables(fields))
        special = truth(fields, "add_special_tokens", default=False)
        return self._encode(text, "body: messages", add_special_tokens=special)

    @cached_property
    def _template(self) -> ChatTemplate | None:
        """The chat template; its files are read when the first chat line comes."""
        return ChatTemplate.of_checkpoint(self._folder)

    def _encode(self, text: str, where: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        if self.tokenizer is None:
            raise JobError(
                where,
                "<a text>",
                "needs a tokenizer, and the checkpoint has no tokenizer.json",
                missing_tokenizer(self._folder),
            )
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)


def _name(line: dict[str, Any], seen: set[str]) -> str:
    name = line.get("custom_id")
    if not isinstance(name, str) or not name:
        raise JobError("custom_id", "<missing>" if name is None else name, "must be a text", "name the request")
    if name in seen:
        raise JobError("custom_id", name, "must not occur twice", "give it a name of its own")
    seen.add(name)
    return name


def _template_variables(fields: dict[str, Any]) -> dict[str, Any]:
    """What a request gives to the chat template beside its messages."""
    given = _object(fields.get("chat_template_kwargs", {}), "body: chat_template_kwargs")
    own = min(given.keys() & set(OWN_VARIABLES), default=None)
    if own is not None:
        raise JobError(f"body: chat_template_kwargs: {own}", "<given>", "is set by a field of the body", "remove it")
    documents = fields.get("documents")
    if documents is not None and (
        not isinstance(documents, list) or not all(isinstance(one, dict) for one in documents)
    ):
        raise JobError("body: documents", "<malformed>", "must be a list of objects", "correct it")
    return {
        **given,
        "documents": documents,
        "add_generation_prompt": truth(fields, "add_generation_prompt", default=True),
    }


def parsed(raw: bytes, where: str) -> Any:
    """What a line or a body says in JSON; JobError naming `where` if it is too long or none."""
    if len(raw) > MAX_LINE_BYTES:
        most = format_bytes(MAX_LINE_BYTES)
        raise JobError(where, f"<over {most}>", f"must have at most {most}", "shorten it")
    try:
        return decode_json(raw)
    except Malformed as error:
        raise JobError(where, f"<{error}>", "must be a JSON object in UTF-8", "correct it") from error


def with_body(line: dict[str, Any]) -> dict[str, Any]:
    """The line of a row, whose body may be a text in JSON; JobError if it is none."""
    body = line["body"]
    return {**line, "body": parsed(body.encode(errors="surrogatepass"), "body")} if isinstance(body, str) else line


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        shown = "<missing>" if value is None else f"<{type(value).__name__}>"
        raise JobError(where, shown, "must be an object", "correct the line")
    return value
