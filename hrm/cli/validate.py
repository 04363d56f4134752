"""`hrm validate`: a run's measurements beside the prediction."""

from collections.abc import Callable
from pathlib import Path

import click
from rich.table import Table

from hrm.acts import NAMES
from hrm.cli.console import as_is, console, plain_table, print_json
from hrm.cli.params import json_option
from hrm.cli.texts import warning_text
from hrm.run_record import FleetRecord, read_record, read_run
from hrm.tasks import Phase
from hrm.units import counted, format_bytes, format_number, format_seconds
from hrm.validate import Comparison, FleetValidation, Validation, validate_fleet
from hrm.validate import validate as compare


@click.command()
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@click.option("--worker", type=click.IntRange(min=1), help="Of the run of a fleet, this worker in full.")
@json_option
def validate(run: Path, worker: int | None, as_json: bool) -> None:
    """Lay what RUN (an output directory of executor run) measured beside the prediction.

    Of a run with --ray these are all workers in a line each, or one of them in full.
    """
    record = read_record(run)
    if isinstance(record, FleetRecord) and worker is None:
        validation = validate_fleet(record)
    else:
        validation = compare(read_run(run, worker))
    if as_json:
        print_json(validation.to_json())
    elif isinstance(validation, FleetValidation):
        print_fleet(validation)
    else:
        print_validation(validation)


def print_fleet(validation: FleetValidation) -> None:
    """Print the comparison of a fleet's workers for people."""
    fleet = validation.fleet
    console.print(
        f"[bold]{counted(len(fleet.workers), 'worker')}[/], {fleet.requests} requests, "
        f"{format_number(fleet.tokens_per_s)} tokens/s from the first request to the last answer ({fleet.outcome})\n"
    )
    table = plain_table("worker", "node", "policy", "requests", "measured tokens/s", "predicted", "error")
    for one in fleet.workers:
        named = (
            str(one.worker),
            as_is(one.node),
            as_is(Path(one.policy).name),
            f"{one.requests}{', died' if one.outcome == 'died' else ''}",
        )
        compared = validation.workers.get(one.worker)
        table.add_row(*named, *(_cells(compared.tokens_per_s, _rate) if compared else ("–", "–", "–")))
    table.add_row("[bold]all[/]", "", "", str(fleet.requests), *_cells(validation.tokens_per_s, _rate))
    console.print(table)


def print_validation(validation: Validation) -> None:
    """Print the comparison for people."""
    run = validation.run
    batches = counted(sum(batch.count for batch in run.batches), "batch")
    console.print(
        f"[bold]{as_is(run.policy_file.model.name)}[/] on {as_is(run.accelerator.description)}, "
        f"{run.schedule}, {run.totals.requests} requests in {batches} ({run.outcome})"
    )
    if warning := warning_text(run.policy_file.profile):
        console.print(warning)
    console.print()
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
    return format_number(value)


def _add(table: Table, name: str, comparison: Comparison, show: Callable[[float], str]) -> None:
    table.add_row(name, *_cells(comparison, show))


def _cells(comparison: Comparison, show: Callable[[float], str]) -> tuple[str, str, str]:
    measured, predicted = (show(value) if value else "–" for value in (comparison.measured, comparison.predicted))
    return measured, predicted, "–" if comparison.error is None else f"{comparison.error:+.1%}"
