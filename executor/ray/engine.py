"""One engine in one process: a model with its weights loaded, which answers batch after batch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, final

from executor.batching import Completion, Request, Sink
from executor.checks import check_request
from executor.download import locate
from executor.errors import RunError
from executor.generate import AbstractGenerator, BatchResult
from executor.job.identity import digest_of_line
from executor.job.launch import Launch, launching_model
from executor.job.machine import AcceleratorOptions, as_run
from executor.job.model import OpenModel, opened
from executor.job.rank import RankReport
from executor.job.report import Beginning, Counted, Totals, run_record
from executor.job.requests import Line, LineReader, Rejected, with_body
from executor.job.rows import line_of_row
from executor.job.sampling_defaults import SamplingSource
from executor.loading import Loading
from executor.ray.plans import Plan, by_preference, read_plans
from hrm.errors import HrmError, PolicyError
from hrm.policy import ScheduleName
from hrm.run_record import RunRecord
from hrm.units import counted

if TYPE_CHECKING:
    import numpy as np

_Entered = TypeVar("_Entered")

_OF_A_LINE: Final = ("custom_id", "method", "url", "body")
_ADDED: Final = ("text", "token_ids", "finish_reason", "error")


@final
class Engine:
    """A model under a policy, for `ray.data.Dataset.map_batches` or by itself.

    `model` is a checkpoint's folder, or its name on the Hugging Face Hub, and must be there on the machine that the
    engine is made on. `policy` is a policy file; or several or a folder of them, of which the one is taken that is
    best on this machine. With `own_plan` the machine measures itself, once, and solves for itself what the first was
    solved for, with the memory that so many `engines` leave to each. A policy for several GPUs is run by a process for
    each. Made once a worker, the engine holds the weights until `close`, and is used in the thread that made it:

        dataset.map_batches(
            executor.ray.Engine, fn_constructor_kwargs={"model": …, "policy": …}, batch_size=256, concurrency=4
        )

    Columns are the fields of batch lines (`custom_id`, `url`, `body`), or those of a body (`prompt` or
    `messages`, `max_tokens`, `temperature`, …) with a `custom_id` if there is one. Those that come
    out besides are `text`, `token_ids`, `finish_reason` and `error`, which is empty for an answer.
    """

    plan: Plan
    model: OpenModel
    generator: AbstractGenerator

    def __init__(
        self,
        model: str | Path,
        policy: str | Path | Sequence[str | Path | Plan],
        *,
        revision: str | None = None,
        accelerator: AcceleratorOptions | None = None,
        schedule: ScheduleName | None = None,
        seed: int = 0,
        sampling_defaults: SamplingSource = "model",
        own_plan: bool = False,
        engines: int = 1,
    ) -> None:
        """Load the weights; an HrmError if model, policy and machine do not go together."""
        accelerator = accelerator or AcceleratorOptions()
        given = [policy] if isinstance(policy, str | Path) else policy
        plans = [plan for plan in given if isinstance(plan, Plan)]
        plans += read_plans([Path(path) for path in given if not isinstance(path, Plan)])
        if own_plan:
            from executor.ray.own_plan import own_plan as plan_for_here  # searches and measures

            plans = [plan_for_here(plans[0], accelerator, engines)]
        located = locate(str(model), revision, lambda _done, _total: None)

        def enter(plan: Plan, stack: ExitStack) -> tuple[Plan, OpenModel, Launch]:
            opening = opened(
                located.folder,
                plan.file,
                name=located.name,
                policy_path=plan.path,
                schedule=schedule,
                seed=seed,
                sampling=sampling_defaults,
            )
            opened_model = stack.enter_context(opening)
            return plan, opened_model, stack.enter_context(launching_model(accelerator, opened_model))

        with ExitStack() as stack:
            self.plan, self.model, launch = _first_that_enters(by_preference(plans, accelerator), enter, stack)
            self.generator, self._reports = stack.enter_context(launch.loaded(Loading()))
            self._stack = stack.pop_all()
        self._weights = located.name or str(located.folder)
        self._ranks, self._has_finished = list[RankReport](), False
        self._batches = 0

    @property
    def reader(self) -> LineReader:
        """What makes requests of lines."""
        return self.model.reader

    def run(
        self, requests: Iterable[Request], sink: Sink, ended: Callable[[BatchResult], object] = lambda _: None
    ) -> None:
        """Answer requests in batches; each completion is put as soon as it is there, and each batch told as it ends."""
        with self.generator:
            self.generator.warm_up()
            for batch in self.generator.batches(iter(requests)):
                ended(self.generator.generate(batch, index=self._batches, sink=sink))
                self._batches += 1

    def __call__(self, batch: "Mapping[str, np.ndarray]") -> "dict[str, np.ndarray]":
        """Answer a batch of rows; those that cannot be run say why."""
        import numpy as np

        columns = {name: _plain(values) for name, values in batch.items()}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        items = [self._read(index, row) for index, row in enumerate(rows)]
        ended = _Kept()
        self.run((item for item in items if isinstance(item, Request)), ended)
        outcomes = [item if isinstance(item, Rejected) else ended.by_name[item.name] for item in items]
        made = [_columns_of(self.model.line_of(outcome)) for outcome in outcomes]
        added = {name: np.empty(len(made), dtype=object) for name in _ADDED}  # lists of one length are no matrix
        for name, column in added.items():
            column[:] = [one[name] for one in made]
        return {**batch, **added}

    def _read(self, index: int, row: dict[str, Any]) -> Request | Rejected:
        name = str(index)  # names of rows may occur twice: batches are put together by Ray
        line = line_of_row(row)
        given = str(line.get("custom_id") or digest_of_line(line))
        try:
            content = {key: value for key, value in with_body(line).items() if key in _OF_A_LINE}
            request = self.reader.request(Line(index + 1, given, content))
            check_request(request, self.model.arch, self.model.policy)
        except HrmError as error:
            return Rejected(name, str(error))
        return Request(name, request.prompt, request.params, request.chat, request.open_ended, request.digest)

    def finish(self) -> list[RankReport]:
        """What each of the other ranks has done. Nothing can be run any more."""
        if not self._has_finished:
            self._ranks, self._has_finished = self._reports(), True
        return self._ranks

    def record(self, totals: Totals, started: datetime) -> RunRecord:
        """What a run.json holds of batches that were counted; of other ranks once they have ended."""
        generator, model = self.generator, self.model
        return run_record(
            generator,
            as_run(model.policy_file, generator.policy, generator.pageable),
            Counted(totals, [report.record for report in self._ranks]),
            Beginning(weights=self._weights, sampling_defaults=model.defaults.values, started=started),
        )

    def close(self) -> None:
        """Let go of the checkpoint's files and of other ranks; the weights go with the engine."""
        with self._stack:
            self.finish()


def _first_that_enters(
    plans: Sequence[Plan], enter: Callable[[Plan, ExitStack], _Entered], stack: ExitStack
) -> _Entered:
    """Enter the first plan that can be run here; if none can be, raise why, of one plan alone as it is."""
    reasons: list[str] = []
    for plan in plans:
        try:
            with ExitStack() as own:
                entered = enter(plan, own)
                stack.enter_context(own.pop_all())
                return entered
        except (PolicyError, RunError) as error:
            if len(plans) == 1:
                raise
            reasons.append(str(error))
    told = f"must hold one for this machine; of each, why not: {' | '.join(reasons)}"
    raise RunError("--policy", f"<{counted(len(plans), 'policy file')}>", told, "add one, solved for a machine like it")


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
