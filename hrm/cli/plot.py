"""`hrm plot`: pictures of a machine, of a plan, of a run, and of plans over a swept number."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from hrm.cli.options import (
    default_dtype,
    machine_options,
    plan_sources,
    resolve_plan,
)  # fmt: skip
from hrm.cli.simulate import simulate_plan
from hrm.costs import Costs
from hrm.errors import PolicyError, TraceError
from hrm.estimate import decode_work, simulate_work, with_batch_size
from hrm.hardware import HardwareProfile
from hrm.memory import plan_memory
from hrm.model_spec import load_model
from hrm.policy import Policy, ScheduleName
from hrm.policy_file import PolicyFile
from hrm.schedules import SCHEDULES
from hrm.search.space import spread
from hrm.tasks import Phase
from hrm.trace import Trace, read_chrome_trace
from hrm.units import DTYPE_BYTES, counted
from hrm.validate import RunRecord, paced, read_run

_out = click.option(
    "--out", "-o", type=click.Path(path_type=Path, dir_okay=False), required=True,
    help="PNG, SVG or PDF, by its ending.",
)  # fmt: skip


@click.group()
def plot() -> None:
    """Draw a machine's roofline, what the lanes do under a policy, or a sweep, as a picture."""


@plot.command()
@machine_options
@click.option("--model", metavar="NAME-or-PATH", help="Mark this model's attention and FFN.")
@click.option("--dtype", "dtypes", type=click.Choice(["auto", *DTYPE_BYTES]), multiple=True,
              default=["auto"], show_default=True, help="Repeat it for several.")  # fmt: skip
@click.option("--context", "contexts", type=click.IntRange(1), multiple=True, default=[512],
              show_default=True, help="Tokens of KV cache a request; repeat it.")  # fmt: skip
@click.option("--batch-size", "batch_sizes", type=click.IntRange(1), multiple=True,
              default=[32, 128, 512, 2048, 8192], show_default=True,
              help="Requests whose FFN is marked; repeat it for several.")  # fmt: skip
@click.option("--micro-batch-size", type=click.IntRange(1), default=128, show_default=True)
@_out
def roofline(
    profile: HardwareProfile, model: str | None, dtypes: tuple[str, ...],
    contexts: tuple[int, ...], batch_sizes: tuple[int, ...], micro_batch_size: int, out: Path,
) -> None:  # fmt: skip
    """Roofs of every level and of the links; with a model, its attention and FFN under them."""
    from hrm.plots.roofline import plot_roofline

    plot_roofline(
        profile,
        out,
        spec=load_model(model) if model else None,
        dtypes=[default_dtype(profile) if dtype == "auto" else dtype for dtype in dtypes],
        contexts=contexts,
        batch_sizes=batch_sizes,
        micro_batch_size=micro_batch_size,
    )
    click.echo(f"written to {out}")


@plot.command()
@click.option(
    "--schedule", "schedules", type=click.Choice([name.value for name in ScheduleName]),
    multiple=True,
    help="Run the policy in this order [default: the policy's, or cgopipe]; repeat it to compare.",
)  # fmt: skip
@plan_sources
@click.option("--run", type=click.Path(path_type=Path, file_okay=False),
              help="Draw this run's first batch above what was predicted for it.")  # fmt: skip
@click.option(
    "--phase", type=click.Choice(["decode", "prefill"]), default="decode", show_default=True
)
@click.option("--steps", type=click.IntRange(1, 64), default=2, show_default=True,
              help="Decode steps.")  # fmt: skip
@click.option("--from-layer", type=click.IntRange(0), default=0, show_default=True,
              help="Begin where the layer before this one is done.")  # fmt: skip
@click.option("--layers", type=click.IntRange(1),
              help="Draw this many layers of the first step [default: all steps].")  # fmt: skip
@_out
def timeline(
    schedules: tuple[str, ...], run: Path | None, phase: str, steps: int, from_layer: int,
    layers: int | None, out: Path, policy: Path | None, model: str | None, **sources: Any,
) -> None:  # fmt: skip
    """Lanes over time as predicted, for one schedule or several, and as a run measured them."""
    from hrm.plots import style
    from hrm.plots.timeline import plot_timeline, window

    style.check_path(out)
    if run is not None:
        if policy or model or schedules or any(value is not None for value in sources.values()):
            raise PolicyError(
                "--run", str(run), "holds its own policy, machine and workload",
                "leave the other options out, or draw them without --run",
            )  # fmt: skip
        title, traces = _of_run(run, Phase(phase), steps)
    else:
        first = schedules[0] if schedules else None
        plan = resolve_plan(policy=policy, model=model, schedule=first, **sources)
        title, traces = _of_schedules(plan, schedules, Phase(phase), steps, searched=policy is None)
    if layers is not None or from_layer:
        last = None if layers is None else from_layer + layers - 1
        traces = {name: window(t, first=from_layer, last=last) for name, t in traces.items()}
    plot_timeline(traces, out, title=title)
    click.echo(f"written to {out}")


