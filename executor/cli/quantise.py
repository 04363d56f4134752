"""`executor quantise`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hrm.cli.params import enum_option, json_option
from hrm.cli.program import Interrupted
from hrm.contract.quantising import LEAST_GROUP
from hrm.model_spec import What
from hrm.units import format_bytes

if TYPE_CHECKING:
    from executor.quantise import Report


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
    f"(a scale for each N × N weights, say fp8-b128), or mxfp4; N is a multiple of {LEAST_GROUP}.",
)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="The new checkpoint's folder: new, or empty."
)
@enum_option(
    "--what",
    kind=What,
    default=What.EXPERTS.value,
    show_default=True,
    help="The routed experts, or all linear layers but routers, head, embedding and what attention itself reads.",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path, dir_okay=False),
    help="A text, or the requests of a job (.jsonl), to measure the change of perplexity on.",
)
@json_option
@click.option("--quiet", is_flag=True, help="No progress and no summary.")
def quantise(*, model: str, form: str, out: Path, what: What, prompts: Path | None, as_json: bool, quiet: bool) -> None:
    """Pack the weights of a checkpoint into a narrower format, in a checkpoint of its own.

    Of each group of weights the scale is taken that loses the least by itself, whatever the model is asked later.
    The new folder is written whole or not at all, in forms that transformers and vLLM read: int4-gN, int8, fp8 and
    mxfp4 in that of compressed-tensors, fp8-bN in that of DeepSeek-V3, and mxfp4 of gpt-oss in its own. Where a model
    has all experts of a layer in one tensor they are written one by one, by the names that its family has for them.

    Where weights are fp8 others may round activations to it as well; the executor does not.

    The error is the norm of what rounding changed by the norm of the weights. With --prompts both models are run on
    this machine's CPU, which has to have memory for them, and predict each token of the texts from those before it.
    """
    from executor.cli.progress import live_progress, say
    from executor.download import locate
    from executor.job import JobProgress
    from executor.quantise import QuantiseOptions, perplexity, texts_of
    from executor.quantise import quantise as write

    progress, done = JobProgress(tell=say), f"nothing was written to {out}"
    try:
        with live_progress(progress, quiet=quiet):
            located = locate(model, None, progress.fetched)
            texts = texts_of(prompts, located.folder) if prompts is not None else []
            options = QuantiseOptions(model=located.folder, model_name=located.name, out=out, format=form, what=what)
            progress.stage = "quantising"
            report = write(options, progress.loading)
            done = f"{out} is whole"
            if texts:
                progress.stage = "measuring perplexity"
                progress.loading.set(0, 0)
                report.perplexities = perplexity(located.folder, texts), perplexity(out, texts)
    except KeyboardInterrupt as error:
        raise Interrupted(f"interrupted; {done}") from error
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
    if report.perplexities is not None:
        before, after = (each.value for each in report.perplexities)
        tokens = report.perplexities[0].tokens
        click.echo(
            f"perplexity  {before:.3f} before, {after:.3f} after ({after / before - 1:+.2%}), of {tokens} tokens"
        )
    if report.obstacle:
        click.echo(f"note    transformers and vLLM do not read it: {report.obstacle}")
