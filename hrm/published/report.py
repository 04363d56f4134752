"""How `hrm paper` shows comparisons with published runs, in a hundred columns."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Final

from rich.table import Table

from hrm.cli.console import console
from hrm.machines import load_profile
from hrm.published.compare import (
    Accuracy,
    ComparedRun,
    accuracy,
    accuracy_by_system,
    by_column,
    grouped,
    machine_name,
    order_as_published,
)
from hrm.published.data import SETUPS
from hrm.published.fit import FittedFigure, fitted_figures
from hrm.published.scaling import (
    NUM_GPUS,
    Scaling,
    batch_limit,
    gpu_memory_left_bytes,
    machine_of,
    measured_step,
    published_steps_s,
)
from hrm.published.systems import IMPLEMENTATIONS
from hrm.units import format_bandwidth, format_bytes, format_flops, format_number

WIDTH: Final = 100


def print_comparisons(comparisons: Sequence[ComparedRun], name: str) -> None:
    """The runs by column, then errors, fitted figures, order and what does not fit."""
    console.print(f"[bold]MoE-Lightning, {name}[/]: tokens/s predicted and measured")
    console.print("[dim]all prompts are padded to the longest; weights and cache are float16[/]")
    setups = sorted({comparison.run.setup for comparison in comparisons})
    for setup in setups:
        console.print(f"[dim]{setup}: {SETUPS[setup]}; hrm profiles {machine_name(setup)}[/]")
    console.print()
    console.print(_table(comparisons))
    console.print("[dim]limited by what would shorten the phase most if it cost half; waiting: tasks in turn[/]\n")
    _print_order(by_column(comparisons))
    console.print(_accuracy_table(comparisons))
    console.print()
    for system in dict.fromkeys(comparison.run.system for comparison in comparisons):
        _say(f"{system.value}: {IMPLEMENTATIONS[system].says}")
    console.print()
    _print_fitted(setups)
    _print_excess(comparisons)


def _table(comparisons: Sequence[ComparedRun]) -> Table:
    table = _new_table(
        "", "μ, N/μ", "predicted", "measured", "error", "prefill", "limited by", "step", "limited by", left=(0, 6, 8)
    )
    for name, column in by_column(comparisons).items():
        table.add_row(f"[bold]{name}[/]")
        for comparison in column:
            run, predicted = comparison.run, comparison.predicted
            table.add_row(
                f"  {run.system.value}",
                f"{run.micro_batch_size}, {predicted.policy.num_micro_batches}",
                format_number(predicted.tokens_per_s),
                format_number(run.tokens_per_s),
                f"{comparison.error:+.1%}",
                f"{predicted.prefill.seconds:.0f} s",
                predicted.limits.prefill.cause.value,
                f"{comparison.step_s:.1f} s",
                predicted.limits.decode.cause.value,
            )
    return table


def _new_table(*headers: str, left: Iterable[int] = (0,)) -> Table:
    table = Table(box=None, pad_edge=False)
    aligned = set(left)
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index in aligned else "right", no_wrap=True)
    return table


def _print_order(columns: dict[str, list[ComparedRun]]) -> None:
    wrong = [name for name, column in columns.items() if not order_as_published(column)]
    if wrong:
        _say(f"order of the systems: not as published in {', '.join(wrong)}")
    else:
        _say(f"order of the systems: as published in all {len(columns)} columns")
    console.print()


def _accuracy_table(comparisons: Sequence[ComparedRun]) -> Table:
    table = _new_table("system", "runs", "mean |error|", "worst", "in", left=(0, 4))
    named: dict[str, Accuracy] = {system.value: its for system, its in accuracy_by_system(comparisons).items()}
    for name, its in {**named, "all": accuracy(comparisons)}.items():
        table.add_row(name, str(its.count), f"{its.mean_error:.1%}", f"{its.worst_error:+.1%}", its.worst_column)
    return table


def _print_fitted(setups: Sequence[str]) -> None:
    for setup in setups:
        machine = machine_name(setup)
        figures = fitted_figures(load_profile(machine))
        console.print(f"[bold]fitted in {machine}[/]: {len(figures)} figures")
        for where, figure in figures.items():
            console.print(f"  {readable(where)}: {_quantity(where, figure.value)}")
            _say(figure.note, indent="    ")
    console.print()


def _print_excess(comparisons: Sequence[ComparedRun]) -> None:
    for comparison in comparisons:
        for level, size in comparison.memory_excess_bytes.items():
            _say(
                f"{comparison.run.system.value}, {comparison.run.column}: as published, though by"
                f" hrm's formulas it needs {format_bytes(size)} more than there is to plan with on"
                f" the {level} level"
            )


def readable(where: str) -> str:
    """A figure's place in words: `gpu float16 GEMM`, `cpu->gpu pageable link`."""
    level, _, rest = where.partition(".")
    field = rest.rpartition(".")[2] if "compute" in rest else rest
    words = {"processor.attention_bytes_per_s": "attention", "bandwidth_bytes_per_s": "link"}
    return f"{level} {words.get(field, f'{field} GEMM')}"


