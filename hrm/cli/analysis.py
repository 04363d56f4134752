"""`hrm whatif` and `hrm map`: which upgrade pays, and where which kind of policy is best."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from hrm.analysis.axis import SWEPT, Axis, Length, Whole
from hrm.analysis.formats import compare_formats, formats_of
from hrm.analysis.regions import policy_map
from hrm.analysis.what_if import what_if
from hrm.causes import Cause
from hrm.cli.console import console
from hrm.cli.machine_choice import machine_options
from hrm.cli.options import ChosenModel, model_options, workload_options
from hrm.cli.params import schedule_option
from hrm.cli.tables import TableOutput, print_frame, records, searching, show_change, table_output_options
from hrm.cli.texts import given_text, machine_text
from hrm.errors import HrmError, meant
from hrm.hardware import HardwareProfile
from hrm.policy import PAPER_SYMBOLS, ScheduleName
from hrm.scaling import Resource, resource_value, resources
from hrm.units import format_bytes
from hrm.workload import Workload

if TYPE_CHECKING:
    import pandas as pd

    from hrm.search import Space

NOTHING: Final = 0.001  # a throughput that changes by less counts as unchanged
MOST_POINTS: Final = 100
MOST_PERCENT: Final = 100_000
LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _about(model: ChosenModel, profile: HardwareProfile, workload: Workload) -> str:
    given = f", {text}" if (text := given_text(profile)) else ""
    return f"{model.about(profile)}, on {machine_text(profile)}, {workload.name}{given}"


@click.command()
@machine_options
@model_options
@workload_options
@schedule_option
@click.option("--percent", type=float, help="How much more of each resource [default: 10].")
@click.option("--formats", "of_formats", is_flag=True, help="What other formats of experts and KV cache do instead.")
@table_output_options
def whatif(
    profile: HardwareProfile,
    model: ChosenModel,
    workload: Workload,
    schedule: ScheduleName,
    percent: float | None,
    of_formats: bool,
    output: TableOutput,
) -> None:
    """What some more of each resource does to the best policy: which upgrade pays.

    Latencies, and the time that tasks wait for one another, become shorter instead. With --formats the
    machine stays as it is, and the best policies with weights and KV cache in several formats are laid side by side.
    """
    space, about = model.space(profile, workload, schedule=schedule), _about(model, profile, workload)
    if of_formats:
        _show_formats(space, about, percent, output)
    else:
        _show_resources(space, about, 10.0 if percent is None else percent, output)


def _show_formats(space: "Space", about: str, percent: float | None, output: TableOutput) -> None:
    for flag, given in (("--percent", percent), ("--plot", output.plot)):
        if given is not None:
            raise HrmError(flag, str(given), "does not go with --formats, which come as a table", "leave it out")
    with searching(len(formats_of(space))) as on_point:
        frame = compare_formats(space, on_point=on_point)

    def cells(row: dict[str, Any]) -> list[str]:
        planned = (row[f"{level}_planned_bytes"] for level in ("gpu", "cpu"))
        sizes = ("–" if math.isnan(size) else format_bytes(size) for size in planned)
        return [row["weights"], row["kv_format"], format_bytes(row["weight_bytes"]), *sizes, show_change(row["change"])]

    headings = ("weights", "KV cache", "bytes", "GPU", "host", "change")
    plan = ("tokens/s", PAPER_SYMBOLS, "limited by")
    output.show(frame, about, lambda: print_frame(frame, headings, cells, plan))


def _show_resources(space: "Space", about: str, percent: float, output: TableOutput) -> None:
    profile = space.profile
    if not -100 < percent <= MOST_PERCENT or percent == 0:
        rule = f"must be above -100, at most {MOST_PERCENT:,} and other than 0"
        raise HrmError("--percent", percent, rule, "give 10 for 10 % more")
    with searching(len(resources(profile))) as on_point:
        frame = what_if(space, factor=1 + percent / 100, on_point=on_point)

    def print_text() -> None:
        print_frame(
            frame,
            (f"{percent:+g} % of", "now", "tokens/s", "same policy"),
            lambda row: [
                _what(row["resource"], percent),
                _now(profile, row["resource"], space.dtype),
                show_change(row["change"]),
                show_change(row["same_policy_change"]),
            ],
            plan=(PAPER_SYMBOLS, "limited by"),
        )
        console.print(f"\n{_what_pays(frame, percent)}")

    output.show(frame, about, print_text, lambda path: _draw_what_if(frame, path, about), percent=percent)


def _what(resource: str, percent: float) -> str:
    """A row's name; where there is more of everything, there is `less` of a latency or of waiting."""
    if resource != Cause.WAITING.value and not Resource(resource).is_latency:
        return resource
    return f"{'less' if percent > 0 else 'more'} {resource}"


def _now(profile: HardwareProfile, resource: str, dtype: str) -> str:
    """How much of the resource the machine has; a dash for waiting, which is none."""
    if resource == Cause.WAITING.value:
        return "–"
    named = Resource(resource)
    return named.show(resource_value(profile, named, dtype=dtype))


