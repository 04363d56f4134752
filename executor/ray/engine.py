"""One engine in one process: a model with its weights loaded, which answers batch after batch."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from executor.batching import Completion, Request, Sink
from executor.download import locate
from executor.job.identity import digest_of_line
from executor.job.machine import AcceleratorOptions, prepare
from executor.job.model import opened
from executor.job.requests import Line, LineReader, Rejected, parsed
from executor.job.sampling_defaults import SamplingSource
from hrm.errors import HrmError
from hrm.policy import ScheduleName
from hrm.policy_file import load_policy_file

if TYPE_CHECKING:
    import numpy as np

_OF_A_LINE: Final = ("custom_id", "method", "url", "body")
_ADDED: Final = ("text", "token_ids", "finish_reason", "error")


@final
class Engine:
    """A model under a policy, for `ray.data.Dataset.map_batches` or by itself.

    `model` is a checkpoint's folder, or its name on the Hugging Face Hub, and `policy` a policy file;
    each must be there on the machine that the engine is made on. Made once a worker, it holds the
    weights until `close`:

        dataset.map_batches(
            executor.ray.Engine, fn_constructor_kwargs={"model": …, "policy": …}, batch_size=256, concurrency=4
        )

    Columns are the fields of batch lines (`custom_id`, `url`, `body`), or those of a body (`prompt` or
    `messages`, `max_tokens`, `temperature`, …) with a `custom_id` if there is one. Those that come
    out besides are `text`, `token_ids`, `finish_reason` and `error`, which is empty for an answer.
    """

    def __init__(
        self,
        model: str | Path,
        policy: str | Path,
        *,
        revision: str | None = None,
        accelerator: AcceleratorOptions | None = None,
        schedule: ScheduleName | None = None,
        seed: int = 0,
        sampling_defaults: SamplingSource = "model",
    ) -> None:
        """Load the weights; an HrmError if model, policy and machine do not go together."""
        located = locate(str(model), revision, lambda _done, _total: None)
        policy_file = load_policy_file(Path(policy))
        with ExitStack() as stack:
            self._model = stack.enter_context(
                opened(
                    located.folder,
                    policy_file,
                    name=located.name,
                    policy_path=policy,
                    schedule=schedule,
                    seed=seed,
                    sampling=sampling_defaults,
                )
            )
            prepared = prepare(accelerator or AcceleratorOptions(), policy_file, self._model.policy)
            self._generator = self._model.generator(prepared)
            self._stack = stack.pop_all()
        self._batches = 0

    @property
    def reader(self) -> LineReader:
        """What makes requests of lines."""
        return self._model.reader

    @property
    def batch_size(self) -> int:
        """Requests of a whole batch."""
        return self._generator.policy.batch_size

    def run(self, requests: Iterable[Request], sink: Sink) -> None:
        """Answer requests in batches; each completion is put as soon as it is there."""
        with self._generator:
            self._generator.warm_up()
            for batch in self._generator.batches(iter(requests)):
                self._generator.generate(batch, index=self._batches, sink=sink)
                self._batches += 1

    def __call__(self, batch: "Mapping[str, np.ndarray]") -> "dict[str, np.ndarray]":
        """Answer a batch of rows; those that cannot be run say why."""
        import numpy as np

        columns = {name: _plain(values) for name, values in batch.items()}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        items = [self._read(index, row) for index, row in enumerate(rows)]
        ended = _Kept()
        self.run((item for item in items if isinstance(item, Request)), ended)
        lines = [self._model.line_of(ended.by_name.get(item.name, item)) for item in items]  # type: ignore[arg-type]
        made = [_columns_of(line) for line in lines]
        return {**batch, **{name: np.array([one[name] for one in made], dtype=object) for name in _ADDED}}

    def _read(self, index: int, row: dict[str, Any]) -> Request | Rejected:
        name = str(index)  # names of rows may occur twice: batches are put together by Ray
        row = {key: value for key, value in row.items() if value is not None}
        line = row if "body" in row else {"url": row.pop("url", None), "body": row}
        given = str(line.pop("custom_id", None) or row.pop("custom_id", None) or digest_of_line(line))
        try:
            if isinstance(line["body"], str):
                line["body"] = parsed(line["body"].encode(errors="surrogatepass"), "body")
            request = self.reader.request(Line(index + 1, given, {k: v for k, v in line.items() if k in _OF_A_LINE}))
            self._generator.check(request)
        except HrmError as error:
            return Rejected(name, str(error))
        return Request(name, request.prompt, request.params, request.chat, request.open_ended, request.digest)

    def close(self) -> None:
        """Let go of the checkpoint's files; the weights go with the engine."""
        self._stack.close()


class _Kept:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.by_name: dict[str, Completion] = {}

    def put(self, completion: Completion, /) -> None:
        self.by_name[completion.request.name] = completion

    def stops(self) -> bool:
        return False


def _plain(values: "np.ndarray") -> Sequence[Any]:
    """Cells as Python has them."""
    return [cell.tolist() if hasattr(cell, "tolist") else cell for cell in values]


def _columns_of(line: dict[str, Any]) -> dict[str, Any]:
    """What an output line says, as columns."""
    if line["error"] is not None:
        return {"text": "", "token_ids": [], "finish_reason": "error", "error": line["error"]["message"]}
    (choice,) = line["response"]["body"]["choices"]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    tokens, reason = choice["token_ids"], choice["finish_reason"]
    return {"text": text, "token_ids": tokens, "finish_reason": reason, "error": ""}
