"""Options that many commands share: which workload, which model, which plan."""

import math
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from hrm.cli.machine_choice import MachineChoice, machines_options
from hrm.cli.params import Command, enum_option, policy_option, together
from hrm.cli.texts import formats_text
from hrm.errors import PolicyError, ProfileError, WorkloadError, meant
from hrm.formats import FORMATS, SCALED_KV_FORMATS, USUAL_PACKED, Formats, packed_format
from hrm.hardware import HardwareProfile
from hrm.latency import LatencyLimits
from hrm.memory import plan_memory
from hrm.model_spec import ModelSpec, load_model, packed_as
from hrm.policy import ScheduleName
from hrm.policy_file import PolicyFile, load_policy_file, policy_file_of
from hrm.routing import with_measured_routing
from hrm.units import parse_seconds
from hrm.workload import Workload, named_workload

if TYPE_CHECKING:
    from hrm.search import Space


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadChoice:
    """What the options say of the workload: a name, lengths, or both."""

    workload: str | None = None
    prompt_len: float | None = None
    max_prompt_len: int | None = None
    gen_len: int | None = None
    mean_gen_len: float | None = None
    num_requests: int | None = None

    def resolve(self) -> Workload:
        """The workload that is meant; lengths that are given override the named workload's."""
        lengths = (self.prompt_len, self.max_prompt_len, self.gen_len)
        if self.workload is None and any(value is not None for value in lengths):
            return self._given()
        base = named_workload("mtbench" if self.workload is None else self.workload)
        mean = base.prompt_len if self.prompt_len is None else self.prompt_len
        longest = base.max_prompt_len if self.prompt_len is None else _longest(mean)
        named = any(value is not None for value in (*lengths, self.mean_gen_len))
        return replace(
            base,
            name=f"{base.name} with other lengths" if named else base.name,
            prompt_len=mean,
            max_prompt_len=longest if self.max_prompt_len is None else self.max_prompt_len,
            gen_len=base.gen_len if self.gen_len is None else self.gen_len,
            mean_gen_len=self.mean_gen_len,
            num_requests=self.num_requests,
        )

    def _given(self) -> Workload:
        """A workload without a name."""
        if self.prompt_len is None or self.gen_len is None:
            missing = "--prompt-len" if self.prompt_len is None else "--gen-len"
            remedy = "give it, too, or name a workload with --workload"
            raise WorkloadError(missing, "<missing>", "must be given with other lengths", remedy)
        return Workload(
            name="given",
            prompt_len=self.prompt_len,
            max_prompt_len=_longest(self.prompt_len) if self.max_prompt_len is None else self.max_prompt_len,
            gen_len=self.gen_len,
            mean_gen_len=self.mean_gen_len,
            num_requests=self.num_requests,
        )


def _longest(prompt_len: float) -> int:
    """The longest prompt if nothing is said of it: the mean, rounded up."""
    if not math.isfinite(prompt_len):
        raise WorkloadError("--prompt-len", prompt_len, "must be finite", "give a number of tokens")
    return math.ceil(prompt_len)


_workload_choice = together(
    "asked",
    WorkloadChoice,
    click.option("--workload", metavar="NAME", help="mtbench, synthetic-reasoning or summarization."),
    click.option("--prompt-len", type=float, help="Mean prompt length in tokens."),
    click.option("--max-prompt-len", type=int, help="Longest prompt [default: the mean]."),
    click.option("--gen-len", type=int, help="Tokens generated a request, at most."),
    click.option("--mean-gen-len", type=float, help="Tokens generated on average [default: --gen-len]."),
    click.option("--requests", "num_requests", type=int, help="Number of requests [default: without end]."),
)


def workload_options(command: Command) -> Command:
    """Give a command `workload: Workload` from a name, from lengths, or from both."""

    @_workload_choice
    @wraps(command)
    def wrapper(*args: Any, asked: WorkloadChoice, **options: Any) -> Any:
        return command(*args, workload=asked.resolve(), **options)

    return wrapper


def _limits(*, max_ttft: str | None, max_tpot: str | None) -> LatencyLimits:
    return LatencyLimits(
        max_ttft_s=None if max_ttft is None else parse_seconds(max_ttft, "--max-ttft"),
        max_tpot_s=None if max_tpot is None else parse_seconds(max_tpot, "--max-tpot"),
    )


limits_options = together(
    "limits",
    _limits,
    click.option("--max-ttft", metavar="30s", help="Every first token within so long of the start of its batch."),
    click.option("--max-tpot", metavar="200ms", help="Every other token within so long, on average."),
)


AUTO: Final = "auto"


@dataclass(frozen=True, slots=True)
class ChosenModel:
    """A model in the formats that are asked for, and as it is stored.

    A dtype of None is that of the machine, and an empty format the dtype. Which matrices are packed,
    the model says.
    """

    spec: ModelSpec
    stored: ModelSpec
    argument: str
    dtype: str | None
    weight_format: str
    kv_format: str

    def about(self, machine: HardwareProfile) -> str:
        """Its name and formats on a machine, as the titles of tables and plots have them."""
        return f"{self.spec.name}, {formats_text(self.spec, self.formats_on(machine))}"

    def dtype_on(self, machine: HardwareProfile) -> str:
        """What it is computed in on a machine; ProfileError for bfloat16 on a GPU that has float16 in its place."""
        if self.dtype == "bfloat16" and machine.has_accelerator and machine.default_dtype != self.dtype:
            rule = f"must be one that {machine.top.processor.name} computes in"
            raise ProfileError("--dtype", self.dtype, rule, f"leave it out, or give --dtype {machine.default_dtype}")
        return machine.default_dtype if self.dtype is None else self.dtype

    def formats_on(self, machine: HardwareProfile) -> Formats:
        """What is computed in on a machine, and what is not packed is stored in."""
        return Formats.named(self.dtype_on(machine), weights=self.weight_format, kv_cache=self.kv_format)

    def space(self, machine: HardwareProfile, workload: Workload, **asked: Any) -> "Space":
        """The policies for it on a machine."""
        from hrm.search import Space

        return Space(
            self.spec,
            machine,
            workload,
            dtype=self.dtype_on(machine),
            weight_format=self.weight_format,
            kv_format=self.kv_format,
            **asked,
        )


