"""`hrm paper`: what the model predicts for published runs, beside what was measured."""

import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from hrm.cli.console import print_json
from hrm.cli.params import OUT_FILE, json_option
from hrm.errors import HrmError
from hrm.machines import load_profile
from hrm.published.compare import (
    ComparedRun,
    accuracy,
    accuracy_by_system,
    by_column,
    compare,
    machine_name,
    order_as_published,
)
from hrm.published.data import MTBENCH, TABLE_4
from hrm.published.fit import FITTED_SETUPS, fit, fitted_figures
from hrm.published.report import print_comparisons, print_fits, print_scaling
from hrm.published.scaling import Scaling, batch_limit, compare_scaling, gpu_memory_left_bytes, measured_step

Row = dict[str, Any]


@click.command()
@click.option("--held-out", is_flag=True, help="MTBench (Fig. 7): nothing is fitted on these runs.")
@click.option("--scaling", is_flag=True, help="From two T4s to four, with larger models.")
@click.option("--fit", "refit", is_flag=True, help="Fit the fitted figures again and print them.")
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print rows separated by commas instead.")
@click.option("--plot", type=OUT_FILE, help="Draw predicted over measured: PNG, SVG or PDF, by its ending.")
def paper(held_out: bool, scaling: bool, refit: bool, as_json: bool, as_csv: bool, plot: Path | None) -> None:
    """Predict the runs of MoE-Lightning's Table 4 and lay them beside what was measured.

    The machines are paper-s1 and paper-s2; what is fitted in them is listed.
    """
    _only_one({"--held-out": held_out, "--scaling": scaling, "--fit": refit})
    _only_one({"--json": as_json, "--csv": as_csv, "--plot": plot is not None})
    if refit:
        if plot is not None:
            raise HrmError("--plot", str(plot), "draws runs, not fits", "leave out --fit")
        figures = [figure for setup in FITTED_SETUPS for figure in fit(setup)]
        rows = [asdict(figure) for figure in figures]
        if not _print_for_scripts({"figures": rows}, rows, as_json=as_json, as_csv=as_csv):
            print_fits(figures)
    elif scaling:
        scalings = compare_scaling()
        if plot is not None:
            _draw([c for s in scalings for c in (s.two, s.four)], plot, "two and four T4s")
            return
        rows = [_scaling_row(each) for each in scalings]
        if not _print_for_scripts({"runs": rows}, rows, as_json=as_json, as_csv=as_csv):
            print_scaling(scalings)
    else:
        comparisons, name = compare(MTBENCH if held_out else TABLE_4), "Table 4"
        if held_out:
            name = "Fig. 7 (MTBench, held out)"
        if plot is not None:
            _draw(comparisons, plot, name)
            return
        rows = [_cell(comparison) for comparison in comparisons]
        content = _content(comparisons, rows)
        if not _print_for_scripts(content, rows, as_json=as_json, as_csv=as_csv):
            print_comparisons(comparisons, name)


def _only_one(options: dict[str, bool]) -> None:
    given = [name for name, is_given in options.items() if is_given]
    if len(given) > 1:
        raise HrmError(" and ".join(given), "<together>", "one at a time can be asked for", "leave one out")


def _draw(comparisons: Sequence[ComparedRun], path: Path, name: str) -> None:
    from hrm.published.picture import plot_published

    plot_published(comparisons, path, title=f"MoE-Lightning, {name}: predicted over measured")
    click.echo(f"written to {path}")


def _print_for_scripts(content: Row, rows: list[Row], *, as_json: bool, as_csv: bool) -> bool:
    """Print for scripts, if that was asked for; whether it was."""
    if as_json:
        print_json(content)
    elif as_csv:
        writer = csv.DictWriter(sys.stdout, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return as_json or as_csv


def _cell(comparison: ComparedRun) -> Row:
    run, predicted = comparison.run, comparison.predicted
    return {
        "system": run.system.value,
        "setup": run.setup,
        "machine": machine_name(run.setup),
        "model": run.model,
        "workload": run.workload.name,
        "prompt_len": run.workload.prompt_len,
        "gen_len": run.workload.gen_len,
        "micro_batch_size": run.micro_batch_size,
        "batch_size": run.batch_size,
        "predicted_tokens_per_s": predicted.tokens_per_s,
        "measured_tokens_per_s": run.tokens_per_s,
        "error": comparison.error,
        "prefill_s": predicted.prefill.seconds,
        "prefill_limit": predicted.limits.prefill.cause.value,
        "decode_s": predicted.decode.seconds,
        "decode_limit": predicted.limits.decode.cause.value,
        "memory_excess_bytes": sum(comparison.memory_excess_bytes.values()),
    }


def _content(comparisons: Sequence[ComparedRun], rows: list[Row]) -> Row:
    machines = {machine_name(comparison.run.setup) for comparison in comparisons}
    return {
        "cells": rows,
        "systems": {system.value: asdict(its) for system, its in accuracy_by_system(comparisons).items()},
        "all": asdict(accuracy(comparisons)),
        "order_as_published": {name: order_as_published(column) for name, column in by_column(comparisons).items()},
        "fitted": {
            name: [
                {"where": where, "value": figure.value, "note": figure.note}
                for where, figure in fitted_figures(load_profile(name)).items()
            ]
            for name in sorted(machines)
        },
    }


def _scaling_row(scaling: Scaling) -> Row:
    two, four = scaling.two, scaling.four
    row: Row = {"model": two.run.model, "gen_len": two.run.workload.gen_len}
    for gpus, each in ((2, two), (4, four)):
        limit, measured = batch_limit(each.run), measured_step(each)
        row |= {
            f"setup_{gpus}": each.run.setup,
            f"batch_size_{gpus}": each.run.batch_size,
            f"batch_size_by_their_rule_{gpus}": limit.batch_size,
            f"batch_bound_by_{gpus}": limit.level,
            f"predicted_tokens_per_s_{gpus}": each.predicted.tokens_per_s,
            f"measured_tokens_per_s_{gpus}": each.run.tokens_per_s,
            f"prefill_s_{gpus}": each.predicted.prefill.seconds,
            f"step_s_{gpus}": each.step_s,
            f"decode_limit_{gpus}": each.predicted.limits.decode.cause.value,
            f"measured_step_s_{gpus}": measured.seconds,
            f"measured_weights_bytes_per_s_a_gpu_{gpus}": measured.weights_bytes_per_s,
            f"measured_cache_bytes_per_s_a_gpu_{gpus}": measured.cache_bytes_per_s,
            f"gpu_memory_left_bytes_a_gpu_{gpus}": gpu_memory_left_bytes(each),
        }
    return row | {
        "predicted_ratio": scaling.predicted_ratio,
        "measured_ratio": scaling.published_ratio,
        "requests_ratio": scaling.requests_ratio,
        "ratio_with_shared_links": scaling.shared_ratio,
    }
