"""Options that many commands share: which machine, which model, which workload."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, Final

import click

from hrm.errors import PolicyError, ProfileError, WorkloadError
from hrm.hardware import HardwareProfile
from hrm.machines import compose, load_profile, with_memory
from hrm.memory import plan_memory
from hrm.model_spec import ModelSpec, load_model
from hrm.policy import ScheduleName
from hrm.policy_file import PolicyFile, load_policy_file, policy_file_of
from hrm.units import DTYPE_BYTES, parse_bytes
from hrm.workload import Workload, named_workload

Command = Callable[..., Any]


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_machine = _options(
    click.option(
        "--profile", metavar="FILE-or-NAME", help="A measured machine (hrm profile --out)."
    ),
    click.option("--gpus", metavar="4xT4", help="A catalog machine: GPUs by count and name."),
    click.option(
        "--host", metavar="NAME", help="The host of --gpus [default: the GPU's usual one]."
    ),
    click.option("--gpu-memory", metavar="16GB", help="Plan with this much GPU memory in all."),
    click.option("--cpu-memory", metavar="192GB", help="Plan with this much host memory."),
)
_workload = _options(
    click.option(
        "--workload", metavar="NAME", help="mtbench, synthetic-reasoning or summarization."
    ),
    click.option("--prompt-len", type=float, help="Mean prompt length in tokens."),
    click.option("--max-prompt-len", type=int, help="Longest prompt [default: the mean]."),
    click.option("--gen-len", type=int, help="Tokens generated a request."),
    click.option("--requests", type=int, help="Number of requests [default: without end]."),
)


def machine_options(command: Command) -> Command:
    """Give a command `profile: HardwareProfile` from --profile or --gpus and the overrides."""

    @_machine
    @wraps(command)
    def wrapper(
        *args: Any, profile: str | None, gpus: str | None, host: str | None,
        gpu_memory: str | None, cpu_memory: str | None, **others: Any,
    ) -> Any:  # fmt: skip
        machine = resolve_machine(profile, gpus, host, gpu_memory, cpu_memory)
        return command(*args, profile=machine, **others)

    return wrapper


def resolve_machine(
    profile: str | None, gpus: str | None, host: str | None, gpu_memory: str | None,
    cpu_memory: str | None,
) -> HardwareProfile:  # fmt: skip
    """The machine that the options name; ProfileError if they name none or two."""
    if (profile is None) == (gpus is None):
        raise ProfileError(
            "--profile and --gpus", "<both>" if profile else "<neither>",
            "exactly one must name the machine", "give --gpus 1xT4, or --profile with a file",
        )  # fmt: skip
    if profile is not None and host is not None:
        raise ProfileError(
            "--host", host, "goes with --gpus only", "drop it: the profile has its own host"
        )
    machine = load_profile(profile) if profile is not None else compose(gpus or "", host)
    return _with_given_memory(machine, gpu_memory, cpu_memory)


def _with_given_memory(
    machine: HardwareProfile, gpu_memory: str | None, cpu_memory: str | None
) -> HardwareProfile:
    if gpu_memory is None and cpu_memory is None:
        return machine
    return with_memory(
        machine,
        gpu_memory_bytes=parse_bytes(gpu_memory, "--gpu-memory")
        if gpu_memory is not None
        else None,
        cpu_memory_bytes=parse_bytes(cpu_memory, "--cpu-memory")
        if cpu_memory is not None
        else None,
    )


def workload_options(command: Command) -> Command:
    """Give a command `workload: Workload` from a name, from lengths, or from both."""

    @_workload
    @wraps(command)
    def wrapper(
        *args: Any, workload: str | None, prompt_len: float | None, max_prompt_len: int | None,
        gen_len: int | None, requests: int | None, **others: Any,
    ) -> Any:  # fmt: skip
        resolved = resolve_workload(workload, prompt_len, max_prompt_len, gen_len, requests)
        return command(*args, workload=resolved, **others)

    return wrapper


def resolve_workload(
    name: str | None, prompt_len: float | None, max_prompt_len: int | None, gen_len: int | None,
    requests: int | None,
) -> Workload:  # fmt: skip
    """The workload that the options describe; lengths given override the named workload's."""
    lengths_given = any(value is not None for value in (prompt_len, max_prompt_len, gen_len))
    if name is None and not lengths_given:
        name = "mtbench"
    if name is None:
        if prompt_len is None or gen_len is None:
            raise WorkloadError(
                "--prompt-len and --gen-len", "<only some of them>", "both are needed",
                "give both, or --workload NAME",
            )  # fmt: skip
        return Workload(
            name="given",
            prompt_len=prompt_len,
            max_prompt_len=_longest(prompt_len) if max_prompt_len is None else max_prompt_len,
            gen_len=gen_len,
            num_requests=requests,
        )
    base = named_workload(name)
    mean = base.prompt_len if prompt_len is None else prompt_len
    longest = base.max_prompt_len if prompt_len is None else _longest(mean)
    return replace(
        base,
        prompt_len=mean,
        max_prompt_len=longest if max_prompt_len is None else max_prompt_len,
        gen_len=base.gen_len if gen_len is None else gen_len,
        num_requests=requests,
    )


