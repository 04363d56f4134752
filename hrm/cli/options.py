"""Options that many commands share: which machine, which model, which workload."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any, Final

import click

from hrm.errors import PolicyError, ProfileError, WorkloadError
from hrm.hardware import HardwareProfile
from hrm.machines import compose, load_host, load_profile, parse_gpus, without_gpus
from hrm.memory import plan_memory
from hrm.model_spec import ModelSpec, load_model
from hrm.policy import ScheduleName
from hrm.policy_file import PolicyFile, load_policy_file, policy_file_of
from hrm.routing import with_measured_routing
from hrm.scaling import Resource, with_resource
from hrm.sweep import parse_swept
from hrm.units import DTYPE_BYTES
from hrm.workload import Workload, named_workload

Command = Callable[..., Any]


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _once(_: click.Context, option: click.Parameter, given: tuple[str, ...]) -> str | None:
    """The one value of an option; ProfileError for two, of which click would take the last."""
    if len(given) > 1:
        raise ProfileError(
            option.opts[0], f"<{' and '.join(given)}>", "may be given once only", "leave one of them out"
        )
    return given[0] if given else None


_only = partial(click.option, multiple=True, callback=_once)
_machine = _options(
    _only("--profile", metavar="FILE-or-NAME", help="A measured machine (hrm profile --out)."),
    _only(
        "--gpus",
        metavar="4xT4",
        help="GPUs by count and name (hrm profiles), or by count and a YAML file: 2x./mine.yaml.",
    ),
    _only(
        "--host",
        metavar="NAME-or-FILE",
        help="The host of --gpus [default: the GPU's usual one]; alone, a machine without GPUs.",
    ),
    _only("--gpu-memory", metavar="16GB", help="Plan with this much GPU memory in all."),
    _only("--cpu-memory", metavar="192GB", help="Plan with this much host memory."),
    click.option(
        "--set",
        "changes",
        multiple=True,
        metavar="RESOURCE=VALUE",
        help="Plan with this much of a resource, such as h2d-bandwidth=24GB/s; repeat it for more.",
    ),
)
_workload = _options(
    click.option("--workload", metavar="NAME", help="mtbench, synthetic-reasoning or summarization."),
    click.option("--prompt-len", type=float, help="Mean prompt length in tokens."),
    click.option("--max-prompt-len", type=int, help="Longest prompt [default: the mean]."),
    click.option("--gen-len", type=int, help="Tokens generated a request, at most."),
    click.option("--mean-gen-len", type=float, help="Tokens generated on average [default: --gen-len]."),
    click.option("--requests", type=int, help="Number of requests [default: without end]."),
)


MOST_MACHINES: Final = 100  # that are compared: each takes a search
_MACHINE: Final = ("profile", "gpus", "host", "gpu_memory", "cpu_memory", "changes")


def _few(flag: str, names: str) -> list[str]:
    """The names that commas separate; ProfileError if they are too many to compare."""
    found = names.split(",")
    if len(found) > MOST_MACHINES:
        raise ProfileError(
            flag, f"<{len(found):,} machines>", f"must be at most {MOST_MACHINES}", "compare fewer at a time"
        )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineChoice:
    """What the options say of the machine."""

    profile: str | None = None
    gpus: str | None = None
    host: str | None = None
    gpu_memory: str | None = None
    cpu_memory: str | None = None
    changes: tuple[str, ...] = ()

    @property
    def is_named(self) -> bool:
        """Whether a machine is named, not only changed."""
        return any((self.profile, self.gpus, self.host))

    def machines(self) -> list[HardwareProfile]:
        """The machines that --gpus lists, or the one of --profile, with the changes made to each.

        Hosts that are named without GPUs are machines as well. Raises ProfileError if the options
        name none, or both kinds.
        """
        if (self.profile is None) == (self.gpus is None) and (self.profile or self.host is None):
            raise ProfileError(
                "--profile and --gpus",
                "<both>" if self.profile else "<neither>",
                "exactly one must name the machine",
                "give --gpus 1xT4, --profile with a file, or --host alone for one without GPUs",
            )
        if self.profile is not None and self.host is not None:
            raise ProfileError("--host", self.host, "goes with --gpus only", "drop it: the profile has its own host")
        if self.profile is not None:
            return [self.changed(load_profile(self.profile))]
        if self.gpus is None:
            hosts = _few("--host", self.host or "")
            return [self.changed(without_gpus(load_host(host))) for host in hosts]
        return [self.changed(compose(name, self.host)) for name in _few("--gpus", self.gpus)]

    def machine(self) -> HardwareProfile:
        """The only machine; ProfileError if --gpus lists several."""
        machines = self.machines()
        if len(machines) > 1:
            raise ProfileError(
                "--gpus" if self.gpus else "--host",
                self.gpus or self.host,
                "must be one machine here",
                "hrm search compares several",
            )
        return machines[0]

    def with_gpus(self, count: int) -> HardwareProfile | None:
        """So many of the GPUs of --gpus, unchanged; None if their host does not take them.

        Raises ProfileError if it is not composed of GPUs and a host.
        """
        machine = self.machine()
        if self.gpus is None or machine.unified_memory:
            raise ProfileError(
                "--pareto", "gpus", f"needs GPUs to count, and {machine.name} is a whole machine", "name GPUs by --gpus"
            )
        try:
            return compose(f"{count}x{parse_gpus(self.gpus)[1]}", self.host)
        except ProfileError:
            return None

    def changed(self, machine: HardwareProfile) -> HardwareProfile:
        """The machine with the memory and the resources that were given."""
        for resource, (flag, amount) in self._given().items():
            machine = with_resource(
                machine,
                resource,
                parse_swept(resource, amount, flag),
                dtype=machine.default_dtype,
                given=f"{flag}={amount}",
            )
        return machine

    def _given(self) -> dict[Resource, tuple[str, str]]:
        """What is given of every resource, and by which option; ProfileError if two give one."""
        settings = [
            (resource, flag, amount)
            for resource, flag, amount in (
                (Resource.GPU_MEMORY, "--gpu-memory", self.gpu_memory),
                (Resource.CPU_MEMORY, "--cpu-memory", self.cpu_memory),
            )
            if amount is not None
        ]
        for change in self.changes:
            resource, amount = _parse_change(change)
            settings.append((resource, f"--set {resource}", amount))
        given: dict[Resource, tuple[str, str]] = {}
        for resource, flag, amount in settings:
            if resource in given:
                raise ProfileError(
                    flag,
                    amount,
                    f"contradicts {'='.join(given[resource])}",
                    f"leave one of them out: both say how much {resource} there is",
                )
            given[resource] = flag, amount
        return given


def _parse_change(change: str) -> tuple[Resource, str]:
    """The resource and value of `h2d-bandwidth=24GB/s`; ProfileError for another form."""
    name, equals, text = change.partition("=")
    if not equals or name not in Resource.__members__.values():
        raise ProfileError(
            "--set",
            change,
            f"must be RESOURCE=VALUE with one of {', '.join(Resource)}",
            "write it like h2d-bandwidth=24GB/s",
        )
    return Resource(name), text


def machine_options(command: Command) -> Command:
    """Give a command `profile: HardwareProfile` from --profile or --gpus and the overrides."""

    @_machine
    @wraps(command)
    def wrapper(*args: Any, **options: Any) -> Any:
        choice = MachineChoice(**{name: options.pop(name) for name in _MACHINE})
        return command(*args, profile=choice.machine(), **options)

    return wrapper


def machines_options(command: Command) -> Command:
    """Give a command `choice: MachineChoice`, of several machines if --gpus lists several."""

    @_machine
    @wraps(command)
    def wrapper(*args: Any, **options: Any) -> Any:
        choice = MachineChoice(**{name: options.pop(name) for name in _MACHINE})
        return command(*args, choice=choice, **options)

    return wrapper


_WORKLOAD: Final = ("workload", "prompt_len", "max_prompt_len", "gen_len", "mean_gen_len", "requests")


def workload_options(command: Command) -> Command:
    """Give a command `workload: Workload` from a name, from lengths, or from both."""

    @_workload
    @wraps(command)
    def wrapper(*args: Any, **options: Any) -> Any:
        lengths = {name: options.pop(name) for name in _WORKLOAD}
        return command(*args, workload=resolve_workload(**lengths), **options)

    return wrapper


def resolve_workload(
    *,
    workload: str | None,
    prompt_len: float | None,
    max_prompt_len: int | None,
    gen_len: int | None,
    mean_gen_len: float | None,
    requests: int | None,
) -> Workload:
    """The workload that the options describe; lengths given override the named workload's."""
    name = workload
    lengths_given = any(value is not None for value in (prompt_len, max_prompt_len, gen_len))
    if name is None and not lengths_given:
        name = "mtbench"
    if name is None:
        if prompt_len is None or gen_len is None:
            raise WorkloadError(
                "--prompt-len and --gen-len", "<only some of them>", "both are needed", "give both, or --workload NAME"
            )
        return Workload(
            name="given",
            prompt_len=prompt_len,
            max_prompt_len=_longest(prompt_len) if max_prompt_len is None else max_prompt_len,
            gen_len=gen_len,
            mean_gen_len=mean_gen_len,
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
        mean_gen_len=mean_gen_len,
        num_requests=requests,
    )