def _chosen_model(*, model: str, dtype: str, weight_format: str, kv_format: str, routing: Path | None) -> ChosenModel:
    stored = load_model(model)
    spec, plain = _in_format(stored, weight_format)
    return ChosenModel(
        spec if routing is None else with_measured_routing(spec, routing),
        stored,
        model,
        None if dtype == AUTO else dtype,
        plain,
        "" if kv_format == AUTO else kv_format,
    )


def _in_format(spec: ModelSpec, name: str) -> tuple[ModelSpec, str]:
    """The model with its experts in a format, or plain, and the format of all else, which is empty for the dtype."""
    if name == AUTO:
        return spec, ""
    if name in FORMATS:
        return spec.without_packing, name
    form = packed_format(name)
    if form is None:
        known = f"{AUTO}, {', '.join(FORMATS)}, or a packed format like {', '.join(USUAL_PACKED)}"
        raise PolicyError(
            "--weight-format", name, f"must be {known}", meant(name, (*FORMATS, *USUAL_PACKED), "choose one of them")
        )
    return packed_as(spec, form), ""


model_options = together(
    "model",
    _chosen_model,
    click.option(
        "--model",
        required=True,
        metavar="NAME-or-PATH",
        help="A built-in name (hrm models), a checkpoint folder, a config.json, or org/name[@revision] on the Hub.",
    ),
    click.option(
        "--dtype",
        type=click.Choice([AUTO, *FORMATS]),
        default=AUTO,
        show_default=True,
        help="Of compute, KV cache and weights that are not packed; auto is bfloat16, or float16 where it is missing.",
    ),
    click.option(
        "--weight-format",
        metavar="NAME",
        default=AUTO,
        show_default=True,
        help=f"auto is as the model is stored; {', '.join(USUAL_PACKED)} pack the routed experts, all else is in "
        "the dtype; a dtype's name packs nothing.",
    ),
    click.option(
        "--kv-format",
        type=click.Choice([AUTO, *SCALED_KV_FORMATS]),
        default=AUTO,
        show_default=True,
        help="Keep keys and values in a byte each, with a scale for each token's head; auto is the dtype.",
    ),
    click.option(
        "--routing",
        type=click.Path(path_type=Path),
        metavar="RUN",
        help="Route tokens to experts as this run did [default: uniformly].",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSource:
    """Where the options say that a plan is from: a policy file, or a search for a model."""

    policy: Path | None
    model: str | None
    choice: MachineChoice
    asked: WorkloadChoice

    @property
    def is_given(self) -> bool:
        """Whether the options say anything."""
        named = self.policy is not None or self.model is not None
        return named or self.choice != MachineChoice() or self.asked != WorkloadChoice()

    def plan(self, schedule: ScheduleName | None) -> PolicyFile:
        """The plan, in the order of a schedule if one is given.

        Raises PolicyError if the options name neither a policy nor a model, or both.
        """
        if self.policy is not None:
            return self._from_file(self.policy, schedule)
        if self.model is None:
            raise PolicyError(
                "--policy or --model",
                "<missing>",
                "one must say what is run",
                "give --policy FILE, or --model NAME with --gpus or --profile",
            )
        from hrm.search import Space, search

        machine = self.choice.machine()
        spec, workload = load_model(self.model), self.asked.resolve()
        order = ScheduleName.CGOPIPE if schedule is None else schedule
        space = Space(spec, machine, workload, dtype=machine.default_dtype, schedule=order)
        return policy_file_of(search(space).require(), spec, machine, workload)

    def _from_file(self, path: Path, schedule: ScheduleName | None) -> PolicyFile:
        """The plan of a file; machine and workload options replace what it was solved for."""
        if self.model is not None:
            raise PolicyError(
                "--model", self.model, "does not go with --policy, whose file holds its model", "leave one of them out"
            )
        plan = load_policy_file(path)
        machine = self.choice.machine() if self.choice.is_named else self.choice.changed(plan.profile)
        if machine is not plan.profile:
            plan_memory(plan.model, plan.policy, machine).check_fits()
            plan = replace(plan, profile=machine)
        if self.asked != WorkloadChoice():
            plan = replace(plan, workload=self.asked.resolve())
        if schedule is not None:
            plan = replace(plan, policy=replace(plan.policy, schedule=schedule))
        return plan


plan_source_options = together(
    "source",
    PlanSource,
    policy_option,
    click.option("--model", metavar="NAME-or-PATH", help="The model to search a policy for."),
    machines_options,
    _workload_choice,
)


def plan_options(command: Command) -> Command:
    """Give a command `plan: PolicyFile`: read from --policy, or searched for."""

    @enum_option(
        "--schedule", kind=ScheduleName, help="Run the policy in this order [default: the policy's, or cgopipe]."
    )
    @plan_source_options
    @wraps(command)
    def wrapper(*args: Any, source: PlanSource, schedule: ScheduleName | None, **options: Any) -> Any:
        return command(*args, plan=source.plan(schedule), **options)

    return wrapper