def _longest(prompt_len: float) -> int:
    """The longest prompt if nothing is said of it: the mean, rounded up."""
    if not math.isfinite(prompt_len):
        raise WorkloadError("--prompt-len", prompt_len, "must be finite", "give a number of tokens")
    return math.ceil(prompt_len)


plan_sources = _options(
    click.option(
        "--policy", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
        help="A policy file (hrm search --out); without one, a policy is searched for.",
    ),
    click.option("--model", metavar="NAME-or-PATH", help="The model to search a policy for."),
    _machine,
    _workload,
)  # fmt: skip


_PLAN_SOURCES: Final = (
    "policy", "model", "schedule", "profile", "gpus", "host", "gpu_memory", "cpu_memory",
    "workload", "prompt_len", "max_prompt_len", "gen_len", "requests",
)  # fmt: skip


def plan_options(command: Command) -> Command:
    """Give a command `plan: PolicyFile`: read from --policy, or searched for.

    With --policy, machine and workload options replace what the file was solved for.
    """

    @click.option(
        "--schedule",
        type=click.Choice([name.value for name in ScheduleName]),
        help="Run the policy in this order [default: the policy's, or cgopipe].",
    )
    @plan_sources
    @wraps(command)
    def wrapper(*args: Any, **options: Any) -> Any:
        sources = {name: options.pop(name) for name in _PLAN_SOURCES}
        return command(*args, plan=resolve_plan(**sources), **options)

    return wrapper


def resolve_plan(
    *, policy: Path | None, model: str | None, schedule: str | None, profile: str | None,
    gpus: str | None, host: str | None, gpu_memory: str | None, cpu_memory: str | None,
    workload: str | None, prompt_len: float | None, max_prompt_len: int | None,
    gen_len: int | None, requests: int | None,
) -> PolicyFile:  # fmt: skip
    """The plan that the options of `plan_sources` and a schedule's name describe.

    Raises PolicyError if they name neither a policy nor a model, or both.
    """
    lengths = (workload, prompt_len, max_prompt_len, gen_len, requests)
    if policy is not None:
        if model is not None:
            raise PolicyError(
                "--model", model, "does not go with --policy, whose file holds its model",
                "leave one of them out",
            )  # fmt: skip
        plan = load_policy_file(policy)
        if any((profile, gpus, host)):
            machine = resolve_machine(profile, gpus, host, gpu_memory, cpu_memory)
        else:
            machine = _with_given_memory(plan.profile, gpu_memory, cpu_memory)
        if machine is not plan.profile:
            plan_memory(plan.model, plan.policy, machine).check_fits()
            plan = replace(plan, profile=machine)
        if any(value is not None for value in lengths):
            plan = replace(plan, workload=resolve_workload(*lengths))
        if schedule is not None:
            plan = replace(plan, policy=replace(plan.policy, schedule=ScheduleName(schedule)))
        return plan
    if model is None:
        raise PolicyError(
            "--policy and --model",
            "<neither>",
            "one must say what is run",
            "give --policy FILE, or --model NAME with --gpus or --profile",
        )
    from hrm.search.exhaustive import search

    machine = resolve_machine(profile, gpus, host, gpu_memory, cpu_memory)
    spec, asked = load_model(model), resolve_workload(*lengths)
    result = search(
        spec,
        machine,
        asked,
        dtype=default_dtype(machine),
        schedule=ScheduleName(schedule or "cgopipe"),
    )
    return policy_file_of(result.require(), spec, machine, asked)


def default_dtype(profile: HardwareProfile) -> str:
    """bfloat16, or float16 where the top level's processor has no bfloat16."""
    has_bfloat16 = "bfloat16" in profile.top.processor.compute_flops_per_s
    return "bfloat16" if has_bfloat16 else "float16"


@dataclass(frozen=True, slots=True)
class ChosenModel:
    """A model and where its weights are, if it was given as a folder."""

    spec: ModelSpec
    argument: str


def model_options(command: Command) -> Command:
    """Give a command `model: ChosenModel` and `dtype`, one that the machine's GPU has."""

    @click.option(
        "--model", required=True, metavar="NAME-or-PATH",
        help="A built-in name (hrm models), a checkpoint folder, or a config.json.",
    )  # fmt: skip
    @click.option(
        "--dtype",
        type=click.Choice(["auto", *DTYPE_BYTES]),
        default="auto",
        show_default=True,
        help="Of weights, KV cache and compute; auto is bfloat16, or float16 where it is missing.",
    )
    @wraps(command)
    def wrapper(*args: Any, model: str, dtype: str, profile: HardwareProfile, **others: Any) -> Any:
        chosen = ChosenModel(load_model(model), model)
        dtype = default_dtype(profile) if dtype == "auto" else dtype
        return command(*args, model=chosen, dtype=dtype, profile=profile, **others)

    return wrapper
