"""Which machine a command is about, as the options say it."""

from dataclasses import dataclass
from functools import wraps
from typing import Any, Final

import click

from hrm.cli.params import Command, once_option, together
from hrm.errors import ProfileError, meant
from hrm.hardware import HardwareProfile
from hrm.machines import compose, load_host, load_profile, parse_gpus, without_gpus
from hrm.scaling import Resource, with_resource

MOST_MACHINES: Final = 100  # to compare in one command: each takes a search


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
        return any(name is not None for name in (self.profile, self.gpus, self.host))

    def machines(self) -> list[HardwareProfile]:
        """The machines that --gpus lists, or the one of --profile, with the changes made to each.

        Hosts that are named without GPUs are machines as well. Raises ProfileError if the options
        name none, or both kinds.
        """
        if (self.profile is None) == (self.gpus is None) and (self.profile or self.host is None):
            if self.profile is not None and self.gpus is not None:
                raise ProfileError("--gpus", self.gpus, "does not go with --profile", "leave one of them out")
            raise ProfileError(
                "--gpus or --profile",
                "<missing>",
                "one must name the machine",
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
        """The machine of --gpus with another number of GPUs; None if its host does not take them.

        Raises ProfileError if it is not composed of GPUs and a host.
        """
        machine = self.machine()
        if self.gpus is None or machine.unified_memory:
            raise ProfileError(
                "--pareto", "gpus", f"needs GPUs to count, and {machine.name} is a whole machine", "name GPUs by --gpus"
            )
        if len(kinds := parse_gpus(self.gpus)) > 1:
            raise ProfileError("--gpus", self.gpus, "must be GPUs of one kind with --pareto gpus", "name one kind")
        try:
            return compose(f"{count}x{kinds[0][1]}", self.host)
        except ProfileError:
            return None

    def changed(self, machine: HardwareProfile) -> HardwareProfile:
        """The machine with the memory and the resources that were given."""
        for resource, (flag, amount) in self._given().items():
            value, given = resource.read(amount, flag), f"{flag}={amount}"
            try:
                machine = with_resource(machine, resource, value, dtype=machine.default_dtype, given=given)
            except ProfileError as error:  # of the resource, which does not know how it was given
                raise ProfileError(flag, amount, error.rule, error.remedy) from error
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
    usual = "write it like h2d-bandwidth=24GB/s"
    if not equals or name not in Resource.__members__.values():
        raise ProfileError(
            "--set",
            change,
            f"must be RESOURCE=VALUE with one of {', '.join(Resource)}",
            meant(name, Resource, usual) if equals else usual,
        )
    return Resource(name), text


machines_options = together(
    "choice",
    MachineChoice,
    once_option("--profile", metavar="FILE-or-NAME", help="A measured machine (hrm profile --out)."),
    once_option(
        "--gpus",
        metavar="4xT4",
        help="GPUs by count and name (hrm profiles), or by count and a YAML file: 2x./mine.yaml; "
        "1xRTX-4090+1xRTX-3090 is one machine with both.",
    ),
    once_option(
        "--host",
        metavar="NAME-or-FILE",
        help="The host of --gpus [default: the first GPU's usual one]; alone, a machine without GPUs.",
    ),
    once_option("--gpu-memory", metavar="16GB", help="Plan with this much GPU memory in all."),
    once_option("--cpu-memory", metavar="192GB", help="Plan with this much host memory."),
    click.option(
        "--set",
        "changes",
        multiple=True,
        metavar="RESOURCE=VALUE",
        help="Plan with this much of a resource, such as h2d-bandwidth=24GB/s; repeat it for more.",
    ),
)


def machine_options(command: Command) -> Command:
    """Give a command `profile: HardwareProfile`, the only machine that the options name."""

    @machines_options
    @wraps(command)
    def wrapper(*args: Any, choice: MachineChoice, **options: Any) -> Any:
        return command(*args, profile=choice.machine(), **options)

    return wrapper
