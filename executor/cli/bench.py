"""`executor bench`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from executor.cli.options import accelerator_arguments, accelerator_options
from hrm.errors import PolicyError
from hrm.policy import ScheduleName
from hrm.units import format_seconds

if TYPE_CHECKING:
    from executor.bench import BenchRow


@click.command()
@click.option(
    "--policy", required=True, type=click.Path(path_type=Path, dir_okay=False),
    help="A policy file (hrm search --out).",
)  # fmt: skip
@click.option(
    "--model", required=True, metavar="NAME-or-PATH",
    help="A checkpoint folder, or a built-in name, which gets random weights.",
)  # fmt: skip
@click.option("--layers", type=click.IntRange(min=1), help="Only so many layers of the model.")
@click.option(
    "--schedules", default=",".join(ScheduleName), show_default=True, metavar="A,B,…",
    help="Schedules to compare with the first.",
)  # fmt: skip
@click.option("--prompt-len", type=click.IntRange(min=1), help="[default: the policy's]")
@click.option("--gen-len", type=click.IntRange(min=1), help="[default: the policy's]")
@click.option("--requests", type=click.IntRange(min=1), help="[default: one batch]")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of prompts and random weights.")
@accelerator_arguments
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def bench(
    *, policy: Path, model: str, layers: int | None, schedules: str, prompt_len: int | None,
    gen_len: int | None, requests: int | None, repeats: int, seed: int, accelerator: str,
    gpu_memory: str | None, link_bandwidth: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Run the same policy under several schedules and compare them."""
    from executor.bench import BenchOptions, run_bench

    options = BenchOptions(
        policy=policy,
        model=model,
        num_layers=layers,
        schedules=parse_schedules(schedules),
        prompt_len=prompt_len,
        gen_len=gen_len,
        num_requests=requests,
        repeats=repeats,
        seed=seed,
        accelerator=accelerator_options(accelerator, gpu_memory, link_bandwidth),
    )
    rows: list[BenchRow] = []
    if not as_json:
        click.echo(HEADER)
    for row in run_bench(options):
        rows.append(row)
        if not as_json:
            click.echo(line_of(row))
    if as_json:
        click.echo(json.dumps({"rows": [asdict(row) for row in rows]}, indent=2))


def parse_schedules(text: str) -> tuple[ScheduleName, ...]:
    """Names between commas; PolicyError for one that is no schedule."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in set(ScheduleName):
            raise PolicyError(
                "--schedules", name, f"must be of {', '.join(ScheduleName)}", "correct it"
            )
    return tuple(ScheduleName(name) for name in names)


HEADER = (
    f"{'schedule':<11} {'tokens/s':>9} {'prefill/s':>10} {'decode/s':>9} {'step':>9} {'ratio':>6}"
    "  busy in decode"
)


def line_of(row: "BenchRow") -> str:
    """One line of the table."""
    busy = " ".join(f"{lane} {share:.0%}" for lane, share in row.decode_busy_share.items())
    return (
        f"{row.schedule:<11} {row.tokens_per_s:>9.1f} {row.prefill_tokens_per_s:>10.1f} "
        f"{row.decode_tokens_per_s:>9.1f} {format_seconds(row.decode_step_s):>9} "
        f"{row.ratio:>6.2f}  {busy}"
    )
