"""What narrower formats cost the demo model: its perplexity on the demo's prompts, format by format.

`python -m executor.demo.formats` packs the model into each format in turn, and then its KV cache, and has the executor
predict each token of the prompts, which are of text that the model was not trained on.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import click

from executor.demo import MODEL_DIR, PROMPTS
from executor.quantise import QuantiseOptions, What, perplexity, quantise, texts_of
from hrm.cli.console import console, plain_table
from hrm.formats import SCALED_KV_FORMATS, Formats
from hrm.model_spec import load_model
from hrm.units import format_bytes

FORMATS: Final = ("int8", "fp8", "fp8-b16", "int4-g16", "int4-g32", "mxfp4")


def row(name: str, what: What, texts: Sequence[tuple[int, ...]], before: float) -> tuple[str, ...]:
    """What packing matrices into a format makes of the model, whose perplexity was so much before."""
    with TemporaryDirectory() as folder:
        options = QuantiseOptions(model=MODEL_DIR, out=Path(folder) / "packed", format=name, what=what)
        report = quantise(options)
        after = perplexity(options.out, texts).value
    lost = report.total
    changes = f"{lost.bits:.2f}", f"{lost.relative_error:.1%}", format_bytes(report.bytes_after)
    return name, what.value, *changes, f"{after:.2f}", f"{after / before - 1:+.1%}"


def kv_row(name: str, texts: Sequence[tuple[int, ...]], before: float) -> tuple[str, ...]:
    """The same of a KV cache in a format; its bits are of a number that is cached, with its share of scales."""
    spec = load_model(str(MODEL_DIR))
    number = spec.kv_bytes_per_token(Formats.named("bfloat16")) / 16
    bits = spec.kv_bytes_per_token(Formats.named("bfloat16", kv_cache=name)) / number
    after = perplexity(MODEL_DIR, texts, kv_format=name).value
    return name, "KV cache", f"{bits:.2f}", "", "", f"{after:.2f}", f"{after / before - 1:+.1%}"


@click.command()
def formats() -> None:
    """Pack the demo model into each format, and its KV cache, and lay the perplexities side by side."""
    table = plain_table("format", "packed", "bits each", "error", "checkpoint", "perplexity", "change", right_from=2)
    texts = texts_of(PROMPTS, MODEL_DIR)
    before = perplexity(MODEL_DIR, texts)
    num_bytes = sum(path.stat().st_size for path in MODEL_DIR.glob("*.safetensors"))
    table.add_row("bfloat16", "", "16", "", format_bytes(num_bytes), f"{before.value:.2f}", "")
    for name, what in product(FORMATS, What):
        table.add_row(*row(name, what, texts, before.value))
    for name in SCALED_KV_FORMATS:
        table.add_row(*kv_row(name, texts, before.value))
    console.print(table)
    click.echo(f"\nof {before.tokens} tokens in {len(texts)} prompts")


if __name__ == "__main__":
    formats()
