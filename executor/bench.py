"""A policy under several schedules, on prompts of random tokens and, if asked, random weights."""

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Self, final

import msgspec

from executor.backends import in_thread_of_its_own
from executor.batching import Batcher, Request
from executor.checkpoint import Checkpoint, RandomWeights, WeightSource
from executor.errors import JobError
from executor.families import AbstractFamily, family_for
from executor.generate import Generator, NullGenerator
from executor.job.machine import AcceleratorOptions, check_model, predicted_seconds, prepare
from executor.job.report import Totals, accelerator_json, memory_json, model_json, run_json
from executor.model import Architecture
from executor.sampling import SamplingParams
from hrm.estimate import Estimate, estimate
from hrm.hardware import HardwareProfile
from hrm.machines import load_profile, with_memory
from hrm.memory import MemoryPlan
from hrm.model_spec import BUILT_IN_MODELS, ModelSpec, load_model
from hrm.policy import Policy, ScheduleName
from hrm.policy_file import PolicyFile, load_policy_file, policy_file_of
from hrm.tasks import Phase
from hrm.validate import AcceleratorRecord, RunRecord, Validation, paced, validate
from hrm.workload import Workload

PROMPT_LEN: Final = 64  # without a policy and unless told otherwise
GEN_LEN: Final = 32
NUM_REQUESTS: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What `executor bench` is told.

    Without a `policy` file one is searched for, on the machine of `profile` (a file or a catalog
    name) or, if that is None, on this one, measured quickly. Lengths of None are the policy's
    workload's, or this module's constants if there is no policy; schedules of None are all, or the
    policy's alone on a machine of one level.
    """

    model: str
    policy: Path | None = None
    profile: str | None = None
    num_layers: int | None = None
    schedules: Sequence[ScheduleName] | None = None
    prompt_len: int | None = None
    gen_len: int | None = None
    num_requests: int | None = None
    repeats: int = 3
    seed: int = 0
    accelerator: AcceleratorOptions = field(default_factory=AcceleratorOptions)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One schedule, as its repeat of median tokens/s was; `least` and `most` span all repeats.

    `ratio` is to the first schedule's tokens/s. `bound_tokens_per_s` is the prediction with all
    lanes overlapping perfectly; `validation` lays the whole repeat beside its prediction.
    """

    schedule: str
    tokens_per_s: float
    least_tokens_per_s: float
    most_tokens_per_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_step_s: float
    prefill_busy_share: dict[str, float]
    decode_busy_share: dict[str, float]
    ratio: float
    predicted_tokens_per_s: float
    bound_tokens_per_s: float
    load_s: float
    validation: Validation