def _what_pays(frame: "pd.DataFrame", percent: float) -> str:
    """The answer in one line."""
    known = frame.dropna(subset=["change"])
    best = max(records(known), key=lambda row: abs(row["change"]))
    if abs(best["change"]) < NOTHING:
        return f"{percent:+g} % of no single resource changes the throughput."
    kept = "with the same policy" if best["same_policy"] else f"with policy {best['policy']}"
    verb = "pays most" if percent > 0 else "costs most"
    nothing = [row["resource"] for row in records(known) if abs(row["change"]) < NOTHING]
    rest = f"; {', '.join(nothing)}: nothing" if nothing else ""
    return f"{_what(best['resource'], percent)} {verb}: {show_change(best['change'])} {kept}{rest}."


@click.command(name="map")
@machine_options
@model_options
@workload_options
@schedule_option
@click.option(
    "--x",
    "x_text",
    required=True,
    metavar="WHAT=FROM:TO:POINTS",
    help=f"A resource, {', '.join(Whole)} times factors (cpu=1:10:8), {' or '.join(Length)}.",
)
@click.option("--y", "y_text", required=True, metavar="WHAT=FROM:TO:POINTS", help="The same.")
@click.option("--log", is_flag=True, help="Space the points evenly in the logarithm.")
@table_output_options
def map_command(
    profile: HardwareProfile,
    model: ChosenModel,
    workload: Workload,
    schedule: ScheduleName,
    x_text: str,
    y_text: str,
    log: bool,
    output: TableOutput,
) -> None:
    """Which kind of policy is best where, over two axes that are swept."""
    x, y = (_axis(text, flag, log=log) for text, flag in ((x_text, "--x"), (y_text, "--y")))
    if x.column == y.column:
        raise HrmError("--y", y_text, "must be another than --x", "sweep two of them")
    space = model.space(profile, workload, schedule=schedule)
    with searching(len(x.points) * len(y.points)) as on_point:
        frame = policy_map(space, x=x, y=y, on_point=on_point)
    about = _about(model, profile, workload)
    output.show(
        frame,
        about,
        lambda: console.print(map_text(frame, x, y), highlight=False),
        lambda path: _draw_map(frame, path, x, y, about),
        x=x.column,
        y=y.column,
    )


def _axis(text: str, flag: str, *, log: bool) -> Axis:
    """`h2d-bandwidth=100GB/s:500GB/s:9` or `cpu=1:10:8`; HrmError for another form."""
    name, _, span = text.partition("=")
    parts = span.split(":")
    what = SWEPT.get(name)
    usual = "write it like h2d-bandwidth=100GB/s:500GB/s:9 or cpu=1:10:8"
    if what is None or len(parts) != 3 or not parts[2].isdecimal():
        raise HrmError(
            flag,
            text,
            f"must be WHAT=FROM:TO:POINTS, WHAT one of {', '.join(SWEPT)}",
            meant(name, SWEPT, usual) if what is None else usual,
        )
    first, last = (what.read(part, f"{flag} {what}") for part in parts[:2])
    # Checked as text first: Python reads no number of thousands of digits.
    if len(parts[2]) > len(str(MOST_POINTS)) or int(parts[2]) > MOST_POINTS:
        raise HrmError(
            f"{flag} {name}: points",
            parts[2],
            f"must be at most {MOST_POINTS}",
            "ask for fewer: each is a row of searches",
        )
    return Axis.between(what, first, last, int(parts[2]), logarithmic=log)


def map_text(frame: "pd.DataFrame", x: Axis, y: Axis) -> str:
    """The map in letters, the greatest y on top, and what they mean."""
    regions: dict[str, str] = {}
    rows: list[str] = []
    cells = {(row[x.column], row[y.column]): row for row in records(frame)}
    for y_value in reversed(y.points):
        letters: list[str] = []
        for x_value in x.points:
            region = cells[x_value, y_value]["region"]
            known = isinstance(region, str)
            letters.append(regions.setdefault(region, LETTERS[len(regions) % len(LETTERS)]) if known else "·")
        rows.append(f"{y.what.show(y_value):>12} │ {'  '.join(letters)}")
    left, right = x.what.show(x.points[0]), x.what.show(x.points[-1])
    width = 3 * len(x.points) - 2
    axis = f"{left}{right:>{max(width - len(left), len(right) + 1)}}"
    legend = [f"  {letter}  {region}" for region, letter in regions.items()]
    return "\n".join(
        [
            f"{_axis_name(y)} (up), {_axis_name(x)} (right)",
            *rows,
            f"{'':>12} └─{'─' * width}",
            f"{'':>15}{axis}",
            "",
            *legend,
            *(["  ·  no policy fits"] if "·" in "".join(rows) else []),
        ]
    )


def _axis_name(axis: Axis) -> str:
    if isinstance(axis.what, Whole):
        return f"{axis.what} ({', '.join(axis.what.resources)}) times"
    return axis.what.value


def _draw_what_if(frame: "pd.DataFrame", path: Path, title: str) -> None:
    from hrm.plots.what_if import plot_what_if

    plot_what_if(frame, path, title=title)


def _draw_map(frame: "pd.DataFrame", path: Path, x: Axis, y: Axis, title: str) -> None:
    from hrm.plots.regions import plot_map

    plot_map(frame, path, x=x.column, y=y.column, region="region", value="tokens_per_s", title=title)
