"""`hrm validate`: a run's measurements beside the prediction."""

from collections.abc import Callable
from pathlib import Path

import click
from rich.table import Table

from hrm.acts import NAMES
from hrm.cli.console import console, plain_table, print_json
from hrm.cli.params import json_option
from hrm.run_record import read_run
from hrm.tasks import Phase
from hrm.units import counted, format_bytes, format_seconds
from hrm.validate import Comparison, Validation
from hrm.validate import validate as compare


@click.command()
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@json_option
def validate(run: Path, as_json: bool) -> None:
    """Lay what RUN (an output directory of executor run) measured beside the prediction."""
    validation = compare(read_run(run))
    if as_json:
        print_json(validation.to_json())
    else:
        print_validation(validation)


def print_validation(validation: Validation) -> None:
    """Print the comparison for people."""
    run = validation.run
    batches = counted(sum(batch.count for batch in run.batches), "batch")
    console.print(
        f"[bold]{run.policy_file.model.name}[/] on {run.accelerator.description}, "
        f"{run.schedule}, {run.totals.requests} requests in {batches} ({run.outcome})\n"
    )
    table = plain_table("", "measured", "predicted", "error")
    _add(table, "[bold]tokens/s, whole job[/]", validation.tokens_per_s, _rate)
    for phase, comparison in validation.phase_tokens_per_s.items():
        word = "prompt tokens/s, prefill" if phase is Phase.PREFILL else "tokens/s, decode"
        _add(table, word, comparison, _rate)
    for phase in Phase:
        table.add_section()
        table.add_row(f"[bold]{phase.value}[/]", "", "", "")
        for (p, lane), comparison in validation.lane_s.items():
            if p is phase and (comparison.measured or comparison.predicted):
                _add(table, f"  lane {lane.value}", comparison, format_seconds)
        for (p, kind), comparison in validation.kind_s.items():
            if p is phase:
                name = kind.lower().replace("_", " ")
                _add(table, f"    {NAMES[kind]} {name}", comparison, format_seconds)
        for (p, rank), comparison in validation.rank_s.items():
            if p is phase:
                slowest = ", the slowest" if rank == validation.slowest_rank else ""
                _add(table, f"  rank {rank}, all but sums{slowest}", comparison, format_seconds)
    console.print(table)
    console.print()
    memory = plain_table("memory", "peak", "planned", "capacity")
    levels = {**run.memory}
    for other in run.ranks:
        levels |= {f"{name}, rank {other.rank}": level for name, level in other.memory.items()}
    for name, level in levels.items():
        memory.add_row(
            name,
            format_bytes(level.peak_total_bytes),
            format_bytes(level.planned_total_bytes),
            format_bytes(level.capacity_bytes),
        )
    console.print(memory)


def _rate(value: float) -> str:
    return f"{value:.4g}"


def _add(table: Table, name: str, comparison: Comparison, show: Callable[[float], str]) -> None:
    error = comparison.error
    sides = [show(value) if value else "–" for value in (comparison.measured, comparison.predicted)]
    table.add_row(name, *sides, "–" if error is None else f"{error:+.1%}")
