"""Runs a job: requests from a file through a policy into a run directory."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Final, TypeVar, final

import msgspec

from executor.backends import computes
from executor.batching import Completion, Request
from executor.errors import JobError, RunError
from executor.generate import AbstractGenerator, BatchResult
from executor.handlers import ERROR
from executor.job.advice import advice
from executor.job.identity import JOB_JSON, Identity
from executor.job.input_file import check_input
from executor.job.launch import Launch, Reports, launching_model
from executor.job.machine import as_run
from executor.job.model import OpenModel, opened
from executor.job.options import Elsewhere, JobOptions
from executor.job.outputs import OUTPUTS, RunDirectory, failed_line, rejected_line
from executor.job.progress import Forecast, JobProgress
from executor.job.report import COMPLETED, Beginning, Counted, Ending, Totals, run_record
from executor.job.requests import Rejected
from executor.job.survey import SHOWN_REASONS, Judge, Survey, survey
from executor.job.trace_file import TraceFile
from executor.job.writer import OutputWriter
from hrm.policy_file import PolicyFile, load_policy_file
from hrm.run_record import FleetRecord, RankRecord, RunRecord
from hrm.units import counted

RUN_JSON: Final = "run.json"
TRACE_JSON: Final = "trace.json"
NOT_COMPUTED: Final = "nothing was computed: the null accelerator only sleeps; run it with another --accelerator"

_Record = TypeVar("_Record", RunRecord, FleetRecord)


def run_job(options: JobOptions, progress: JobProgress | None = None) -> RunRecord | None:
    """Run a job to its end; returns what run.json then holds, None if nothing was left to be run.

    Raises an HrmError for anything wrong with the input before a weight is read, TaskFailedError
    if a task fails and KeyboardInterrupt on Ctrl-C, both after writing what is finished. What costs
    one request alone becomes its line in the outputs.
    """
    progress = progress or JobProgress()
    policy_file = load_policy_file(options.policy)
    with (
        _opened(options, policy_file, progress) as model,
        launching_model(options.accelerator, model, options.gpus) as launch,
        _begun(options, [policy_file], model, computed=computes(launch.prepared.backend.name)) as (job, identity),
    ):
        return job.run(progress, launch) if job.prepare(progress, identity) else None


def run_job_on(
    elsewhere: Elsewhere,
    options: JobOptions,
    progress: JobProgress | None = None,
    policy_files: Sequence[PolicyFile] = (),
) -> FleetRecord | None:
    """Have a job's requests run elsewhere, under one of these policies each; see `run_job`. Nothing is loaded here."""
    progress = progress or JobProgress()
    policy_files = policy_files or [load_policy_file(options.policy)]
    with (
        _opened(options, policy_files[0], progress) as model,
        _begun(options, policy_files, model, computed=computes(options.accelerator.name)) as (job, identity),
    ):
        return job.have_answered(progress, elsewhere) if job.prepare(progress, identity) else None


@contextmanager
def _opened(options: JobOptions, policy_file: PolicyFile, progress: JobProgress) -> Iterator[OpenModel]:
    """The model of a job whose input can be read."""
    check_input(options.input)
    with opened(
        options.model,
        policy_file,
        name=options.model_name,
        policy_path=options.policy,
        schedule=options.schedule,
        seed=options.seed,
        sampling=options.sampling_defaults,
        tell=progress.tell,
    ) as model:
        yield model


@contextmanager
def _begun(
    options: JobOptions, policy_files: Sequence[PolicyFile], model: OpenModel, *, computed: bool
) -> Iterator[tuple["_Job", Identity]]:
    """The job in its run directory, and what its answers depend on."""
    identity = Identity.of(
        model.checkpoint, model.policy, seed=options.seed, computed=computed, sampling=model.defaults
    )
    with RunDirectory(options.output_dir, resume=options.resume) as directory:
        yield _Job(options, policy_files, model, directory, computed=computed), identity


