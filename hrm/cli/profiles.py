"""`hrm profiles`: machines that are known, one of them, or two of them beside each other."""

import re
import sys
from collections.abc import Callable
from typing import Any

import click
from rich.table import Column

from hrm.catalog import CatalogPart, list_files
from hrm.cli.console import as_is, console, plain_table, print_json
from hrm.cli.machine_table import print_card, print_host, print_profile
from hrm.cli.params import json_option
from hrm.errors import ProfileError
from hrm.hardware import NOISY_SPREAD, GpuCard, HardwareProfile, Host
from hrm.machines import compose, dump_profile, load_any, parse_gpus, without_gpus
from hrm.profile_diff import FigureDiff, ProfileDiff, Verdict, diff_profiles
from hrm.units import counted, format_bandwidth, format_bytes, format_flops, format_number, format_seconds

DIFF = "diff"
TOLD_CHANGE = 0.10  # diff says in how many figures it would notice a change of this size


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME | diff A B]")
@click.option("--all", "show_all", is_flag=True, help="diff: list what is within the spreads too.")
@json_option
@click.option(
    "--yaml/--table",
    "as_yaml",
    default=None,
    help="Print NAME as a file or as a table [default: a table on a terminal, else a file].",
)
def profiles(names: tuple[str, ...], show_all: bool, as_json: bool, as_yaml: bool | None) -> None:
    """List the known GPUs, hosts and machines, show NAME, or compare the machines A and B.

    A name is that of a GPU or a host, a machine like 4xT4, or a YAML file (hrm profile --out).

    For a GPU of your own, begin with one that is known: hrm profiles T4 > mine.yaml writes its
    file. Change that, and plan with --gpus ./mine.yaml or 2x./mine.yaml. Hosts go the same way, to
    --host, and whole machines to --profile.

    diff shows every figure that lies further apart in A and B than its spreads account for. Of two
    runs in a row on an unchanged machine, 19 of 20 figures agree. Where one spreads by over 8 %,
    marked !, that says little: a change of 10 % may not be told there.
    """
    match names:
        case ():
            _list(as_json=as_json)
        case ("diff", first, second):
            _diff(_whole(first), _whole(second), (first, second), show_all=show_all, as_json=as_json)
        case (name,) if name != DIFF:
            _show(name, as_json=as_json, as_yaml=not sys.stdout.isatty() if as_yaml is None else as_yaml)
        case _:
            raise ProfileError(
                "hrm profiles",
                " ".join(names),
                "takes one name, or diff and two names",
                "write it like: hrm profiles diff before.yaml after.yaml",
            )


def _list(*, as_json: bool) -> None:
    files = list_files()
    named = {"gpus": files.gpus, "hosts": files.hosts, "machines": files.machines}
    if as_json:
        print_json({kind: list(names) for kind, names in named.items()})
        return
    for kind, names in named.items():
        console.print(f"[bold]{kind}[/]  {', '.join(names) or '–'}")


def _show(name: str, *, as_json: bool, as_yaml: bool) -> None:
    machine = _machine(name)
    if as_json:
        print_json({"profile": machine})
        return
    if as_yaml:
        click.echo(dump_profile(machine), nl=False)
        return
    match machine:
        case HardwareProfile():
            print_profile(machine)
        case GpuCard():
            print_card(machine)
        case Host():
            print_host(machine)


def _machine(name: str) -> CatalogPart:
    """The GPU, host or machine of that name, or the machine that `4xT4` is composed to."""
    is_composed = re.match(r"\s*\d+\s*[x×]", name, re.IGNORECASE) or ("+" in name and len(parse_gpus(name)) > 1)
    return compose(name) if is_composed else load_any(name)


def _whole(name: str) -> HardwareProfile:
    """A machine to compare: a GPU stands for a machine with one, a host for one without."""
    machine = _machine(name)
    match machine:
        case HardwareProfile():
            return machine
        case GpuCard():
            return compose(name)
        case Host():
            return without_gpus(machine)


