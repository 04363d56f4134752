"""What a policy runs on: the accelerator that is asked for, and the memory it is held to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path

from executor.backends import AbstractBackend, EmulatedMachine, computes, cuda_index_of, make_backend
from executor.batching import Batch
from executor.errors import RunError
from executor.generate import Planned, Prepared
from executor.model.crossings import adopt
from hrm.contract.pacing import EMULATED_LATENCY_S
from hrm.costs import Costs, TaskWork
from hrm.errors import PolicyError
from hrm.estimate import estimate
from hrm.formats import SCALED_KV_FORMATS
from hrm.hardware import CPU, GPU, Figure, HardwareProfile, Link, Rate, Source
from hrm.machines import with_host_memory
from hrm.memory import MemoryPlan, parts_of_host, plan_memory
from hrm.model_spec import ModelSpec
from hrm.parallel import Part, Share, ranks_of
from hrm.phases import decode_work, prefill_work, simulate_work
from hrm.policy import Policy
from hrm.policy_file import PolicyFile, policy_file_of, profile_hash
from hrm.profiling.environment import available_ram_bytes
from hrm.scaling import paced
from hrm.schedules import Pipeline
from hrm.tasks import Phase, TaskId
from hrm.units import format_bandwidth
from hrm.validate import runtime_with


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceleratorOptions:
    """The accelerator that is asked for; what is None is as in the policy file."""

    name: str = "auto"
    gpu_memory_bytes: int | None = None
    link_bytes_per_s: float | None = None


def check_model(spec: ModelSpec, policy_file: PolicyFile, path: Path | str) -> None:
    """Raise PolicyError if the policy is for a model of other dimensions."""
    solved_for = replace(policy_file.model, name=spec.name)
    if solved_for != spec:
        where, planned, there_is = _difference(solved_for, spec, "model")
        raise PolicyError(
            f"{path}: {where}", planned, f"must be the model's {there_is!r}", "run hrm search with this --model"
        )


def _difference(planned: object, there_is: object, where: str) -> tuple[str, object, object]:
    """Where two values first differ within them, and what stands there."""
    if isinstance(planned, tuple) and isinstance(there_is, tuple):
        if len(planned) != len(there_is):
            return where, f"<{len(planned)} of them>", len(there_is)
        parts = [(f"{where}[{index}]", a, b) for index, (a, b) in enumerate(zip(planned, there_is, strict=True))]
    elif is_dataclass(planned) and type(planned) is type(there_is):
        compared = [item.name for item in fields(planned) if item.compare]
        parts = [(f"{where}.{name}", getattr(planned, name), getattr(there_is, name)) for name in compared]
    else:
        return where, planned, there_is
    return next(_difference(a, b, part) for part, a, b in parts if a != b)


def files_of_ranks(policy_file: PolicyFile) -> tuple[PolicyFile, ...]:
    """What each process of a run runs, by its rank: the policy file, or its part of policy, model and machine.

    Ranks are the stages of a pipeline, in order. Each has as much of the host's memory as it plans of what all plan.
    Raises PolicyError if the policy was made for another part.
    """
    shares = ranks_of(policy_file.policy, policy_file.model, policy_file.profile)
    if shares[0].part.profile is policy_file.profile:
        return (policy_file,)
    budgets, gpu = policy_file.memory_budget_bytes, policy_file.profile.top
    whole = with_host_memory(policy_file.profile, budgets[CPU], policy_file.profile.host.usable_pinned_bytes)

    def of_rank(share: Share, part: Part) -> PolicyFile:
        spec, profile = part
        return replace(
            policy_file,
            policy=replace(share.policy, gpus=()),
            model=spec,
            profile=profile,
            profile_hash=profile_hash(profile),
            memory_budget_bytes={
                GPU: budgets[GPU] * profile.top.usable_bytes // gpu.usable_bytes,
                CPU: profile.host.usable_bytes,
            },
        )

    return tuple(map(of_rank, shares, parts_of_host(shares, whole)))


def check_formats(policy: Policy) -> None:
    """Raise PolicyError unless weights and KV cache have the format of compute, or the cache is quantised."""
    runs = (("weight_format", policy.weight_format, ()), ("kv_format", policy.kv_format, (*SCALED_KV_FORMATS,)))
    for name, chosen, others in runs:
        if chosen not in (policy.dtype, *others):
            raise PolicyError(
                f"policy: {name}",
                chosen,
                f"must be {' or '.join((policy.dtype, *others))}, as {policy.dtype} is computed in",
                f"solve the policy again with hrm search --dtype {policy.dtype}",
            )


def prepare(
    options: AcceleratorOptions, policy_file: PolicyFile, policy: Policy, *, others: Sequence[PolicyFile] = ()
) -> Prepared:
    """The memory plan against the budgets, and the backend; before anything large is touched.

    The policy file is that of one process, and `others` are those of further ranks on this machine. Raises PolicyError
    if a policy does not fit, and RunError if the accelerator cannot be had or there are several.
    """
    check_formats(policy)
    profile = policy_file.profile
    if profile.num_gpus > 1:
        raise RunError(
            "policy: profile.num_gpus",
            profile.num_gpus,
            "are run by a process each, which has its own part of the policy",
            "solve the policy for one GPU",
        )
    adopt(profile)
    name = accelerator_for(options.name, profile)
    machine = emulated_machine(options, policy_file)
    backend = make_backend(name, machine, gpu_memory_bytes=options.gpu_memory_bytes)
    plan = budgeted_plan(policy_file, policy, options.gpu_memory_bytes)
    plans = [plan, *(budgeted_plan(other, other.policy, options.gpu_memory_bytes) for other in others)]
    for each in plans:
        each.check_fits()
    _check_link(backend, options)
    if backend.has_own_memory:
        _check_levels(name, profile)
    backend.check_dtype(policy.dtype)
    backend.check_room(plan.gpu.planned_bytes)
    needed_bytes = sum(_host_bytes(each, backend) for each in plans)
    available = available_ram_bytes() + backend.kept_host_bytes()
    if needed_bytes > available:
        raise PolicyError(
            "policy: memory of this machine",
            f"<{needed_bytes} bytes planned>",
            f"must fit the {available} bytes that are available",
            "close other programs, or search again with a lower --cpu-memory",
        )
    return Prepared(backend, Planned(policy, plan), _staged(policy_file, policy, options, backend))


def _host_bytes(plan: MemoryPlan, backend: AbstractBackend) -> int:
    """What a run takes of this machine's memory."""
    if not computes(backend.name):
        return 0
    levels = (plan.cpu,) if backend.has_own_memory else (plan.gpu, plan.cpu)
    return sum({level.name: level.planned_bytes for level in levels}.values())