def _quantity(where: str, value: float) -> str:
    return format_flops(value) if "flops" in where else format_bandwidth(value)


def print_fits(figures: Sequence[FittedFigure]) -> None:
    """What a new fit finds beside what is shipped."""
    table = _new_table("machine", "figure", "shipped", "found", "differs by", left=(0, 1))
    for figure in figures:
        table.add_row(
            figure.machine,
            readable(figure.where),
            _quantity(figure.where, figure.shipped),
            _quantity(figure.where, figure.found),
            f"{figure.found / figure.shipped - 1:+.2%}",
        )
    console.print(table)
    console.print("[dim]least squares over log(predicted / measured) of Table 4's cells, in closed form[/]")


# -- two and four GPUs ------------------------------------------------------------------------


def print_scaling(scalings: Sequence[Scaling]) -> None:
    """Throughput on two and four T4s, their ratio, and where it comes from."""
    console.print("[bold]MoE-Lightning, Figs 7 and 8[/]: tokens/s on two and four T4s, host of 32 cores and 416 GB")
    _say("T4 and CPU attention as in paper-s1; nothing is fitted on these runs")
    console.print()
    table = _new_table(
        *("generated", "N on 2", "on 4", "predicted 2", "4", "measured 2", "4", "predicted", "measured", "shared links")
    )
    by_model = grouped(scalings, lambda scaling: scaling.two.run.model)
    for model, of_model in by_model.items():
        table.add_row(f"[bold]{model}[/]")
        for scaling in of_model:
            table.add_row(*_scaling_cells(scaling))
    console.print(table)
    console.print("[dim]shared links: if two cards had the bandwidth of one link[/]\n")
    console.print(_steps_table(by_model))
    console.print(
        "[dim]measured: what the run's time leaves for a step if prefill took as predicted; a link,"
        " a process:\nthe weights that each card's link, or the cache that each card's process on"
        " the CPU, would move a\nsecond if it alone filled that step; left: of a card's memory, by"
        " hrm's formulas[/]"
    )
    for model, of_model in by_model.items():
        console.print()
        _explain(model, of_model)


def _steps_table(by_model: dict[str, list[Scaling]]) -> Table:
    """Decode steps on two and four GPUs: predicted, what limits them, and what was measured."""
    table = _new_table(
        "generated", "GPUs", "step", "limited by", "measured", "a link", "a process", "left", left=(0, 3)
    )
    for model, scalings in by_model.items():
        table.add_row(f"[bold]{model}[/]")
        for scaling in scalings:
            for comparison in (scaling.two, scaling.four):
                table.add_row(*_step_cells(comparison))
    return table


def _step_cells(comparison: ComparedRun) -> list[str]:
    measured = measured_step(comparison)
    return [
        f"  {comparison.run.workload.gen_len}",
        str(NUM_GPUS[comparison.run.setup]),
        f"{comparison.step_s:.1f} s",
        comparison.predicted.limits.decode.cause.value,
        f"{measured.seconds:.1f} s",
        format_bandwidth(measured.weights_bytes_per_s),
        format_bandwidth(measured.cache_bytes_per_s),
        format_bytes(gpu_memory_left_bytes(comparison)),
    ]


def _scaling_cells(scaling: Scaling) -> list[str]:
    two, four = scaling.two, scaling.four
    return [
        f"  {two.run.workload.gen_len}",
        str(two.run.batch_size),
        str(four.run.batch_size),
        f"{two.predicted.tokens_per_s:.3g}",
        f"{four.predicted.tokens_per_s:.3g}",
        f"{two.run.tokens_per_s:.3g}",
        f"{four.run.tokens_per_s:.3g}",
        f"×{scaling.predicted_ratio:.2f}",
        f"×{scaling.published_ratio:.2f}",
        f"×{scaling.shared_ratio:.2f}",
    ]


