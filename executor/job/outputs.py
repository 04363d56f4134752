"""The run directory: locked while in use, and nothing that was written to it is ever lost."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Self, final

from executor.batching import Completion
from executor.errors import JobError
from executor.job.requests import Rejected
from executor.job.tokenizer import TextTokenizer
from hrm.decoding import decode_json
from hrm.files import NewFile, closing_on_error, open_append, open_regular, remove_unfinished, replaceable, write_all
from hrm.locks import open_locked

if TYPE_CHECKING:
    from io import FileIO

OUTPUTS: Final = "outputs.jsonl"
LOCK: Final = ".lock"
MARK: Final = "run"  # of files under way that are written by who holds the lock


@final
class RunDirectory:
    """A directory that one run writes to; a context manager that holds its lock.

    With `resume`, `answered` maps the names of the requests that earlier runs have answered to the
    digests of their lines, None where a version before wrote none. Requests with an error are not
    among them: they are tried again. Nothing in the outputs changes before `begin`.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        self.answered: Mapping[str, str | None] = {}
        self._file: FileIO | None = None
        self._kept_bytes = 0
        self._error_lines = set[int]()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open_locked(path / LOCK)
        except BlockingIOError as error:
            raise JobError(
                "--output-dir",
                str(path),
                f"is {error.strerror}, another run",
                "wait for it or choose another directory",
            ) from error
        except OSError as error:
            raise JobError(
                "--output-dir", str(path), f"cannot be written to ({error.strerror})", "choose another"
            ) from error
        try:
            with closing_on_error(self._lock):
                replaceable(self._outputs)  # first: it may be a link or a pipe
                if resume:
                    self.answered = self._answers()
                else:
                    self._refuse_outputs()
        except OSError as error:
            raise _not_written(self._outputs, error) from error

    def __enter__(self) -> Self:
        """The directory is locked from construction on."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Give up the lock."""
        if self._file is not None:
            self._file.close()
        self._lock.close()

    @property
    def _outputs(self) -> Path:
        return self.path / OUTPUTS

    def _refuse_outputs(self) -> None:
        if self._outputs.exists() and self._outputs.stat().st_size:
            raise JobError(
                "--output-dir",
                str(self.path),
                f"already holds {OUTPUTS}",
                "choose another directory, or go on with --resume",
            )

    def begin(self) -> None:
        """Make the outputs ready for more: all answers stay, a line cut short and errors go.

        The errors' requests are run again and get a line anew, so that each has one in the end.
        Files that a run which was killed had half written go too: their names are those of writers
        that hold the directory's lock, and that is ours.
        """
        try:
            remove_unfinished(self.path, MARK)
            if self._error_lines:
                self._copy_answers()
            self._file = open_append(self._outputs)
            if not self._error_lines:
                self._file.truncate(self._kept_bytes)
        except OSError as error:
            raise _not_written(self._outputs, error) from error

    def _copy_answers(self) -> None:
        with self._reading() as before, NewFile(self._outputs, MARK) as after:
            for number, raw in enumerate(before, start=1):
                if raw.endswith(b"\n") and number not in self._error_lines:
                    after.write(raw)
            after.commit()

    def _reading(self) -> BinaryIO:
        return open_regular(self._outputs, "outputs that a run wrote", JobError)

    def append(self, line: dict[str, Any]) -> None:
        """Write an output line; it is in the file when this returns, and on disk after `sync`."""
        assert self._file is not None, "begun"
        data = json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        try:
            write_all(self._file.fileno(), data)
        except OSError as error:
            raise _not_written(self._outputs, error) from error

    def sync(self) -> None:
        """Return when all that was written is on disk."""
        assert self._file is not None, "begun"
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _not_written(self._outputs, error) from error

    def write(self, name: str, content: str | bytes) -> None:
        """Write the file `name`, whole or not at all; JobError if it cannot be."""
        try:
            with NewFile(self.path / name, MARK) as new:
                new.write(content.encode() if isinstance(content, str) else content)
                new.commit()
        except OSError as error:
            raise _not_written(self.path / name, error) from error

    def _answers(self) -> dict[str, str | None]:
        """Digests of the requests answered so far, by name.

        No run answers a request twice, so two answers were put together by hand, and which of them
        counts is not ours to choose: JobError.
        """
        digests: dict[str, str | None] = {}
        for number, name, digest in self._finished():
            if name in digests:
                raise JobError(
                    f"{self._outputs}: line {number}: custom_id",
                    name,
                    "must have one answer, and has another in a line before",
                    "remove the line that does not count, or choose another --output-dir",
                )
            digests[name] = digest
        return digests

    def _finished(self) -> Iterator[tuple[int, str, str | None]]:
        """Line, name and digest of the requests answered so far, whatever a crash left behind them."""
        if not self._outputs.exists():
            return
        with self._reading() as file:
            for number, raw in enumerate(file, start=1):
                if not raw.endswith(b"\n"):
                    break
                self._kept_bytes += len(raw)
                try:
                    line = decode_json(raw)
                    name, response = _text(line["custom_id"]), line["response"]
                    if response is None:
                        self._error_lines.add(number)
                    else:
                        yield number, name, _digest_in(_text(response["request_id"]), name)
                except (ValueError, KeyError, TypeError) as error:
                    raise JobError(
                        f"{self._outputs}: line {number}",
                        f"<{error}>",
                        "must be an output line to resume from",
                        "choose another --output-dir",
                    ) from error


