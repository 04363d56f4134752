"""Runs a job: requests from a file through a policy into a run directory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import psutil

from executor.backends import AbstractBackend, EmulatedMachine, make_backend
from executor.batching import Batcher, Placed, Request
from executor.checkpoint import Checkpoint, WeightSource
from executor.errors import JobError
from executor.families import AbstractFamily, family_for
from executor.generate import Completion, Generator, NullGenerator
from executor.job.outputs import RunDirectory, completion_line, rejected_line, text_of
from executor.job.report import Totals, memory_json, run_json
from executor.job.requests import ChatTemplate, LineReader, Rejected
from executor.model import Architecture
from hrm.costs import Costs, TaskWork
from hrm.errors import PolicyError
from hrm.hardware import Figure, Link, Rate, Source
from hrm.memory import MemoryPlan, plan_memory
from hrm.model_spec import ModelSpec
from hrm.policy import Policy, ScheduleName
from hrm.policy_file import PolicyFile, load_policy_file
from hrm.tasks import Lane, Phase

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
    accelerator: str = "auto"
    gpu_memory_bytes: int | None = None
    link_bytes_per_s: float | None = None
    schedule: ScheduleName | None = None
    seed: int = 0
    max_requests: int | None = None
    resume: bool = False


@dataclass(slots=True)
class JobProgress:
    """How far a job is; read by live displays in another thread."""

    stage: str = "reading"
    total_requests: int = 0
    done_requests: int = 0
    generated_tokens: int = 0  # of batches that are finished
    seconds: float = 0.0  # of prefill and decode that are finished
    generator: Generator | NullGenerator | None = field(default=None, repr=False)

    @property
    def generated_now(self) -> int:
        """Tokens generated so far, those of the present batch included."""
        state = self.generator.state if self.generator else None
        return self.generated_tokens + (state.num_generated if state else 0)

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
        plan, backend = prepare(options, policy_file, policy)
        reader = LineReader(
            checkpoint.tokenizer(), ChatTemplate.of_checkpoint(options.model), options.seed
        )
        with RunDirectory(options.output_dir, resume=options.resume) as directory:
            job = _Job(options, policy_file, policy, arch, plan, backend, reader, directory)
            return job.run(progress, family, checkpoint)


@final
class _Job:
    """One job under way."""

    def __init__(
        self, options: JobOptions, policy_file: PolicyFile, policy: Policy, arch: Architecture,
        plan: MemoryPlan, backend: AbstractBackend, reader: LineReader, directory: RunDirectory,
    ) -> None:  # fmt: skip
        self._options, self._policy_file, self._policy = options, policy_file, policy
        self._arch, self._plan, self._backend = arch, plan, backend
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
        progress.done_requests = len(self._directory.done)
        outcome, message = "failed", None
        generator = self._generator(family, source)
        try:
            with generator:
                progress.generator = generator
                for index, batch in enumerate(Batcher(self._requests(generator), self._policy)):
                    progress.stage = f"batch {index + 1}"
                    try:
                        result = generator.generate(batch, index=index)
                    except BaseException:
                        self._write(_finished(generator))
                        raise
                    self._totals.add(result)
                    self._write(result.completions)
                    if generator.state:
                        generator.state.num_generated = 0
                    progress.generated_tokens = self._totals.generated_tokens
                    progress.seconds = self._totals.seconds
                    progress.done_requests = (
                        len(self._directory.done) + self._totals.requests + self._totals.rejected
                    )
            self._write(())
            outcome = "completed"
        except KeyboardInterrupt:
            outcome = "interrupted"
            raise
        except BaseException as error:
            message = str(error)
            raise
        finally:
            progress.stage = "writing"
            content = self._report(outcome, message, generator)
        return content

    def _generator(self, family: AbstractFamily, source: WeightSource) -> Generator | NullGenerator:
        if self._backend.name == "null":
            return NullGenerator(self._backend, self._arch, self._policy, self._seconds_of)
        return Generator(
            self._backend, self._arch, self._policy, self._plan, family=family, source=source,
            stops=self._stops,
        )  # fmt: skip

    def _seconds_of(self, pipeline: Any, batch: Any) -> Any:
        costs = Costs(self._arch.spec, self._policy_file.profile, self._policy.dtype)
        prompts = [len(placed.request.prompt) for mb in batch.micro_batches for placed in mb.placed]
        prefill = pipeline.phase is Phase.PREFILL
        mean = sum(prompts) / len(prompts)
        new = max(p.request.params.max_tokens for mb in batch.micro_batches for p in mb.placed)
        parts = pipeline.num_micro_batches
        work = TaskWork(
            costs=costs,
            policy=self._policy,
            pipeline=pipeline,
            tokens=sum(prompts) / parts if prefill else len(prompts) / parts,
            context=mean if prefill else mean + new / 2,
            requests_per_chunk=len(prompts) / parts if prefill else 0.0,
        )
        return work.seconds_of()

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
        spec = self._arch.spec
        content = run_json(
            outcome=outcome,
            message=message,
            policy_file=self._policy_file,
            model={
                "name": spec.name,
                "folder": str(self._options.model),
                "family": spec.family,
                "parameters": spec.parameters,
                "dtype": self._policy.dtype,
            },
            accelerator={
                "name": self._backend.name,
                "emulated": self._backend.name == "emulated",
                "description": self._backend.description,
            },
            schedule=self._policy.schedule.value,
            totals=self._totals,
            load_s=generator.load_s,
            memory=memory_json(self._plan, generator.peak_bytes),
            started=self._started,
        )
        self._directory.write_json(RUN_JSON, content)
        self._totals.write_trace(self._directory.path / TRACE_JSON)
        return content


def check_model(spec: ModelSpec, policy_file: PolicyFile, path: Path) -> None:
    """Raise PolicyError if the policy was solved for a model of other dimensions."""
    solved_for = replace(policy_file.model, name=spec.name)
    if solved_for != spec:
        differing = [
            name for name in ModelSpec.__dataclass_fields__
            if getattr(solved_for, name) != getattr(spec, name)
        ]  # fmt: skip
        field_ = differing[0]
        raise PolicyError(
            f"{path}: model.{field_}", getattr(solved_for, field_),
            f"must be the model's {getattr(spec, field_)!r}",
            "run hrm search with this --model",
        )  # fmt: skip


def prepare(
    options: JobOptions, policy_file: PolicyFile, policy: Policy
) -> tuple[MemoryPlan, AbstractBackend]:
    """The memory plan against the budgets, and the backend; before anything large is touched.

    Raises PolicyError if the policy does not fit and RunError if the accelerator cannot be had.
    """
    machine = emulated_machine(options, policy_file)
    backend = make_backend(options.accelerator, machine)
    plan = budgeted_plan(policy_file, policy, options.gpu_memory_bytes)
    plan.check_fits()
    planned = sum({level.name: level.planned_bytes for level in (plan.gpu, plan.cpu)}.values())
    available = psutil.virtual_memory().available
    if backend.name != "null" and planned > available:
        raise PolicyError(
            "policy: memory of this machine", f"<{planned} bytes planned>",
            f"must fit the {available} bytes that are available",
            "close other programs, or search again with a lower --cpu-memory",
        )  # fmt: skip
    return plan, backend


def budgeted_plan(
    policy_file: PolicyFile, policy: Policy, gpu_memory_bytes: int | None = None
) -> MemoryPlan:
    """The policy's memory plan with the policy file's budgets as capacities."""
    plan = plan_memory(policy_file.model, policy, policy_file.profile)
    budgets = dict(policy_file.memory_budget_bytes)
    if gpu_memory_bytes is not None:
        budgets[plan.gpu.name] = gpu_memory_bytes
    gpu, cpu = (
        replace(level, capacity_bytes=budgets.get(level.name, level.capacity_bytes))
        for level in (plan.gpu, plan.cpu)
    )
    return MemoryPlan(gpu, cpu)


def emulated_machine(options: JobOptions, policy_file: PolicyFile) -> EmulatedMachine | None:
    """The accelerator to emulate: the policy's, changed as the options say; None if it has none."""
    profile = policy_file.profile
    bandwidth = options.link_bytes_per_s
    if profile.has_accelerator:
        memory = options.gpu_memory_bytes or policy_file.memory_budget_bytes.get(
            profile.top.name, profile.top.usable_bytes
        )
        h2d, d2h = profile.h2d, profile.d2h
    elif options.accelerator == "emulated" and options.gpu_memory_bytes and bandwidth:
        memory = options.gpu_memory_bytes
        h2d, d2h = (_link(*ends, bandwidth) for ends in (("cpu", "gpu"), ("gpu", "cpu")))
    else:
        return None
    if bandwidth:
        h2d, d2h = (replace(link, bandwidth_bytes_per_s=_rate(bandwidth)) for link in (h2d, d2h))
    return EmulatedMachine(gpu_memory_bytes=memory, h2d=h2d, d2h=d2h)


def _rate(value: float) -> Rate:
    return Rate(achieved=Figure(value=value, source=Source.ASSUMED, note="--link-bandwidth"))


def _link(source: str, target: str, bandwidth: float) -> Link:
    latency = Figure(value=10e-6, source=Source.ASSUMED, note="emulated link")
    return Link(
        source=source, target=target, latency_s=latency, bandwidth_bytes_per_s=_rate(bandwidth)
    )


def _finished(generator: Generator | NullGenerator) -> list[Completion]:
    """The requests of a batch that was cut short which had ended by then."""
    state = generator.state
    if state is None:
        return []
    return [
        Completion(s.placed.request, tuple(s.tokens), s.finish_reason)
        for members in state.sequences for s in members if s.finish_reason is not None
    ]  # fmt: skip


def _count_lines(path: Path) -> int:
    try:
        with path.open("rb") as file:
            return sum(1 for line in file if line.strip())
    except OSError as error:
        raise JobError(
            "--input", str(path), f"cannot be read ({error.strerror})", "check the path"
        ) from error