def _longest(prompt_len: float) -> int:
    """The longest prompt if nothing is said of it: the mean, rounded up."""
    if not math.isfinite(prompt_len):
        raise WorkloadError("--prompt-len", prompt_len, "must be finite", "give a number of tokens")
    return math.ceil(prompt_len)


plan_sources = _options(
    click.option(
        "--policy",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="FILE",
        help="A policy file (hrm search --out); without one, a policy is searched for.",
    ),
    click.option("--model", metavar="NAME-or-PATH", help="The model to search a policy for."),
    _machine,
    _workload,
)


_PLAN_SOURCES: Final = ("policy", "model", "schedule", *_MACHINE, *_WORKLOAD)


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


def resolve_plan(*, policy: Path | None, model: str | None, schedule: str | None, **options: Any) -> PolicyFile:
    """The plan that the options of `plan_sources` and a schedule's name describe.

    Raises PolicyError if they name neither a policy nor a model, or both.
    """
    choice = MachineChoice(**{name: options[name] for name in _MACHINE})
    lengths = {name: options[name] for name in _WORKLOAD}
    if policy is not None:
        if model is not None:
            raise PolicyError(
                "--model", model, "does not go with --policy, whose file holds its model", "leave one of them out"
            )
        plan = load_policy_file(policy)
        machine = choice.machine() if choice.is_named else choice.changed(plan.profile)
        if machine is not plan.profile:
            plan_memory(plan.model, plan.policy, machine).check_fits()
            plan = replace(plan, profile=machine)
        if any(value is not None for value in lengths.values()):
            plan = replace(plan, workload=resolve_workload(**lengths))
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
    from hrm.search import Space, search

    machine = choice.machine()
    spec, asked = load_model(model), resolve_workload(**lengths)
    space = Space(spec, machine, asked, dtype=machine.default_dtype, schedule=ScheduleName(schedule or "cgopipe"))
    return policy_file_of(search(space).require(), spec, machine, asked)