def _of_schedules(
    plan: PolicyFile, schedules: tuple[str, ...], phase: Phase, steps: int, *, searched: bool
) -> tuple[str, dict[str, Trace]]:
    """The same policy in the order of every schedule, with attention where the schedule has it."""
    names = [ScheduleName(name) for name in schedules] or [plan.policy.schedule]
    if searched:
        plan = replace(plan, policy=fitting_all(plan, names))
    plans = {name.value: replace(plan, policy=in_order(plan.policy, name)) for name in names}
    for other in plans.values():
        plan_memory(plan.model, other.policy, plan.profile).check_fits()
    policy = plan.policy
    of = " (catalog figures)" if plan.profile.accelerator == "catalog" else ""
    parts = counted(policy.num_micro_batches, "micro-batch")
    title = f"{plan.model.name} on {plan.profile.name}{of}: {parts} of {policy.micro_batch_size}"
    traces = {
        f"{name}, attention on the {other.policy.attention.value.upper()}, predicted":
            simulate_plan(other, phase, num_steps=steps)
        for name, other in plans.items()
    }  # fmt: skip
    return title, traces


def in_order(policy: Policy, schedule: ScheduleName) -> Policy:
    """The policy in another schedule's order, with attention on the device that it is known for."""
    attention = SCHEDULES[schedule].attention
    changed = replace(policy, schedule=schedule)
    return changed if attention is None else replace(changed, attention=attention)


def fitting_all(plan: PolicyFile, schedules: list[ScheduleName]) -> Policy:
    """The plan's policy with as many of its resident experts as leave room for every schedule.

    Attention on the GPU needs buffers there. If not even none of the experts leaves enough, the
    policy is the plan's with none.
    """

    def fits(policy: Policy) -> bool:
        plans = (
            plan_memory(plan.model, in_order(policy, name), plan.profile) for name in schedules
        )
        return all(
            level.planned_bytes <= level.capacity_bytes for p in plans for level in (p.gpu, p.cpu)
        )

    layers = plan.model.num_layers
    for total in range(sum(plan.policy.resident_experts), 0, -1):
        fewer = replace(plan.policy, resident_experts=spread(total, layers))
        if fits(fewer):
            return fewer
    return replace(plan.policy, resident_experts=(0,) * layers)


def _of_run(folder: Path, phase: Phase, steps: int) -> tuple[str, dict[str, Trace]]:
    """What a run's first batch did, and what is predicted for a batch of its size and lengths."""
    run = read_run(folder)
    plan = replace(
        run.policy_file,
        profile=paced(run.policy_file.profile, run.accelerator),
        policy=replace(
            with_batch_size(
                run.policy_file.policy,
                min(run.batches[0].requests, run.policy_file.policy.batch_size),
            ),
            schedule=ScheduleName(run.schedule),
        ),
        workload=replace(run.policy_file.workload, prompt_len=run.workload.prompt_len),
    )
    measured = read_chrome_trace(folder / "trace.json").of_phase(phase).of_batch(0)
    if phase is Phase.DECODE:
        first, measured = measured_steps(folder, measured, steps)
        context = run.workload.prompt_len + first + 1 + steps / 2
        costs = Costs(plan.model, plan.profile, plan.policy.dtype)
        # A step before them loads their first weights, as in the run.
        predicted = simulate_work(decode_work(costs, plan.policy, context, num_steps=steps + 1))
        _, predicted = measured_steps(folder, predicted, steps)
    else:
        predicted = simulate_plan(plan, phase, num_steps=steps)
    if not measured.spans:
        raise _nothing(folder, phase)
    title = f"{plan.model.name}, {run.schedule}, {run.accelerator.description}"
    return title, {f"measured, {_kind(run)}": measured, "predicted": predicted}


def _kind(run: RunRecord) -> str:
    emulated = run.policy_file.profile.accelerator == "emulated"
    return "emulated accelerator" if emulated else run.accelerator.name


def measured_steps(run: Path, trace: Trace, num_steps: int) -> tuple[int, Trace]:
    """Steps of a trace after its first one, counted from 0, and which the first of them was.

    Raises TraceError if there are none.
    """
    begin = min(1, max((span.id.step for span in trace.spans), default=0))
    spans = tuple(
        replace(span, id=replace(span.id, step=span.id.step - begin))
        for span in trace.spans
        if begin <= span.id.step < begin + num_steps
    )
    if not spans:
        raise _nothing(run, Phase.DECODE)
    return begin, Trace(spans)


def _nothing(run: Path, phase: Phase) -> TraceError:
    return TraceError(
        str(run), f"<no {phase.value} steps>", "must hold a run that did this phase",
        "run the job again",
    )  # fmt: skip
