"""`executor quantise`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hrm.cli.params import json_option
from hrm.cli.program import Interrupted
from hrm.units import format_bytes

if TYPE_CHECKING:
    from executor.quantise import Report

_WHAT = ("experts", "linear")


@click.command()
@click.option(
    "--model",
    required=True,
    metavar="FOLDER-or-HUB-ID",
    help="A checkpoint in bfloat16, float16 or float32, or org/name[@revision] on the Hugging Face Hub.",
)
@click.option(
    "--format",
    "form",
    required=True,
    metavar="FORMAT",
    help="int4-gN (a scale for each N weights of a row, say int4-g32), int8, fp8 (a scale a row), fp8-bN "
    "(a scale for each N × N weights, say fp8-b128), or mxfp4.",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The new checkpoint's folder: new, or empty."
)
@click.option(
    "--what",
    type=click.Choice(_WHAT),
    default="experts",
    show_default=True,
    help="The routed experts, or all linear layers but routers, head, embedding and what attention itself reads.",
)
@json_option
@click.option("--quiet", is_flag=True, help="No progress and no summary.")
def quantise(*, model: str, form: str, out: Path, what: str, as_json: bool, quiet: bool) -> None:
    """Pack the weights of a checkpoint into a narrower format, in a checkpoint of its own.

    Of each group of weights the scale is taken that loses the least by itself, whatever the model is asked later.
    The new folder is written whole or not at all. transformers and vLLM read it: int4-gN, int8, fp8 and mxfp4 in the
    form of compressed-tensors, fp8-bN in that of DeepSeek-V3, and mxfp4 of gpt-oss in its own. Where a model has all
    experts of a layer in one tensor they are written one by one, by the names that its family has for them.

    vLLM and transformers may round activations to fp8 as well where weights are fp8; here weights alone are.

    The error is the norm of what rounding changed by the norm of the weights.
    """
    from executor.cli.progress import live_progress, say
    from executor.download import locate
    from executor.job import JobProgress
    from executor.quantise import QuantiseOptions, What
    from executor.quantise import quantise as write

    progress = JobProgress(tell=say)
    try:
        with live_progress(progress, quiet=quiet):
            located = locate(model, None, progress.fetched)
            options = QuantiseOptions(
                model=located.folder, model_name=located.name, out=out, format=form, what=What(what)
            )
            progress.stage = "quantising"
            report = write(options, progress.loading)
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted; nothing was written to {out}") from error
    if as_json:
        from hrm.cli.console import print_json

        print_json({"model": model, "out": str(out), **report.to_json()})
    elif not quiet:
        _print(report, out)


def _print(report: "Report", out: Path) -> None:
    """The error of each layer, and what it comes to."""
    from hrm.cli.console import console, plain_table

    table = plain_table("layer", "packed", "matrices", "bits a weight", "error", right_from=2)
    for (layer, of_experts), loss in sorted(report.losses.items()):
        kind = "experts" if of_experts else "other matrices"
        table.add_row(str(layer), kind, str(loss.matrices), f"{loss.bits:.2f}", f"{loss.relative_error:.2%}")
    total = report.total
    table.add_row("all", "", str(total.matrices), f"{total.bits:.2f}", f"{total.relative_error:.2%}")
    console.print(table)
    click.echo()
    click.echo(f"format  {report.format} ({report.method})")
    click.echo(f"wrote   {out}: {format_bytes(report.bytes_after)}, from {format_bytes(report.bytes_before)}")
    if report.obstacle:
        click.echo(f"note    transformers and vLLM do not read it: {report.obstacle}")
