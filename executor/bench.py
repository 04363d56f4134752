"""The same policy under several schedules, on prompts of random tokens."""

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from executor.batching import Batcher, Request
from executor.checkpoint import Checkpoint, RandomWeights, WeightSource
from executor.errors import JobError
from executor.families import AbstractFamily, family_for
from executor.generate import Generator
from executor.job.machine import AcceleratorOptions, check_model, prepare
from executor.job.report import Totals
from executor.model import Architecture
from executor.sampling import SamplingParams
from hrm.model_spec import BUILT_IN_MODELS, load_model
from hrm.policy import ScheduleName
from hrm.policy_file import PolicyFile, load_policy_file
from hrm.tasks import Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What `executor bench` is told; lengths of None are the policy's workload's."""

    policy: Path
    model: str
    num_layers: int | None = None
    schedules: Sequence[ScheduleName] = tuple(ScheduleName)
    prompt_len: int | None = None
    gen_len: int | None = None
    num_requests: int | None = None
    repeats: int = 3
    seed: int = 0
    accelerator: AcceleratorOptions = field(default_factory=AcceleratorOptions)


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One schedule: medians over the repeats; `ratio` is to the first schedule's tokens/s."""

    schedule: str
    tokens_per_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_step_s: float
    decode_busy_share: dict[str, float]
    ratio: float


def run_bench(options: BenchOptions) -> Iterator[BenchRow]:
    """Rows of the table, as they are ready; HrmError if model and policy do not go together."""
    policy_file = load_policy_file(options.policy)
    with ExitStack() as stack:
        family, source, arch = _model(options, stack)
        if options.num_layers is not None:
            policy_file = _cut(policy_file, options.num_layers)
        check_model(arch.spec, policy_file, options.policy)
        first = None
        for schedule in options.schedules:
            row = _row(options, policy_file, schedule, family, source, arch, first)
            first = first or row.tokens_per_s
            yield row


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


def _row(
    options: BenchOptions, policy_file: PolicyFile, schedule: ScheduleName, family: AbstractFamily,
    source: WeightSource, arch: Architecture, first: float | None,
) -> BenchRow:  # fmt: skip
    policy = replace(policy_file.policy, schedule=schedule)
    plan, backend = prepare(options.accelerator, policy_file, policy)
    runs: list[Totals] = []
    with Generator(
        backend, arch, policy, plan, family=family, source=source, max_spans=0
    ) as generator:
        for _repeat in range(options.repeats):
            totals = Totals()
            requests = list(_requests(options, policy_file, arch.spec.vocab_size))
            for request in requests:
                generator.check(request)
            for batch in Batcher(iter(requests), policy):
                totals.add(generator.generate(batch))
            runs.append(totals)
    numbers = [totals.to_json(generator.load_s) for totals in runs]

    def mid(key: str) -> float:
        return median(number[key] for number in numbers)

    steps = sum(batch["decode_steps"] for batch in runs[0].batches)
    lanes: dict[str, list[float]] = {}
    for totals in runs:
        phase: dict[str, Any] = totals.phases[Phase.DECODE].to_json()
        for lane, item in phase["lanes"].items():
            lanes.setdefault(lane, []).append(item["busy_share"])
    tokens_per_s = mid("tokens_per_s")
    return BenchRow(
        schedule=schedule.value,
        tokens_per_s=tokens_per_s,
        prefill_tokens_per_s=mid("prefill_tokens_per_s"),
        decode_tokens_per_s=mid("decode_tokens_per_s"),
        decode_step_s=mid("decode_s") / max(steps, 1),
        decode_busy_share={lane: median(shares) for lane, shares in lanes.items()},
        ratio=tokens_per_s / (first or tokens_per_s),
    )


def _requests(options: BenchOptions, policy_file: PolicyFile, vocab_size: int) -> Iterator[Request]:
    workload = policy_file.workload
    prompt_len = options.prompt_len or round(workload.prompt_len)
    params = SamplingParams(
        max_tokens=options.gen_len or workload.gen_len, temperature=0, ignore_eos=True
    )
    generator = random.Random(options.seed)
    for index in range(options.num_requests or policy_file.policy.batch_size):
        prompt = tuple(generator.randrange(vocab_size) for _ in range(prompt_len))
        yield Request(f"bench-{index}", prompt, params)
