"""`hrm plot`: pictures of a machine and of a plan."""

from dataclasses import replace
from pathlib import Path

import click

from hrm.cli.options import default_dtype, machine_options, plan_options
from hrm.cli.simulate import simulate_plan
from hrm.errors import TraceError
from hrm.hardware import HardwareProfile
from hrm.model_spec import load_model
from hrm.policy_file import PolicyFile
from hrm.tasks import Phase
from hrm.trace import Trace, read_chrome_trace
from hrm.units import DTYPE_BYTES

_out = click.option(
    "--out", "-o", type=click.Path(path_type=Path, dir_okay=False), required=True,
    help="PNG, SVG or PDF, by its ending.",
)  # fmt: skip


@click.group()
def plot() -> None:
    """Draw the machine's roofline or a policy's timeline as a picture."""


@plot.command()
@machine_options
@click.option("--model", metavar="NAME-or-PATH", help="Mark this model's attention and FFN.")
@click.option("--dtype", type=click.Choice(["auto", *DTYPE_BYTES]), default="auto")
@click.option("--context", type=click.IntRange(1), default=512, show_default=True)
@click.option("--micro-batch-size", type=click.IntRange(1), default=128, show_default=True)
@_out
def roofline(
    profile: HardwareProfile, model: str | None, dtype: str, context: int, micro_batch_size: int,
    out: Path,
) -> None:  # fmt: skip
    """Roofs of every level and of the link, turning points of attention and FFN."""
    from hrm.plots.roofline import plot_roofline

    plot_roofline(
        profile,
        out,
        spec=load_model(model) if model else None,
        dtype=default_dtype(profile) if dtype == "auto" else dtype,
        context=context,
        micro_batch_size=micro_batch_size,
    )
    click.echo(f"written to {out}")


@plot.command()
@plan_options
@click.option("--run", type=click.Path(path_type=Path, file_okay=False),
              help="Draw this run's measured decode steps above the predicted ones.")  # fmt: skip
@click.option("--steps", type=click.IntRange(1, 64), default=2, show_default=True)
@click.option("--layers", type=click.IntRange(1), help="Draw only up to this layer [default: all].")
@_out
def timeline(plan: PolicyFile, run: Path | None, steps: int, layers: int | None, out: Path) -> None:
    """Lanes over time: predicted, and measured where there is a run."""
    from hrm.plots.timeline import plot_timeline

    traces = {"predicted": simulate_plan(plan, Phase.DECODE, num_steps=steps)}
    if run is not None:
        traces = {"measured": measured_steps(run, steps), **traces}
    if layers is not None:
        traces = {name: trace.up_to_layer(layers) for name, trace in traces.items()}
    plot_timeline(
        traces,
        out,
        title=f"{plan.model.name} on {plan.profile.name}, {plan.policy.schedule.value}",
    )
    click.echo(f"written to {out}")


def measured_steps(run: Path, num_steps: int) -> Trace:
    """Decode steps of a run's first batch, after the first step; TraceError if there are none."""
    trace = read_chrome_trace(run / "trace.json").of_phase(Phase.DECODE)
    first = trace.of_batch(0)
    last_step = max((span.id.step for span in first.spans), default=0)
    begin = min(1, last_step)
    spans = tuple(
        replace(span, id=replace(span.id, step=span.id.step - begin))
        for span in first.spans
        if begin <= span.id.step < begin + num_steps
    )
    if not spans:
        raise TraceError(
            str(run), "<no decode steps>", "must hold a run that decoded", "run the job again"
        )
    return Trace(spans)