def _staged(
    policy_file: PolicyFile, policy: Policy, options: AcceleratorOptions, backend: AbstractBackend
) -> Planned | None:
    """The policy with its weights staged; None if it stages them, or if that cannot be had."""
    profile = policy_file.profile
    if policy.staging or not profile.has_link(profile.host.name, profile.host.name, "staging"):
        return None
    staged = replace(policy, staging=True, experts_per_part=0)
    plan = budgeted_plan(policy_file, staged, options.gpu_memory_bytes)
    fits = plan.fits and _host_bytes(plan, backend) <= available_ram_bytes() + backend.kept_host_bytes()
    return Planned(staged, plan) if fits else None


def as_run(policy_file: PolicyFile, policy: Policy, pageable: Sequence[str]) -> PolicyFile:
    """The policy file of what is run, if not all was pinned: with that policy's prediction."""
    if policy.staging == policy_file.policy.staging:
        return policy_file
    run = replace(policy_file.policy, staging=policy.staging, experts_per_part=policy.experts_per_part)
    spec, profile, workload = policy_file.model, policy_file.profile, policy_file.workload
    predicted = estimate(spec, run, profile, workload, runtime=runtime_with(pageable, profile))
    made = policy_file_of(predicted, spec, profile, workload)
    return replace(made, memory_budget_bytes=policy_file.memory_budget_bytes)


def accelerator_for(name: str, profile: HardwareProfile) -> str:
    """The accelerator that is meant: `auto` is the GPU that the policy was solved for, if there."""
    if name == "auto" and profile.accelerator == "cuda":
        index = cuda_index_of(profile.top.processor.name)
        if index is not None:
            return f"cuda:{index}"
    return name


def _check_levels(name: str, profile: HardwareProfile) -> None:
    if not profile.has_accelerator:
        raise RunError(
            "--accelerator",
            name,
            "needs a policy for two levels of memory, and this one has one",
            "solve it for a profile with a GPU, say of hrm profile --accelerator cuda:0",
        )