@dataclass(frozen=True, slots=True)
class ChosenModel:
    """A model and where its weights are, if it was given as a folder."""

    spec: ModelSpec
    argument: str


_model = _options(
    click.option(
        "--model",
        required=True,
        metavar="NAME-or-PATH",
        help="A built-in name (hrm models), a checkpoint folder, or a config.json.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", *DTYPE_BYTES]),
        default="auto",
        show_default=True,
        help="Of weights, KV cache and compute; auto is bfloat16, or float16 where it is missing.",
    ),
    click.option(
        "--routing",
        type=click.Path(path_type=Path),
        metavar="RUN",
        help="Route tokens to experts as this run did [default: uniformly].",
    ),
)


def _chosen(model: str, routing: Path | None) -> ChosenModel:
    spec = load_model(model)
    return ChosenModel(spec if routing is None else with_measured_routing(spec, routing), model)


def model_options(command: Command) -> Command:
    """Give a command `model: ChosenModel` and `dtype`, one that the machine's GPU has."""

    @_model
    @wraps(command)
    def wrapper(
        *args: Any, model: str, dtype: str, routing: Path | None, profile: HardwareProfile, **others: Any
    ) -> Any:
        dtype = profile.default_dtype if dtype == "auto" else dtype
        chosen = _chosen(model, routing)
        return command(*args, model=chosen, dtype=dtype, profile=profile, **others)

    return wrapper


def model_options_of_several(command: Command) -> Command:
    """Give a command `model: ChosenModel`, and `dtype`, None where each machine has its own."""

    @_model
    @wraps(command)
    def wrapper(*args: Any, model: str, dtype: str, routing: Path | None, **others: Any) -> Any:
        chosen = _chosen(model, routing)
        return command(*args, model=chosen, dtype=None if dtype == "auto" else dtype, **others)

    return wrapper
