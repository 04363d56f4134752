"""The run directory: locked while in use, and nothing that was written to it is ever lost."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Self, final

from tokenizers import Tokenizer

from executor.errors import JobError
from executor.generate import Completion
from executor.job.requests import Rejected
from hrm.decoding import decode_json
from hrm.files import (
    NewFile,
    closing_on_error,
    open_append,
    open_locked,
    replace_durably,
    write_all,
)

OUTPUTS: Final = "outputs.jsonl"
LOCK: Final = ".lock"


@final
class RunDirectory:
    """A directory that one run writes to; a context manager that holds its lock.

    With `resume`, `done` names the requests that earlier runs have written.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        self.done: frozenset[str] = frozenset()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open_locked(path / LOCK)
        except BlockingIOError as error:
            raise JobError(
                "--output-dir", str(path), f"is {error.strerror}, another run",
                "wait for it or choose another directory",
            ) from error  # fmt: skip
        except OSError as error:
            raise JobError(
                "--output-dir", str(path), f"cannot be written to ({error.strerror})",
                "choose another",
            ) from error  # fmt: skip
        try:
            with closing_on_error(self._lock):
                self._file = open_append(self._outputs)  # first: it may be a link or a pipe
                with closing_on_error(self._file):
                    if resume:
                        self.done = frozenset(self._finished())
                    else:
                        self._refuse_outputs()
        except OSError as error:
            raise _not_written(self._outputs, error) from error

    def __enter__(self) -> Self:
        """The directory is locked from construction on."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Give up the lock."""
        self._file.close()
        self._lock.close()

    @property
    def _outputs(self) -> Path:
        return self.path / OUTPUTS

    def _refuse_outputs(self) -> None:
        if self._outputs.exists() and self._outputs.stat().st_size:
            raise JobError(
                "--output-dir", str(self.path), f"already holds {OUTPUTS}",
                "choose another directory, or go on with --resume",
            )  # fmt: skip

    def append(self, lines: Iterable[dict[str, Any]]) -> None:
        """Write output lines; they are on disk when this returns."""
        data = b"".join(
            json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
            for line in lines
        )
        try:
            write_all(self._file.fileno(), data)
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _not_written(self._outputs, error) from error

    @contextmanager
    def partial(self, name: str) -> Iterator[Path]:
        """A path to write some of the file `name` at; JobError if that fails, and it is gone."""
        partial = self.path / f"{name}.partial"
        try:
            yield partial
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise _not_written(self.path / name, error) from error

    def write(self, name: str, text: str) -> None:
        """Write the file `name`, whole or not at all; JobError if it cannot be."""
        try:
            with NewFile(self.path / name) as new:
                new.write(text.encode())
                new.commit()
        except OSError as error:
            raise _not_written(self.path / name, error) from error

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A path to write the rest of a file at, which then becomes `name`, whole or not at all."""
        with self.partial(name) as partial:
            yield partial
            replace_durably(partial, self.path / name)

    def _finished(self) -> Iterable[str]:
        """Names in the outputs so far; a last line cut short by a crash is taken off."""
        if not self._outputs.exists():
            return
        whole = 0
        with self._outputs.open("rb+") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.endswith(b"\n"):
                    break
                whole += len(raw)
                try:
                    name = decode_json(raw)["custom_id"]
                    if not isinstance(name, str):
                        raise TypeError(f"custom_id is a {type(name).__name__}")  # noqa: TRY301
                    yield name
                except (ValueError, KeyError, TypeError) as error:
                    raise JobError(
                        f"{self._outputs}: line {number}", f"<{error}>",
                        "must be an output line to resume from", "choose another --output-dir",
                    ) from error  # fmt: skip
            file.truncate(whole)


def _not_written(path: Path, error: OSError) -> JobError:
    return JobError(
        str(path), f"<{error.strerror}>", "must be writable, with room on the disk",
        "what it holds is kept: make room and go on with --resume, or choose another --output-dir",
    )  # fmt: skip


def rejected_line(rejected: Rejected) -> dict[str, Any]:
    """The output line of a request that was not run."""
    return {
        "id": f"batch_req_{rejected.name}",
        "custom_id": rejected.name,
        "response": None,
        "error": {"code": "invalid_request", "message": rejected.message},
    }


def completion_line(
    completion: Completion, model: str, text: str, *, chat: bool = False
) -> dict[str, Any]:
    """The output line of a request that was run, in the OpenAI batch output form."""
    name = completion.request.name
    choice = {
        "index": 0,
        **({"message": {"role": "assistant", "content": text}} if chat else {"text": text}),
        "token_ids": list(completion.tokens),
        "finish_reason": completion.finish_reason,
        "logprobs": None,
    }
    prompt, generated = len(completion.request.prompt), len(completion.tokens)
    body = {
        "id": f"cmpl-{name}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
        },
    }
    return {
        "id": f"batch_req_{name}",
        "custom_id": name,
        "response": {"status_code": 200, "request_id": f"req_{name}", "body": body},
        "error": None,
    }


def text_of(completion: Completion, tokenizer: Tokenizer | None, eos: frozenset[int]) -> str:
    """The generated text, without the token or from the stop text on that ended it."""
    if tokenizer is None:
        return ""
    params, tokens = completion.request.params, list(completion.tokens)
    if completion.finish_reason == "stop" and (
        tokens[-1] in eos or tokens[-1] in params.stop_token_ids
    ):
        tokens.pop()
    text = tokenizer.decode(tokens)
    ends = [text.find(stop) for stop in params.stop if stop in text]
    return text[: min(ends)] if ends else text
