"""`hrm plot`: pictures of a machine, of a plan, of a run, and of plans over a swept number."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hrm.analysis.axis import SWEPT, Axis, Length, Swept, Whole
from hrm.analysis.sweep import sweep as search_all
from hrm.cli.console import console, plain_table
from hrm.cli.machine_choice import machine_options
from hrm.cli.options import ChosenModel, PlanSource, model_options, plan_source_options, workload_options
from hrm.cli.params import OUT_FILE, enum_option, phase_option
from hrm.cli.program import CommandGroup
from hrm.cli.simulate import steps_option
from hrm.cli.tables import csv_option, searching, tell_written, write_csv
from hrm.cli.texts import machine_text
from hrm.errors import HrmError, PolicyError, meant
from hrm.formats import FORMATS
from hrm.hardware import HardwareProfile
from hrm.model_spec import load_model
from hrm.policy import ScheduleName
from hrm.scaling import Resource
from hrm.tasks import Phase
from hrm.units import format_number
from hrm.workload import Workload

if TYPE_CHECKING:
    import pandas as pd

_out = click.option("--out", "-o", type=OUT_FILE, required=True, help="PNG, SVG or PDF, by its ending.")


@click.group(cls=CommandGroup)
def plot() -> None:
    """Draw a machine's roofline, what the lanes do under a policy, or a sweep, as a picture."""


@plot.command()
@machine_options
@click.option("--model", metavar="NAME-or-PATH", help="Mark this model's attention and FFN.")
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice(["auto", *FORMATS]),
    multiple=True,
    default=["auto"],
    show_default=True,
    help="Repeat it for several.",
)
@click.option(
    "--context",
    "contexts",
    type=click.IntRange(1),
    multiple=True,
    default=[512],
    show_default=True,
    help="Tokens of KV cache a request; repeat it.",
)
@click.option(
    "--batch-size",
    "batch_sizes",
    type=click.IntRange(1),
    multiple=True,
    default=[32, 128, 512, 2048, 8192],
    show_default=True,
    help="Requests whose FFN is marked; repeat it for several.",
)
@click.option("--micro-batch-size", type=click.IntRange(1), default=128, show_default=True)
@_out
def roofline(
    profile: HardwareProfile,
    model: str | None,
    dtypes: tuple[str, ...],
    contexts: tuple[int, ...],
    batch_sizes: tuple[int, ...],
    micro_batch_size: int,
    out: Path,
) -> None:
    """Roofs of every level and link.

    With a model, its attention and FFN are marked under them.
    """
    from hrm.plots.roofline import plot_roofline

    plot_roofline(
        profile,
        out,
        spec=load_model(model) if model else None,
        dtypes=[profile.default_dtype if dtype == "auto" else dtype for dtype in dtypes],
        contexts=contexts,
        batch_sizes=batch_sizes,
        micro_batch_size=micro_batch_size,
    )
    tell_written(out)


@plot.command()
@enum_option(
    "--schedule",
    "schedules",
    kind=ScheduleName,
    multiple=True,
    help="Run the policy in this order [default: the policy's, or cgopipe]; repeat it to compare.",
)
@plan_source_options
@click.option(
    "--run",
    type=click.Path(path_type=Path, file_okay=False),
    help="Draw this run's first batch above what was predicted for it.",
)
@phase_option
@steps_option
@click.option(
    "--from-layer",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Begin where the layer before this one is done.",
)
@click.option("--layers", type=click.IntRange(1), help="Draw this many layers of the first step [default: all steps].")
@_out
def timeline(
    source: PlanSource,
    schedules: tuple[ScheduleName, ...],
    run: Path | None,
    phase: Phase,
    steps: int | None,
    from_layer: int,
    layers: int | None,
    out: Path,
) -> None:
    """Lanes over time, predicted or measured.

    As predicted for one schedule or several, or as a run measured them above what was predicted for it.
    """
    from hrm.cli.timelines import of_run, of_schedules
    from hrm.plots import style
    from hrm.plots.timeline import plot_timeline, window

    style.check_path(out)
    if run is not None:
        if schedules or source.is_given:
            raise PolicyError(
                "--run",
                str(run),
                "holds its own policy, machine and workload",
                "leave the other options out, or draw them without --run",
            )
        title, traces = of_run(run, phase, steps)
    else:
        plan = source.plan(schedules[0] if schedules else None)
        title, traces = of_schedules(plan, schedules, phase, steps, searched=source.policy is None)
    if layers is not None or from_layer:
        last = None if layers is None else from_layer + layers - 1
        traces = {name: window(t, first=from_layer, last=last) for name, t in traces.items()}
    plot_timeline(traces, out, title=title)
    tell_written(out)


