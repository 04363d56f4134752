"""What commands with many searches share: a progress bar, and tables as text, CSV and JSON."""

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import click
from rich.console import Console

from hrm.cli.console import as_is, console, plain_table, print_json
from hrm.cli.params import OUT_FILE, json_option, together
from hrm.files import write_whole
from hrm.policy import PAPER_SYMBOLS
from hrm.units import counted, format_number, format_seconds

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True)
class TableOutput:
    """Where a table goes: printed, or as one JSON object, and into files."""

    as_json: bool
    csv: Path | None
    plot: Path | None

    def __post_init__(self) -> None:
        if self.plot is not None:
            from hrm.plots.style import check_path

            check_path(self.plot)

    def show(
        self,
        frame: "pd.DataFrame",
        about: str,
        print_text: Callable[[], object],
        draw: Callable[[Path], object] = lambda _: None,
        **facts: Any,
    ) -> None:
        """Write the table and draw it as asked, and print it by `print_text`, or with `facts` as JSON."""
        write_csv(frame, self.csv)
        if self.plot is not None:
            draw(self.plot)
        if self.as_json:
            print_rows(frame, about=about, **facts)
            return
        console.print(f"[bold]{as_is(about)}[/]\n")
        print_text()
        tell_written(self.csv, self.plot)


csv_option = click.option("--csv", type=OUT_FILE, help="Write the table here too.")
table_output_options = together(
    "output",
    TableOutput,
    json_option,
    csv_option,
    click.option("--plot", type=OUT_FILE, help="Draw it too: PNG, SVG or PDF, by its ending."),
)


@contextmanager
def searching(total: int | None) -> Generator[Callable[[], object]]:
    """A progress bar on standard error, if that is a terminal; what is yielded is called after each search.

    Meanwhile long series of searches are divided among all cores.
    """
    from rich.progress import Progress

    from hrm.analysis.rows import in_processes
    from hrm.profiling.environment import usable_cores

    stderr = Console(stderr=True)
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as bar, in_processes(usable_cores()):
        shown = bar.add_task("searching", total=total)
        yield lambda: bar.advance(shown)


def write_csv(frame: "pd.DataFrame", path: Path | None) -> None:
    """Write a table, if there is a path; HrmError if that cannot be."""
    if path is not None:
        write_whole(path, frame.to_csv(index=False), remedy="choose another --csv")


def print_rows(frame: "pd.DataFrame", **about: Any) -> None:
    """Print a table as one JSON object: `rows`, and what it is about; missing values are null."""
    rows = [
        {key: None if value != value else value for key, value in row.items()}  # noqa: PLR0124 - nan
        for row in records(frame.astype(object).where(frame.notna(), None))
    ]
    print_json({**about, "rows": rows})


def tell_written(*paths: Path | None) -> None:
    """Say which files were written."""
    for path in paths:
        if path is not None:
            click.echo(f"written to {path}")


def show_change(change: float) -> str:
    """A relative change: `+4.2%`; a dash if there is none to tell."""
    return "–" if math.isnan(change) else f"{change:+.1%}"


def _parallel(row: dict[str, Any]) -> str:
    """How GPUs share the work, and how many if not all do: `tensor, whole experts, 2 GPUs`."""
    told = [row["parallelism"]] if isinstance(row["parallelism"], str) else []
    told += ["whole experts"] if row["expert_division"] == "whole" else []
    told += [counted(row["gpus_used"], "GPU")] if isinstance(row["gpus_used"], int) else []
    return ", ".join(told) or "–"


# Columns that tell of a plan: the heading, and what makes the cell of a row.
PLAN_CELLS: Final[dict[str, Callable[[dict[str, Any]], str]]] = {
    "tokens/s": lambda row: format_number(row["tokens_per_s"]),
    "of its bound": lambda row: f"{row['tokens_per_s'] / row['bound_tokens_per_s']:.0%}",
    "parallel": _parallel,
    PAPER_SYMBOLS: lambda row: row["policy"],
    "limited by": lambda row: row["bottleneck"],  # the whole job, as the throughput is
}


def print_frame(
    frame: "pd.DataFrame",
    headings: Sequence[str],
    cells: Callable[[dict[str, Any]], list[str]],
    plan: Sequence[str] = tuple(PLAN_CELLS),
) -> None:
    """Print a table with its own first columns and then those of the plan, or why there is none.

    How GPUs share the work is left out where no row has several.
    """
    several = frame[["parallelism", "gpus_used"]].notna().any(axis=None)
    told = [heading for heading in plan if heading != "parallel" or several]
    table = plain_table(*headings)
    for heading in told:
        table.add_column(heading, no_wrap=True)
    for row in records(frame):
        if row["reason"]:
            reason = [""] * (len(told) - 1)
            policy = told.index(PAPER_SYMBOLS)
            reason.insert(policy, row["reason"])
            table.add_row(*map(as_is, cells(row)), *reason)
        else:
            table.add_row(*map(as_is, cells(row)), *(PLAN_CELLS[heading](row) for heading in told))
    console.print(table)


def records(frame: "pd.DataFrame") -> list[dict[str, Any]]:
    """The rows of a table."""
    return cast("list[dict[str, Any]]", frame.to_dict("records"))


def seconds_or_dash(value: float | None) -> str:
    """A duration, or a dash where there is none."""
    return "–" if value is None or math.isnan(value) else format_seconds(value)
