"""What a benchmark runs: its options, its model, and a policy for them if none is given."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import torch

from executor.backends import computes, in_thread_of_its_own
from executor.checkpoint import Checkpoint
from executor.download import Located, locate
from executor.errors import CheckpointError, JobError
from executor.job.machine import AcceleratorOptions
from executor.job.weights import ModelWeights
from executor.model.host_kernels import host_kernels
from hrm.errors import closest
from hrm.hardware import HardwareProfile
from hrm.machines import load_profile, with_memory
from hrm.model_spec import BUILT_IN_MODELS, ModelSpec, load_model
from hrm.parallel import used_of
from hrm.policy import Parallelism, ScheduleName
from hrm.policy_file import PolicyFile, policy_file_of
from hrm.scaling import paced
from hrm.units import is_whole_number
from hrm.workload import Workload

PROMPT_LEN: Final = 64  # without a policy and unless told otherwise
GEN_LEN: Final = 32
NUM_REQUESTS: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What `executor bench` is told.

    The `model` is a checkpoint's folder, one on the Hub, or a built-in name or any shape, which get random weights.
    Without a `policy` one is searched for, on the machine of `profile` (a file or a catalog name)
    or, if that is None, on this one with so many `gpus`, measured quickly. Prompts have `prompt_len` tokens each, or on
    average if `max_prompt_len` is greater. Lengths of None are the policy's workload's, or this
    module's constants if there is no policy; schedules of None are all, or the policy's alone on a
    machine of one level.
    """

    model: str | ModelSpec
    policy: Path | PolicyFile | None = None
    profile: str | None = None
    num_layers: int | None = None
    schedules: Sequence[ScheduleName] | None = None
    prompt_len: int | None = None
    max_prompt_len: int | None = None
    gen_len: int | None = None
    num_requests: int | None = None
    repeats: int = 3
    seed: int = 0
    gpus: int | None = None
    accelerator: AcceleratorOptions = field(default_factory=AcceleratorOptions)


def _built_in(name: str) -> str | ModelSpec:
    """The built-in model of that name, or else the name; CheckpointError if one was perhaps meant."""
    if name in BUILT_IN_MODELS:
        return load_model(name)
    if "/" not in name and not Path(name).exists() and (near := closest(name, BUILT_IN_MODELS)):
        rule = "must be a checkpoint's folder, org/name on the Hub, or a built-in name"
        raise CheckpointError("--model", name, rule, f"did you mean {near}?")
    return name


def model_of(options: BenchOptions, stack: ExitStack) -> tuple[ModelWeights, Located | None]:
    """The model that is asked for with its weights, and where these are, if they are not random.

    `stack` is to hold a checkpoint open.
    """
    layers, model, located = options.num_layers, options.model, None
    if isinstance(model, str):
        model = _built_in(model)
    if isinstance(model, ModelSpec):
        found = ModelWeights.random(model, options.seed)
    else:
        located = locate(model)
        checkpoint = stack.enter_context(Checkpoint.open(located.folder, located.name))
        found = ModelWeights.of_checkpoint(checkpoint)
        checkpoint.check(found.family.expected_tensors(found.arch, checkpoint.names))
    if layers is not None:
        most = found.arch.spec.num_layers
        if layers > most:
            raise JobError("--layers", layers, f"must be at most the model's {most}", "lower it")
        found = found.cut(layers)
    return found, located