def _explain(model: str, scalings: Sequence[Scaling]) -> None:
    """What the ratio consists of, by the model and by the published numbers."""
    console.print(f"[bold]{model}[/]")
    for gpus, runs in ((2, [scaling.two.run for scaling in scalings]), (4, [scaling.four.run for scaling in scalings])):
        limits = [batch_limit(run) for run in runs]
        levels = " or ".join(dict.fromkeys(limit.level for limit in limits))
        _say(
            f"batch on {gpus}: {_span([run.batch_size for run in runs], '.0f')} requests;"
            f" MoE-Lightning's memory rule allows"
            f" {_span([limit.batch_size for limit in limits], '.0f')}, bound by {levels}",
            indent="  ",
        )
    _say(
        f"four finish {_span([s.requests_ratio for s in scalings])} times the requests of two, in"
        f" {_span([s.published_time_ratio for s in scalings])} times the time;"
        f" {_span([s.predicted_time_ratio for s in scalings])} is predicted",
        indent="  ",
    )
    short = [1 - s.predicted_ratio / s.published_ratio for s in scalings]
    _say(
        f"predicted ×{_span([s.predicted_ratio for s in scalings])}, measured"
        f" ×{_span([s.published_ratio for s in scalings])}: short by"
        f" {_span([100 * share for share in short], '.0f')} %",
        indent="  ",
    )
    _say(
        f"had one roof set both steps, it would be at most"
        f" ×{_span([s.requests_ratio for s in scalings])} for the host's memory or cores,"
        f" ×{scalings[0].gpu_ceiling:.0f} for what each card does for its requests, and"
        f" ×{_span([s.link_ceiling for s in scalings])} for weights over each card's link",
        indent="  ",
    )
    for gpus, each in ((2, [scaling.two for scaling in scalings]), (4, [scaling.four for scaling in scalings])):
        limited = " or ".join(dict.fromkeys(c.predicted.limits.decode.cause.phrase for c in each))
        over = [1 + c.error for c in each]
        _say(
            f"on {gpus}, decode is limited by {limited}; predicted throughput is {_span(over)}"
            f" times the measured, from {each[0].run.workload.gen_len} to"
            f" {each[-1].run.workload.gen_len} tokens: {', '.join(f'{o:.2f}' for o in over)}",
            indent="  ",
        )
    _explain_gap(scalings)


def _explain_gap(scalings: Sequence[Scaling]) -> None:
    """What shared links would explain, and what stays unexplained."""
    two = [measured_step(scaling.two) for scaling in scalings]
    four = [measured_step(scaling.four) for scaling in scalings]
    setup = scalings[0].two.run.setup
    link = machine_of(setup).h2d.bandwidth_bytes_per_s.at() / NUM_GPUS[setup]
    rates = [step.weights_bytes_per_s / 1e9 for step in two]
    if all(scaling.shared_two.tokens_per_s < 0.9 * scaling.two.predicted.tokens_per_s for scaling in scalings):
        on_two = [s.shared_two.tokens_per_s / s.two.run.tokens_per_s for s in scalings]
        on_four = [s.shared_four.tokens_per_s / s.four.run.tokens_per_s for s in scalings]
        measured = published_steps_s([scaling.two.run for scaling in scalings])
        between = f", {_span(measured, '.1f')} s between the runs themselves" if measured else ""
        _say(
            f"on 2, weights had {_span([2 * rate for rate in rates], '.1f')} GB/s of two links of"
            f" {link / 1e9:.1f}: two cards on one link would take"
            f" {_span([s.shared_two.step_s for s in scalings], '.1f')} s a step{between}; four over"
            f" two would be ×{_span([s.shared_ratio for s in scalings])}, and predicted throughput"
            f" {_span(on_two)} times the measured on 2, {_span(on_four)} on 4. GCP gives 416 GB"
            " only to machines with four T4s, of which MoE-Lightning takes the first two: they may"
            " well be neighbours, but no source says that neighbours share a link, so it is not"
            " modelled",
            indent="  ",
        )
        return
    beyond = [
        f"×{s.published_ratio:.2f} at {s.two.run.workload.gen_len} tokens"
        for s in scalings
        if s.published_ratio > s.link_ceiling
    ]
    above_all = f"; {' and '.join(beyond)} is more than any roof of both could give" * bool(beyond)
    _say(
        f"not explained: a step takes {_span([s.seconds for s in two], '.0f')} s on 2 and"
        f" {_span([s.seconds for s in four], '.0f')} s on 4. Only the links could give more than"
        f" ×{scalings[0].gpu_ceiling:.0f}, and on 2 each moves {_span(rates, '.1f')} of"
        f" {link / 1e9:.1f} GB/s{above_all}. Measured steps outgrow the predicted ones as more"
        " tokens are generated, on 2 and on 4, as only attention's work does; but each process on"
        f" the CPU then reads {_span([s.cache_bytes_per_s / 1e9 for s in (*two, *four)])} GB/s of"
        " its cache, and the published code shows no reason for so little",
        indent="  ",
    )


def _span(values: Sequence[float], form: str = ".2f") -> str:
    """Least and greatest: `2.11 to 2.35`, or one if they print alike."""
    least, most = f"{min(values):{form}}", f"{max(values):{form}}"
    return least if least == most else f"{least} to {most}"


def _say(text: str, indent: str = "") -> None:
    """A paragraph wrapped to the width."""
    console.print(textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  "), markup=False)