@final
class Bench:
    """A model and a policy made ready; a context manager that holds the checkpoint open.

    `policy_file` is what is run, cut to the layers asked for; `predicted` is it at the lengths of
    the requests. Raises HrmError if model and policy do not go together, or if no policy fits.
    """

    def __init__(self, options: BenchOptions) -> None:
        self._options, self.model = options, options.model
        with ExitStack() as stack:
            self._family, self._source, self._arch = _model(options, stack)
            self.policy_file = self._planned()
            self._stack = stack.pop_all()
        workload = replace(
            self.policy_file.workload,
            prompt_len=self._prompt_len,
            max_prompt_len=self._prompt_len,
            gen_len=self._gen_len,
            num_requests=self._num_requests,
        )
        self.policy_file = replace(self.policy_file, workload=workload)
        self.predicted = self.estimate(self.policy_file.policy)
        self._first: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the checkpoint."""
        self._stack.close()

    @property
    def spec(self) -> ModelSpec:
        """The model, of as many layers as are run."""
        return self._arch.spec

    @property
    def schedules(self) -> Sequence[ScheduleName]:
        """Those to run, in order."""
        if self._options.schedules is not None:
            return self._options.schedules
        if self.policy_file.profile.has_accelerator:
            return tuple(ScheduleName)
        return (self.policy_file.policy.schedule,)

    def row(self, schedule: ScheduleName) -> BenchRow:
        """Run all repeats under a schedule."""
        with self.start(schedule) as run:
            for _repeat in range(self._options.repeats):
                run.repeat()
            row = run.row()
        self._first = self._first or row.tokens_per_s
        return replace(row, ratio=row.tokens_per_s / self._first)

    def start(self, schedule: ScheduleName) -> "BenchRun":
        """Load the weights and get ready to run repeats one by one, say in turn with another's."""
        policy = replace(self.policy_file.policy, schedule=schedule)
        plan, backend = prepare(self._options.accelerator, self.policy_file, policy)
        if backend.name == "null":
            seconds_of = predicted_seconds(self.policy_file, policy)
            generator = NullGenerator(backend, self._arch, policy, seconds_of, max_spans=0)
        else:
            generator = Generator(
                backend, self._arch, policy, plan, family=self._family, source=self._source,
                max_spans=0,
            )  # fmt: skip
        return BenchRun(self, generator, plan)

    def requests(self) -> Iterator[Request]:
        """The requests of every repeat; nothing but their length ends them."""
        params = SamplingParams(max_tokens=self._gen_len, temperature=0, ignore_eos=True)
        generator = random.Random(self._options.seed)
        for index in range(self._num_requests):
            prompt = tuple(
                generator.randrange(self.spec.vocab_size) for _ in range(self._prompt_len)
            )
            yield Request(f"bench-{index}", prompt, params)

    def _planned(self) -> PolicyFile:
        """The policy given, or the one searched for, for as many layers as are run."""
        path, spec = self._options.policy, self.spec
        if path is None:
            return _solved(self._options, spec)
        if self._options.profile is not None:
            raise JobError(
                "--profile", self._options.profile,
                "does not go with --policy, whose file holds its machine", "leave one of them out",
            )  # fmt: skip
        policy_file = load_policy_file(path)
        if self._options.num_layers is not None:
            policy_file = _cut(policy_file, self._options.num_layers)
        check_model(spec, policy_file, path)
        return policy_file

    def estimate(self, policy: Policy) -> Estimate:
        """What is predicted of a policy at the lengths of the requests."""
        plan = self.policy_file
        return estimate(self.spec, policy, plan.profile, plan.workload)

    @property
    def _prompt_len(self) -> int:
        return self._options.prompt_len or round(self.policy_file.workload.prompt_len)

    @property
    def _gen_len(self) -> int:
        return self._options.gen_len or self.policy_file.workload.gen_len

    @property
    def _num_requests(self) -> int:
        given = self._options.num_requests
        if self._options.policy is None:
            return given or NUM_REQUESTS
        return given or self.policy_file.policy.batch_size