def cut(policy_file: PolicyFile, num_layers: int) -> PolicyFile:
    """The policy file for a model of fewer layers; those left are picked evenly. JobError if stages divide them."""
    policy, stages = policy_file.policy, policy_file.profile.num_gpus
    if policy.parallelism is Parallelism.PIPELINE and stages > 1:
        rule = f"goes with no policy of {stages} stages, which has a length for each"
        raise JobError("--layers", num_layers, rule, "leave it out, or solve the policy with --parallelism tensor")
    counts, total = policy_file.policy.resident_experts, policy_file.model.num_layers
    picked = tuple(counts[i * total // num_layers] for i in range(num_layers))
    return replace(
        policy_file,
        policy=replace(policy_file.policy, resident_experts=picked),
        model=policy_file.model.with_layers(policy_file.model.layers[:num_layers]),
    )


def at_once(policy_file: PolicyFile) -> int:
    """How many requests are under way together under a policy: a batch, or one for every stage of a pipeline."""
    policy, gpus = policy_file.policy, used_of(policy_file.profile, policy_file.policy).num_gpus
    return policy.batch_size * (gpus if policy.parallelism is Parallelism.PIPELINE else 1)


def workload_of(options: BenchOptions, usual: Workload) -> Workload:
    """The requests that are asked for; what the options leave open is as usual."""
    prompt_len = round(usual.prompt_len) if options.prompt_len is None else options.prompt_len
    longest = prompt_len if options.max_prompt_len is None else options.max_prompt_len
    return replace(
        usual,
        prompt_len=prompt_len,
        max_prompt_len=longest,
        gen_len=usual.gen_len if options.gen_len is None else options.gen_len,
        num_requests=usual.num_requests if options.num_requests is None else options.num_requests,
    )


def solved(options: BenchOptions, spec: ModelSpec) -> PolicyFile:
    """The best policy for the model and the requests, on the machine that is asked for."""
    from hrm.search import Space, search

    usual = Workload(
        name="bench", prompt_len=PROMPT_LEN, max_prompt_len=PROMPT_LEN, gen_len=GEN_LEN, num_requests=NUM_REQUESTS
    )
    workload, profile = workload_of(options, usual), _machine(options, spec)
    found = search(Space(spec, profile, workload, dtype=profile.default_dtype, all_gpus=options.gpus is not None))
    return policy_file_of(found.require(), spec, profile, workload)


def _machine(options: BenchOptions, spec: ModelSpec) -> HardwareProfile:
    """The machine to plan for: the one named, or this one measured quickly."""
    asked = options.accelerator
    memory, bandwidth = asked.gpu_memory_bytes, asked.link_bytes_per_s
    if options.profile is not None:
        profile = load_profile(options.profile)
        if memory is not None:
            profile = with_memory(profile, gpu_memory_bytes=memory)
        return paced(profile, bandwidth, bandwidth)
    if not computes(asked.name):
        raise JobError(
            "--accelerator", asked.name, "does no work, so there is nothing to measure", "give --profile or --policy"
        )
    from hrm.profiling.machine import ProfileOptions, profile_machine

    emulate = bandwidth is not None or (memory is not None and not torch.cuda.is_available())
    name = "emulated" if asked.name == "auto" and emulate else asked.name
    wanted = ProfileOptions(
        _all_of(name, options.gpus or 1),
        gpu_memory_bytes=memory,
        link_bandwidth_bytes_per_s=bandwidth,
        quick=True,
        model=spec,
        dtypes=("bfloat16",),
        command="executor bench",
        kernels=host_kernels(),
    )
    return in_thread_of_its_own(lambda: profile_machine(wanted))


def _all_of(accelerator: str, gpus: int) -> str:
    """What is measured of so many accelerators; JobError if there is no such kind of more than one."""
    kind, _, first = accelerator.partition(":")
    if gpus == 1 or "," in first:
        return accelerator
    if kind == "auto" and torch.cuda.is_available():
        kind = "cuda"
    if kind == "emulated":
        return f"emulated:{gpus}"
    if kind == "cuda" and is_whole_number(first or "0"):
        return f"cuda:{','.join(str(int(first or 0) + gpu) for gpu in range(gpus))}"
    rule = f"must be cuda or emulated for {gpus} of them"
    raise JobError("--accelerator", accelerator, rule, "say which, with --gpu-memory and --link-bandwidth if emulated")
