"""Runs a job: requests from a file through a policy into a run directory."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from executor.batching import Batcher, Placed, Request
from executor.checkpoint import Checkpoint, WeightSource
from executor.errors import JobError
from executor.families import AbstractFamily, family_for
from executor.generate import BatchResult, Completion, Generator, NullGenerator
from executor.job.chat import ChatTemplate
from executor.job.machine import (
    AcceleratorOptions,
    Prepared,
    as_run,
    check_model,
    predicted_seconds,
    prepare,
)
from executor.job.outputs import RunDirectory, completion_line, rejected_line, text_of
from executor.job.report import Totals, accelerator_json, memory_json, model_json, run_json
from executor.job.requests import LineReader, Rejected
from executor.job.trace_file import TraceFile
from executor.model import Architecture
from hrm.policy import ScheduleName
from hrm.policy_file import PolicyFile, load_policy_file
from hrm.tasks import Lane

if TYPE_CHECKING:
    from tokenizers import Tokenizer

RUN_JSON: Final = "run.json"
TRACE_JSON: Final = "trace.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """What `executor run` is told."""

    model: Path
    policy: Path
    input: Path
    output_dir: Path
    accelerator: AcceleratorOptions = field(default_factory=AcceleratorOptions)
    schedule: ScheduleName | None = None
    seed: int = 0
    max_requests: int | None = None
    resume: bool = False


@dataclass(slots=True)
class JobProgress:
    """How far a job is; read by live displays in another thread.

    `tell` is called with a line that the user should see at once.
    """

    stage: str = "reading"
    total_requests: int = 0
    done_requests: int = 0  # of batches that are finished, and of earlier runs
    earlier_requests: int = 0  # of earlier runs alone
    batch_requests: int = 0  # of the present batch
    generated_tokens: int = 0  # of batches that are finished
    generator: Generator | NullGenerator | None = field(default=None, repr=False)
    tell: Callable[[str], object] = field(default=lambda _: None, repr=False)

    @property
    def generated_now(self) -> int:
        """Tokens generated so far, those of the present batch included."""
        state = self.generator.state if self.generator else None
        return self.generated_tokens + (state.num_generated if state else 0)

    @property
    def done_now(self) -> float:
        """Requests done, and of the present batch as many as its share that is done."""
        state = self.generator.state if self.generator else None
        return self.done_requests + (self.batch_requests * state.share_done if state else 0)

    @property
    def busy_s(self) -> dict[Lane, float]:
        """Seconds each lane has been at work in the present phase."""
        return self.generator.engine.busy_s if self.generator else {}


def run_job(options: JobOptions, progress: JobProgress | None = None) -> dict[str, Any]:
    """Run a job to its end; returns what run.json then holds.

    Raises an HrmError for anything wrong with the input before a weight is read, TaskFailedError
    if a task fails and KeyboardInterrupt on Ctrl-C, both after writing what is finished.
    """
    progress = progress or JobProgress()
    policy_file = load_policy_file(options.policy)
    policy = policy_file.policy
    if options.schedule is not None:
        policy = replace(policy, schedule=options.schedule)
    progress.total_requests = _count_lines(options.input)
    with Checkpoint.open(options.model) as checkpoint:
        family = family_for(checkpoint.config, checkpoint.config_path)
        arch = family.architecture(checkpoint.config, checkpoint.config_path)
        check_model(arch.spec, policy_file, options.policy)
        checkpoint.check(family.expected_tensors(arch))
        prepared = prepare(options.accelerator, policy_file, policy)
        reader = LineReader(
            checkpoint.tokenizer(), ChatTemplate.of_checkpoint(options.model), options.seed
        )
        with RunDirectory(options.output_dir, resume=options.resume) as directory:
            job = _Job(options, policy_file, arch, prepared, reader, directory)
            return job.run(progress, family, checkpoint)


@final
class _Job:
    """One job under way."""

    def __init__(
        self, options: JobOptions, policy_file: PolicyFile, arch: Architecture,
        prepared: Prepared, reader: LineReader, directory: RunDirectory,
    ) -> None:  # fmt: skip
        self._options, self._policy_file = options, policy_file
        self._arch, self._prepared = arch, prepared
        self._reader, self._directory = reader, directory
        self._eos = frozenset(arch.eos_token_ids)
        self._totals = Totals()
        self._rejected: list[Rejected] = []
        self._started = datetime.now(UTC)

    def run(
        self, progress: JobProgress, family: AbstractFamily, source: WeightSource
    ) -> dict[str, Any]:
        """Run every request; see `run_job`."""
        progress.stage = "loading weights"
        done, most = len(self._directory.done), self._options.max_requests
        progress.done_requests = progress.earlier_requests = done
        if most is not None:
            progress.total_requests = min(progress.total_requests, done + most)
        generator = self._generator(family, source)
        self._policy_file = as_run(self._policy_file, generator.policy, generator.pageable)
        if generator.notice:
            progress.tell(generator.notice)
        with self._directory.partial(TRACE_JSON) as path:
            self._trace = TraceFile(path)
        try:
            with generator:
                progress.generator = generator
                requests = self._requests(generator)
                for index, batch in enumerate(Batcher(requests, generator.policy)):
                    progress.stage = f"batch {index + 1}"
                    progress.batch_requests = batch.num_requests
                    try:
                        result = generator.generate(batch, index=index)
                    except BaseException:
                        rescued = generator.rescue()
                        if rescued is not None:
                            self._add(rescued)
                        self._write(rescued.completions if rescued else ())
                        raise
                    self._add(result)
                    self._write(result.completions)
                    generator.state = None
                    progress.generated_tokens = self._totals.generated_tokens
                    progress.done_requests = (
                        len(self._directory.done) + self._totals.requests + self._totals.rejected
                    )
            self._write(())
        except BaseException as error:
            outcome = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            with suppress(JobError):  # a full disk: what went wrong first is what is told
                self._report(outcome, str(error) or None, generator)
            raise
        progress.stage = "writing"
        return self._report("completed", None, generator)

    def _generator(self, family: AbstractFamily, source: WeightSource) -> Generator | NullGenerator:
        backend, planned = self._prepared.backend, self._prepared.planned
        if backend.name == "null":
            seconds_of = predicted_seconds(self._policy_file, planned.policy)
            return NullGenerator(backend, self._arch, planned, seconds_of)
        return Generator(
            backend, self._arch, planned, family=family, source=source,
            staged=self._prepared.staged, stops=self._stops,
        )  # fmt: skip

    def _requests(self, generator: Generator | NullGenerator) -> Iterator[Request]:
        """The requests that can be run; the others are put down as rejected."""
        most = self._options.max_requests
        count = 0
        for item in self._reader.read(self._options.input, self._directory.done):
            if most is not None and count >= most:
                return
            count += 1
            if isinstance(item, Rejected):
                self._rejected.append(item)
                continue
            try:
                generator.check(item)
            except JobError as error:
                self._rejected.append(Rejected(item.name, str(error)))
                continue
            yield item

    def _add(self, result: BatchResult) -> None:
        """Count a batch, and put its spans into the trace."""
        self._totals.add(result)
        with self._directory.partial(TRACE_JSON):
            for phase in (result.prefill, result.decode):
                if phase is not None:
                    self._trace.add(phase.spans)

    def _write(self, completions: Sequence[Completion]) -> None:
        """Append finished requests and those rejected meanwhile to the outputs."""
        lines = [rejected_line(rejected) for rejected in self._rejected]
        self._totals.rejected += len(self._rejected)
        self._rejected.clear()
        for completion in completions:
            text = text_of(completion, self._reader.tokenizer, self._eos)
            lines.append(
                completion_line(
                    completion, self._arch.spec.name, text, chat=completion.request.chat
                )
            )
        self._directory.append(lines)

    def _stops(self, placed: Placed, tokens: Sequence[int]) -> bool:
        tokenizer: Tokenizer | None = self._reader.tokenizer
        assert tokenizer is not None, "checked when the request was read"
        text = tokenizer.decode(list(tokens))
        return any(stop in text for stop in placed.request.params.stop)

    def _report(
        self, outcome: str, message: str | None, generator: Generator | NullGenerator
    ) -> dict[str, Any]:
        content = run_json(
            outcome=outcome,
            message=message,
            policy_file=self._policy_file,
            notice=generator.notice,
            model=model_json(self._arch.spec, str(self._options.model), generator.policy.dtype),
            accelerator=accelerator_json(generator.backend, generator.pageable),
            schedule=generator.policy.schedule.value,
            totals=self._totals,
            num_spans=self._trace.num_spans,
            load_s=generator.load_s,
            memory=memory_json(generator.plan, generator.peak_bytes),
            started=self._started,
        )
        self._directory.write(RUN_JSON, json.dumps(content, indent=2) + "\n")
        with self._directory.writing(TRACE_JSON):
            self._trace.end()
        return content


def _count_lines(path: Path) -> int:
    try:
        if not path.is_file():  # it is read twice, which a pipe cannot be
            path.stat()
            raise JobError(
                "--input", str(path), "must be a file of its own, no pipe or device",
                "write the lines to a file first",
            )  # fmt: skip
        with path.open("rb") as file:
            return sum(1 for line in file if line.strip())
    except OSError as error:
        raise JobError(
            "--input", str(path), f"cannot be read ({error.strerror})", "check the path"
        ) from error