def _check_link(backend: AbstractBackend, options: AcceleratorOptions) -> None:
    if options.link_bytes_per_s is not None and computes(backend.name) and not backend.is_emulated:
        raise RunError(
            "--link-bandwidth",
            f"<{format_bandwidth(options.link_bytes_per_s)}>",
            "is what an emulated link is paced to",
            "leave it out or use --accelerator emulated",
        )


def predicted_seconds(
    policy_file: PolicyFile, policy: Policy
) -> Callable[[Pipeline, Batch], Callable[[TaskId], float]]:
    """How long the tasks of a batch's pipeline should take, by the policy file's machine."""
    costs = Costs(policy_file.model, policy_file.profile, policy.formats)

    def seconds_of(pipeline: Pipeline, batch: Batch) -> Callable[[TaskId], float]:
        placed = [placed for micro_batch in batch.micro_batches for placed in micro_batch.placed]
        prompts = [len(one.request.prompt) for one in placed]
        prefill = pipeline.phase is Phase.PREFILL
        mean = sum(prompts) / len(prompts)
        new = max(one.request.params.max_tokens for one in placed)
        parts = pipeline.num_micro_batches
        work = TaskWork(
            costs=costs,
            policy=policy,
            pipeline=pipeline,
            tokens=sum(prompts) / parts if prefill else len(prompts) / parts,
            context=mean if prefill else mean + new / 2,
            requests_per_chunk=len(prompts) / parts if prefill else 0.0,
        )
        return work.seconds_of()

    return seconds_of


def longest_task_s(options: AcceleratorOptions, policy_file: PolicyFile) -> float:
    """What the longest task of a full batch should take, by the policy file's machine and the pace of its link."""
    policy, workload = policy_file.policy, policy_file.workload
    profile = paced(policy_file.profile, options.link_bytes_per_s, options.link_bytes_per_s)
    costs = Costs(policy_file.model, profile, policy.formats)
    decode = decode_work(costs, policy, workload.max_context_len, num_steps=1, tokens=policy.micro_batch_size)
    traces = map(simulate_work, (prefill_work(costs, policy, workload), decode))
    return max(span.end_s - span.start_s for trace in traces for span in trace.spans)


def budgeted_plan(policy_file: PolicyFile, policy: Policy, gpu_memory_bytes: int | None = None) -> MemoryPlan:
    """The policy's memory plan with the policy file's budgets as capacities."""
    plan = plan_memory(policy_file.model, policy, policy_file.profile)
    budgets = dict(policy_file.memory_budget_bytes)
    if gpu_memory_bytes is not None:
        budgets[plan.gpu.name] = gpu_memory_bytes
    gpu, cpu = (
        replace(level, capacity_bytes=budgets.get(level.name, level.capacity_bytes)) for level in (plan.gpu, plan.cpu)
    )
    return MemoryPlan(gpu, cpu, plan.pinned)


def emulated_machine(options: AcceleratorOptions, policy_file: PolicyFile) -> EmulatedMachine | None:
    """The accelerator to emulate: the policy's, changed as the options say; None if it has none."""
    profile = policy_file.profile
    bandwidth = options.link_bytes_per_s
    if profile.has_accelerator:
        memory = options.gpu_memory_bytes
        if memory is None:
            memory = policy_file.memory_budget_bytes.get(profile.top.name, profile.top.usable_bytes)
        h2d, d2h = profile.h2d, profile.d2h
    elif options.name == "emulated" and options.gpu_memory_bytes is not None and bandwidth is not None:
        memory = options.gpu_memory_bytes
        h2d, d2h = (_link(*ends, bandwidth) for ends in (("cpu", "gpu"), ("gpu", "cpu")))
    else:
        return None
    if bandwidth is not None:
        h2d, d2h = (replace(link, bandwidth_bytes_per_s=_rate(bandwidth)) for link in (h2d, d2h))
    return EmulatedMachine(gpu_memory_bytes=memory, h2d=h2d, d2h=d2h)


def _rate(value: float) -> Rate:
    note = "given on the command line: --link-bandwidth"
    return Rate(achieved=Figure(value=value, source=Source.GIVEN, note=note))


def _link(source: str, target: str, bandwidth: float) -> Link:
    latency = Figure(value=EMULATED_LATENCY_S, source=Source.ASSUMED, note="emulated link")
    return Link(source=source, target=target, latency_s=latency, bandwidth_bytes_per_s=_rate(bandwidth))