@final
class _Job:
    """One job under way."""

    def __init__(
        self,
        options: JobOptions,
        policy_files: Sequence[PolicyFile],
        model: OpenModel,
        directory: RunDirectory,
        *,
        computed: bool,
    ) -> None:
        self._options, self._policy_file, self._computed = options, policy_files[0], computed
        policies = [model.policy, *(other.policy for other in policy_files[1:])]
        self._judge = Judge(model.arch, policies, policy_files[0].workload)
        self._model, self._reader, self._directory = model, model.reader, directory
        self._totals = Totals()
        self._ranks: list[RankRecord] = []  # others than this process
        self._survey = Survey()
        self._succeeded = self._failed = 0  # lines of requests that were run, here or elsewhere
        self._reasons: list[str] = []  # why the first requests that failed did so
        self._untold: dict[str, str] = {}  # why a completion has no text, by its request's name
        self._beginning = Beginning(weights=options.told_model, sampling_defaults=model.reader.defaults.values)

    def prepare(self, progress: JobProgress, identity: Identity) -> bool:
        """Check that the directory's answers are this job's, survey the input, and begin.

        JobError if they are not; until then nothing in the directory has changed. Returns whether
        anything is left to be run; if not, what there is to be written is written.
        """
        options, directory = self._options, self._directory
        begun_path = directory.path / JOB_JSON
        begun = Identity.read(begun_path) if options.resume else None
        if begun is not None:
            identity.check(begun, directory.path)
        elif directory.answered:
            progress.tell(
                f"{directory.path} was begun by a version that did not note what its answers depend"
                " on: model, dtype, seed and requests must be the same as then, unchecked"
            )
        self._survey = survey(
            options.input, self._reader, self._judge, directory.answered, directory.path, options.max_requests
        )
        if begun is None:
            directory.write(JOB_JSON, identity.json())
        directory.begin()
        progress.earlier_requests = len(directory.answered)
        wanted = progress.wanted = self._survey.to_run
        progress.total_requests = progress.earlier_requests + wanted.requests + self._survey.rejected
        progress.forecast = Forecast.of(wanted, self._model.policy, self._policy_file)
        told = advice(self._survey, self._policy_file, options)
        if told is not None:
            progress.tell(told)
        if not wanted.requests:
            self._end_without_a_run(progress)
        return wanted.requests > 0

    def _end_without_a_run(self, progress: JobProgress) -> None:
        """Write why lines were rejected; JobError with the first reasons if nothing was ever answered.

        So it is told before weights are loaded. run.json keeps what an earlier run measured.
        """
        found, directory = self._survey, self._directory
        for item in self._judged():
            assert isinstance(item, Rejected), "as surveyed"
            directory.append(rejected_line(item))
        directory.sync()
        if directory.answered:
            rejected = f", and {found.rejected} were rejected" if found.rejected else ""
            progress.tell(
                f"nothing is left to be run: {counted(len(directory.answered), 'request')} of"
                f" {directory.path / OUTPUTS} had been answered{rejected}"
            )
            return
        reasons = " | ".join(map(_brief, found.reasons))
        raise JobError(
            f"--input: {self._options.input}",
            f"<{counted(found.rejected, 'request')}>",
            f"must hold one that can be run; the first reasons: {reasons}",
            f"correct the lines, all of whose reasons are in {OUTPUTS}, and use --resume",
        )

    def have_answered(self, progress: JobProgress, elsewhere: Elsewhere) -> FleetRecord:
        """Have the requests run elsewhere, and write what comes of them; RunError if nothing does."""
        try:
            with OutputWriter(self._directory, self._line_of) as writer:
                try:
                    elsewhere.answer(self._requests(writer, progress), writer, progress)
                finally:
                    writer.flush()
            self._raise_failure_of_all()
        except BaseException as error:
            with suppress(JobError):  # a full disk: what went wrong first is what is told
                self._write(elsewhere.record(Ending.of(error)))
            raise
        return self._write(elsewhere.record(COMPLETED))

    def run(self, progress: JobProgress, launch: Launch) -> RunRecord:
        """Run every request; see `run_job`."""
        progress.stage = "loading weights"
        with launch.loaded(progress.loading) as (generator, reports):
            return self._run(progress, generator, reports)

    def _run(self, progress: JobProgress, generator: AbstractGenerator, reports: Reports) -> RunRecord:
        self._policy_file = as_run(self._policy_file, generator.policy, generator.pageable)
        if generator.notice:
            progress.tell(generator.notice)
        self._trace = TraceFile(self._directory.path / f"{TRACE_JSON}.partial", progress.tell)
        try:
            with generator, OutputWriter(self._directory, self._line_of) as writer:
                progress.generator = generator
                progress.stage = "warming up"
                generator.warm_up()
                requests = self._requests(writer, progress)
                for index, batch in enumerate(generator.batches(requests)):
                    progress.stage = f"batch {index + 1}"
                    progress.begin_batch(batch)
                    try:
                        result = generator.generate(batch, index=index, sink=writer)
                    except BaseException:
                        rescued = generator.rescue()
                        with suppress(JobError):  # what went wrong first is what is told
                            writer.flush()
                        if rescued is not None:
                            self._add(rescued)
                        raise
                    writer.flush()
                    self._add(result)
                    progress.end_batch(result)
                writer.flush()
                for report in reports():
                    self._ranks.append(report.record)
                    self._trace.add(report.spans_since(generator.engine.origin_s), rank=report.record.rank)
        except BaseException as error:
            with suppress(JobError):  # a full disk: what went wrong first is what is told
                self._report(Ending.of(error), generator)
            raise
        progress.stage = "writing"
        failure = self._failure_of_all()
        record = self._report(Ending.of(failure), generator)
        if failure is not None:
            raise failure
        return record

    def _raise_failure_of_all(self) -> None:
        failure = self._failure_of_all()
        if failure is not None:
            raise failure

    def _failure_of_all(self) -> RunError | None:
        """What to raise if requests were run and none got an answer, now or earlier."""
        if self._succeeded or not self._failed or self._directory.answered:
            return None
        return RunError(
            f"{self._directory.path / OUTPUTS}",
            f"<{counted(self._failed, 'error')}, no answer>",
            f"must have an answer at least; the first reasons: {' | '.join(self._reasons)}",
            "put right what they say and use --resume",
        )

    def _judged(self) -> Iterator[Request | Rejected]:
        """What is still to be answered: requests that can be run, and the others as rejected."""
        answered, names = self._directory.answered, self._survey.names
        for item in self._reader.read(self._options.input, answered, names):
            if isinstance(item, Rejected):
                yield item
                continue
            try:
                self._judge.check(item)
            except JobError as error:
                yield Rejected(item.name, str(error))
            else:
                yield item

    def _requests(self, writer: OutputWriter, progress: JobProgress) -> Iterator[Request]:
        """The requests that can be run; the others are put down as rejected."""
        most = self._options.max_requests
        count = 0
        for item in self._judged():
            if isinstance(item, Rejected):
                writer.put(item)
                self._totals.rejected += 1
                progress.ended_requests += 1
            else:
                yield item
                count += 1
            if most is not None and count >= most:
                return

    def _add(self, result: BatchResult) -> None:
        """Count a batch whose lines are written, and put its spans into the trace."""
        completions = tuple(
            replace(c, finish_reason=ERROR, error=self._untold.pop(c.request.name))
            if c.request.name in self._untold
            else c
            for c in result.completions
        )
        self._totals.add(replace(result, completions=completions))
        for phase in (result.prefill, result.decode):
            if phase is not None:
                self._trace.add(phase.spans)

    def _line_of(self, item: Completion | Rejected) -> dict[str, Any]:
        """The output line of a request that has ended or was rejected."""
        if isinstance(item, Completion) and not self._computed:
            self._succeeded += 1  # as well as can be
            return failed_line(item.request.name, NOT_COMPUTED)
        line = self._model.line_of(item)
        self._succeeded += line["error"] is None
        if isinstance(item, Completion) and line["error"] is not None:
            reason: str = line["error"]["message"]
            self._failed += 1
            if item.error is None:
                self._untold[item.request.name] = reason
            if len(self._reasons) < SHOWN_REASONS:
                self._reasons.append(f"{_brief(item.request.name)}: {_brief(reason)}")
        return line

    def _report(self, ending: Ending, generator: AbstractGenerator) -> RunRecord:
        self._trace.end(self._directory.path / TRACE_JSON)  # first: what it holds is told
        record = run_record(
            generator,
            self._policy_file,
            Counted(self._totals, self._ranks),
            self._beginning,
            ending=ending,
            num_spans=self._trace.num_spans,
        )
        return self._write(record)

    def _write(self, record: _Record) -> _Record:
        self._directory.write(RUN_JSON, json.dumps(msgspec.to_builtins(record), indent=2) + "\n")
        return record


def _brief(reason: str) -> str:
    return reason if len(reason) <= 240 else f"{reason[:240]}…"