@plot.command()
@machine_options
@model_options
@workload_options
@click.option(
    "--vary",
    required=True,
    metavar="WHAT",
    help=f"What is swept: a resource ({', '.join(Resource)}), {' or '.join(Whole)} times factors, "
    f"{' or '.join(Length)}.",
)
@click.option("--from", "low", required=True, metavar="64GB", help="Where the sweep begins.")
@click.option("--to", "high", required=True, metavar="512GB", help="Where it ends.")
@click.option("--points", type=click.IntRange(2, 1000), default=12, show_default=True, help="How many, both included.")
@click.option("--log", is_flag=True, help="Space the points evenly in the logarithm.")
@enum_option(
    "--schedule",
    "schedules",
    kind=ScheduleName,
    multiple=True,
    default=["cgopipe"],
    show_default=True,
    help="Repeat it to compare.",
)
@csv_option
@_out
def sweep(
    profile: HardwareProfile,
    model: ChosenModel,
    workload: Workload,
    vary: str,
    low: str,
    high: str,
    points: int,
    log: bool,
    schedules: tuple[ScheduleName, ...],
    csv: Path | None,
    out: Path,
) -> None:
    """Throughput of the best policy in a sweep.

    What is swept is a resource of the machine or a length of the workload.
    """
    from hrm.plots import style
    from hrm.plots.sweep import plot_sweep

    style.check_path(out)
    what = _swept(vary)
    axis = Axis.between(what, what.read(low, "--from"), what.read(high, "--to"), points, logarithmic=log)
    names = list(dict.fromkeys(schedules))
    space = model.space(profile, workload)
    here = axis.now(space)
    with searching(len(axis.points) * len(names)) as on_point:
        frame = search_all(space, axis, schedules=names, on_point=on_point)
    write_csv(frame, csv)
    plot_sweep(
        frame,
        out,
        x=axis.column,
        here=here if axis.points[0] <= here <= axis.points[-1] else None,
        title=f"{model.about(profile)}, on {machine_text(profile)}, {workload.name}",
    )
    _print_sweep(frame, what)
    tell_written(csv, out)


def _swept(name: str) -> Swept:
    """What is swept by that name; HrmError listing the names if there is none."""
    if name not in SWEPT:
        raise HrmError("--vary", name, f"must be one of {', '.join(SWEPT)}", meant(name, SWEPT, "choose one of them"))
    return SWEPT[name]


def _print_sweep(frame: "pd.DataFrame", what: Swept) -> None:
    table = plain_table(
        "schedule", what.value, "tokens/s", "bound", "N", "μ", "attention", "FFN", "r_w", "r_c", "bottleneck"
    )
    for row in frame.to_dict("records"):
        value = what.show(float(row[what.column]))
        if row["reason"]:
            table.add_row(row["schedule"], value, *["–"] * 8, "no policy fits")
            continue
        table.add_row(
            row["schedule"],
            value,
            format_number(row["tokens_per_s"]),
            format_number(row["bound_tokens_per_s"]),
            str(row["batch_size"]),
            str(row["micro_batch_size"]),
            row["attention"],
            row["ffn"],
            f"{row['weight_share_on_gpu']:.3f}",
            f"{row['kv_share_on_gpu']:.3f}",
            row["bottleneck"],
        )
    console.print(table)