def _not_written(path: Path, error: OSError) -> JobError:
    return JobError(
        str(path),
        f"<{error.strerror}>",
        "must be writable, with room on the disk",
        "what it holds is kept: make room and go on with --resume, or choose another --output-dir",
    )


def rejected_line(rejected: Rejected) -> dict[str, Any]:
    """The output line of a request that was not run."""
    return _error_line(rejected.name, "invalid_request", rejected.message)


def failed_line(name: str, message: str) -> dict[str, Any]:
    """The output line of a request that was run and went wrong."""
    return _error_line(name, "request_failed", message)


def _error_line(name: str, code: str, message: str) -> dict[str, Any]:
    return {"id": f"batch_req_{name}", "custom_id": name, "response": None, "error": {"code": code, "message": message}}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where a text must be")
    return value


def _digest_in(request_id: str, name: str) -> str | None:
    """The digest that `completion_line` put there; versions before repeated the name."""
    return None if request_id == f"req_{name}" else request_id.removeprefix("req_")


def completion_line(
    completion: Completion, model: str, text: str, *, chat: bool = False, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The output line of a request that was run, in the OpenAI batch output form."""
    name = completion.request.name
    choice = {
        "index": 0,
        **({"message": {"role": "assistant", "content": text}} if chat else {"text": text}),
        "token_ids": list(completion.tokens),
        "finish_reason": completion.finish_reason,
        "logprobs": logprobs,
    }
    prompt, generated = len(completion.request.prompt), len(completion.tokens)
    body = {
        "id": f"cmpl-{name}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated},
    }
    return {
        "id": f"batch_req_{name}",
        "custom_id": name,
        "response": {"status_code": 200, "request_id": f"req_{completion.request.digest or name}", "body": body},
        "error": None,
    }


def logprobs_json(completion: Completion, tokenizer: TextTokenizer | None, *, chat: bool) -> dict[str, Any] | None:
    """The log probabilities of all tokens, the one that ended it too; None if not asked for.

    In the form of OpenAI's chat or completions API; without a tokenizer tokens are named by id.
    """
    if not completion.logprobs:
        return None
    prompt, tokens, logprobs = completion.request.prompt, completion.tokens, completion.logprobs
    texts = [
        tokenizer.continuation([*prompt, *tokens[:index]], tokens[index : index + 1])
        if tokenizer is not None
        else f"token_id:{token}"
        for index, token in enumerate(tokens)
    ]
    if chat:
        items = zip(texts, logprobs, strict=True)
        return {
            "content": [
                {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
                for text, logprob in items
            ]
        }
    return {
        "tokens": texts,
        "token_logprobs": list(logprobs),
        "top_logprobs": [{text: one} for text, one in zip(texts, logprobs, strict=True)],
        "text_offset": [0, *accumulate(map(len, texts[:-1]))],
    }


def text_of(completion: Completion, tokenizer: TextTokenizer | None, eos: frozenset[int]) -> str:
    """The generated text, without the token or from the stop text on that ended it."""
    if tokenizer is None:
        return ""
    params, tokens = completion.request.params, list(completion.tokens)
    if completion.finish_reason == "stop" and (tokens[-1] in eos or tokens[-1] in params.stop_token_ids):
        tokens.pop()
    text = tokenizer.continuation(completion.request.prompt, tokens)
    ends = [text.find(stop) for stop in params.stop if stop in text]
    return text[: min(ends)] if ends else text