@final
class BenchRun:
    """One schedule being run; a context manager that owns the lanes.

    It may be entered again, so that another may compute with all cores in between.
    """

    def __init__(
        self, bench: Bench, generator: Generator | NullGenerator, plan: MemoryPlan
    ) -> None:
        self._bench, self._generator, self._plan = bench, generator, plan
        self._started, self._runs = datetime.now(UTC), list[Totals]()

    def __enter__(self) -> Self:
        """Start the lanes."""
        self._generator.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        """End the lanes."""
        self._generator.__exit__(*exception)

    def repeat(self) -> Totals:
        """Run all requests once more."""
        totals = Totals()
        requests = list(self._bench.requests())
        for request in requests:
            self._generator.check(request)
        for batch in Batcher(iter(requests), self._generator.policy):
            totals.add(self._generator.generate(batch))
        self._runs.append(totals)
        return totals

    def forget(self) -> None:
        """Leave out all repeats until now: they warmed the machine up."""
        self._runs.clear()

    def row(self) -> BenchRow:
        """What was measured in the repeats until now, of which there must be one."""
        bench, generator = self._bench, self._generator
        policy = generator.policy
        runs = sorted(self._runs, key=Totals.tokens_per_s)
        content = run_json(
            outcome="completed",
            message=None,
            policy_file=bench.policy_file,
            model=model_json(bench.spec, bench.model, policy.dtype),
            accelerator=accelerator_json(generator.backend),
            schedule=policy.schedule.value,
            totals=runs[(len(runs) - 1) // 2],
            load_s=generator.load_s,
            memory=memory_json(self._plan, generator.peak_bytes),
            started=self._started,
        )
        totals, phases = content["totals"], content["phases"]
        validation = validate(msgspec.convert(content, RunRecord))
        steps = sum(batch["decode_steps"] for batch in content["batches"])
        prefill_busy, decode_busy = (
            {lane: item["busy_share"] for lane, item in phases[phase.value]["lanes"].items()}
            for phase in Phase
        )
        return BenchRow(
            schedule=policy.schedule.value,
            tokens_per_s=totals["tokens_per_s"],
            least_tokens_per_s=runs[0].tokens_per_s(),
            most_tokens_per_s=runs[-1].tokens_per_s(),
            prefill_tokens_per_s=totals["prefill_tokens_per_s"],
            decode_tokens_per_s=totals["decode_tokens_per_s"],
            decode_step_s=totals["decode_s"] / max(steps, 1),
            prefill_busy_share=prefill_busy,
            decode_busy_share=decode_busy,
            ratio=1.0,
            predicted_tokens_per_s=validation.tokens_per_s.predicted,
            bound_tokens_per_s=bench.estimate(policy).bound_tokens_per_s,
            load_s=generator.load_s,
            validation=validation,
        )


def _model(
    options: BenchOptions, stack: ExitStack
) -> tuple[AbstractFamily, WeightSource, Architecture]:
    layers = options.num_layers
    if options.model in BUILT_IN_MODELS:
        spec = load_model(options.model)
        family = family_for({"model_type": spec.family}, f"--model {options.model}")
        arch = family.published_architecture(spec)
        source: WeightSource = RandomWeights(options.seed)
    else:
        checkpoint = stack.enter_context(Checkpoint.open(options.model))
        family = family_for(checkpoint.config, checkpoint.config_path)
        arch = family.architecture(checkpoint.config, checkpoint.config_path)
        checkpoint.check(family.expected_tensors(arch))
        source = checkpoint
    if layers is not None:
        if layers > arch.spec.num_layers:
            raise JobError(
                "--layers", layers, f"must be at most the model's {arch.spec.num_layers}",
                "lower it",
            )  # fmt: skip
        arch = replace(arch, spec=replace(arch.spec, num_layers=layers))
    return family, source, arch


def _cut(policy_file: PolicyFile, num_layers: int) -> PolicyFile:
    """The policy file for a model of fewer layers; those left are picked evenly."""
    counts, total = policy_file.policy.resident_experts, policy_file.model.num_layers
    picked = tuple(counts[i * total // num_layers] for i in range(num_layers))
    return replace(
        policy_file,
        policy=replace(policy_file.policy, resident_experts=picked),
        model=replace(policy_file.model, num_layers=num_layers),
    )


def _solved(options: BenchOptions, spec: ModelSpec) -> PolicyFile:
    """The best policy for the model and the requests, on the machine that is asked for."""
    from hrm.search.exhaustive import search

    prompt_len = options.prompt_len or PROMPT_LEN
    workload = Workload(
        name="bench",
        prompt_len=prompt_len,
        max_prompt_len=prompt_len,
        gen_len=options.gen_len or GEN_LEN,
        num_requests=options.num_requests or NUM_REQUESTS,
    )
    profile = _machine(options, spec)
    with_bfloat16 = "bfloat16" in profile.top.processor.compute_flops_per_s
    dtype = "bfloat16" if with_bfloat16 else "float16"
    found = search(spec, profile, workload, dtype=dtype)
    return policy_file_of(found.require(), spec, profile, workload)


def _machine(options: BenchOptions, spec: ModelSpec) -> HardwareProfile:
    """The machine to plan for: the one named, or this one measured quickly."""
    asked = options.accelerator
    memory, bandwidth = asked.gpu_memory_bytes, asked.link_bytes_per_s
    if options.profile is not None:
        profile = load_profile(options.profile)
        if memory is not None:
            profile = with_memory(profile, gpu_memory_bytes=memory)
        pace = AcceleratorRecord(
            name=asked.name, description="", h2d_bytes_per_s=bandwidth, d2h_bytes_per_s=bandwidth
        )
        return paced(profile, pace)
    if asked.name == "null":
        raise JobError(
            "--accelerator", asked.name, "does no work, so there is nothing to measure",
            "give --profile or --policy",
        )  # fmt: skip
    from hrm.profiling.machine import profile_machine

    name = "emulated" if asked.name == "auto" and (memory or bandwidth) else asked.name
    return in_thread_of_its_own(
        lambda: profile_machine(
            name,
            gpu_memory_bytes=memory,
            link_bandwidth_bytes_per_s=bandwidth,
            quick=True,
            model=spec,
            dtypes=("bfloat16",),
            command="executor bench",
        )
    )