def _diff(
    first: HardwareProfile, second: HardwareProfile, names: tuple[str, str], *, show_all: bool, as_json: bool
) -> None:
    diff = diff_profiles(first, second)
    if as_json:
        print_json(_diff_json(diff))
        return
    for letter, name, machine in zip("AB", names, (first, second), strict=True):
        date = machine.environment.get("date", "not measured")
        console.print(f"[bold]{letter}[/]  {as_is(name)}: {as_is(machine.name)} ({as_is(date)})")
        if warnings := machine.environment.get("warnings"):
            console.print(f"   [yellow]warnings: {as_is(warnings)}[/]")
    _print_figures(diff, show_all=show_all)
    for letter, only in zip("AB", (diff.only_first, diff.only_second), strict=True):
        if only:
            console.print(f"only in {letter}: {', '.join(only)}")
    for key, (one, other) in diff.environment.items():
        console.print(f"[dim]{as_is(key)}: {as_is(one)} → {as_is(other)}[/]")
    equal = len(diff.figures) - len(diff.different)
    counts = [f"{diff.count(verdict)} differ {_words(verdict)}" for verdict in Verdict]
    total = counted(len(diff.figures), "figure")
    console.print(f"{total} in both: {equal} equal, {', '.join(counts)}")
    console.print(
        f"[dim]19 of 20 agree where nothing changed; a change of {TOLD_CHANGE:.0%} would be told in"
        f" {diff.told(TOLD_CHANGE)} of the {len(diff.judged)} with spreads"
        f" (!: over {NOISY_SPREAD:.0%})[/]"
    )


def _words(verdict: Verdict) -> str:
    return "with no spread recorded" if verdict is Verdict.UNKNOWN else verdict.value


def _print_figures(diff: ProfileDiff, *, show_all: bool) -> None:
    shown = [x for x in diff.different if show_all or x.verdict is not Verdict.WITHIN]
    if not shown:
        return
    table = plain_table(Column("figure", no_wrap=True), "A", "B", "change", "on its curve", "")
    for figure in shown:
        show = _format_of(figure.name)
        size, change = figure.curve_change
        color = "yellow" if figure.verdict is Verdict.BEYOND else "default"
        table.add_row(
            figure.name,
            show(figure.first.value),
            show(figure.second.value),
            f"[{color}]{_change_text(figure.change)}{' !' if figure.is_noisy else ''}[/]",
            f"{change:+.0%} at {format_number(size)}" if change else "",
            figure.verdict.value,
        )
    console.print(table)


def _change_text(change: float) -> str:
    """`-3.2%`, or `×4.1` where it is at least twice or at most half as much."""
    return f"{change:+.1%}" if -0.5 < change < 1 else f"×{1 + change:.3g}"


def _format_of(name: str) -> Callable[[float], str]:
    """How a figure is printed, by what the fields on its path say of its unit."""
    for part, show in (
        ("flops_per_s", format_flops),
        ("bytes_per_s", format_bandwidth),
        ("_bytes", format_bytes),
        ("latency_s", format_seconds),
        ("request_s", format_seconds),
    ):
        if part in name:
            return show
    return "{:.0%}".format


def _diff_json(diff: ProfileDiff) -> dict[str, Any]:
    def figure_json(figure: FigureDiff) -> dict[str, Any]:
        size, change = figure.curve_change
        return {
            "name": figure.name,
            "first": figure.first.value,
            "second": figure.second.value,
            "change": figure.change,
            "verdict": figure.verdict.name.lower(),
            "apart": figure.apart,
            "noisy": figure.is_noisy,
            "curve": {"size": size, "change": change} if change else None,
        }

    return {
        "figures": [figure_json(figure) for figure in diff.different],
        "equal": len(diff.figures) - len(diff.different),
        "counts": {verdict.name.lower(): diff.count(verdict) for verdict in Verdict},
        "tell_10_percent": diff.told(TOLD_CHANGE),
        "judged": len(diff.judged),
        "only_first": diff.only_first,
        "only_second": diff.only_second,
        "environment": diff.environment,
    }
