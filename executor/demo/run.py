"""From a machine to tokens in four commands: profile, search, run, validate.

`python -m executor.demo.run` measures this machine with an emulated accelerator whose memory holds
less than half of the demo model, solves a policy for it, runs prompts through the model under that
policy, and lays the prediction beside the measurement.
"""

import json
import shlex
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any, Final

import click

from executor.demo import MODEL_DIR, PROMPTS
from executor.job.tokenizer import TextTokenizer
from hrm.acts.decode import POST_ATTENTION
from hrm.tasks import Phase
from hrm.trace import Trace, lane_chart, read_chrome_trace

GPU_MEMORY: Final = "5MB"  # the weights are 11.4 MB
LINK_BANDWIDTH: Final = "25MB/s"
MAX_TOKENS: Final = 32
SHOWN: Final = 3


def measured_lengths(prompts: Path, model: Path, count: int) -> tuple[float, int]:
    """Mean and greatest length in tokens of the first `count` prompts."""
    tokenizer = TextTokenizer.of_checkpoint(model)
    assert tokenizer is not None
    with prompts.open(encoding="utf-8") as lines:
        bodies = [json.loads(line)["body"] for line in islice(lines, count)]
    lengths = [len(tokenizer.encode(body["prompt"], add_special_tokens=True)) for body in bodies]
    return sum(lengths) / len(lengths), max(lengths)


def _from_here(path: Path) -> Path:
    """The path from the current folder, if it lies in it: shorter to read and to type."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def options(**given: object) -> list[str]:
    """Options of a command by their names and values."""
    return [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def call(program: str, *arguments: str) -> None:
    """Echo a command as the user would type it, run it, and end if it fails."""
    click.secho(f"\n$ {shlex.join([program, *arguments])}", bold=True)
    done = subprocess.run([sys.executable, "-m", program, *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def completions(output: Path, prompts: Path) -> list[tuple[str, str]]:
    """Prompts and their continuations, in the order of the prompts."""
    with prompts.open(encoding="utf-8") as lines:
        prompt_of = {line["custom_id"]: line["body"]["prompt"] for line in map(json.loads, lines)}
    pairs: list[tuple[str, str]] = []
    with output.open(encoding="utf-8") as lines:
        for line in map(json.loads, lines):
            if line["error"] is None:
                text = line["response"]["body"]["choices"][0]["text"]
                pairs.append((prompt_of[line["custom_id"]], text))
    order = list(prompt_of.values())
    return sorted(pairs, key=lambda pair: order.index(pair[0]))


def two_layers(trace: Trace, *, step: int, layer: int) -> Trace:
    """What all lanes did while `layer` and the next one were finished in a decode step."""
    decode = trace.of_phase(Phase.DECODE).spans
    begin_s, _, end_s = (
        max(
            span.end_s
            for span in decode
            if span.id.act is POST_ATTENTION and (span.id.step, span.id.layer) == (step, which)
        )
        for which in (layer - 1, layer, layer + 1)
    )
    return Trace(
        tuple(
            span._replace(start_s=max(span.start_s, begin_s), end_s=min(span.end_s, end_s))
            for span in decode
            if span.end_s > begin_s and span.start_s < end_s
        )
    )


@click.command()
@click.option(
    "--output-dir",
    default="demo-run",
    show_default=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Where all files go.",
)
@click.option("--gpu-memory", default=GPU_MEMORY, show_default=True)
@click.option("--link-bandwidth", default=LINK_BANDWIDTH, show_default=True)
@click.option("--requests", default=128, show_default=True, help="How many of the prompts.")
def demo(output_dir: Path, gpu_memory: str, link_bandwidth: str, requests: int) -> None:
    """Profile this machine, search a policy, run the demo model under it, and compare."""
    model, prompts = (_from_here(path) for path in (MODEL_DIR, PROMPTS))
    output_dir.mkdir(parents=True, exist_ok=True)
    profile, policy, run = (output_dir / name for name in ("machine.yaml", "policy.json", "run"))
    for name in ("outputs.jsonl", "run.json", "trace.json"):  # of an earlier demo
        (run / name).unlink(missing_ok=True)
    mean, longest = measured_lengths(prompts, model, requests)
    emulated = options(accelerator="emulated", gpu_memory=gpu_memory, link_bandwidth=link_bandwidth)
    measured = options(model=model, dtype="bfloat16")
    call("hrm", "profile", *emulated, *measured, "--quick", *options(out=profile))
    lengths = options(prompt_len=f"{mean:.1f}", max_prompt_len=longest, gen_len=MAX_TOKENS, requests=requests)
    call("hrm", "search", *options(model=model, profile=profile), *lengths, *options(ffn="gpu", out=policy))
    job = options(model=model, policy=policy, input=prompts, max_requests=requests, output_dir=run)
    call("executor", "run", *job)
    show(run, prompts)
    call("hrm", "validate", str(run))


def show(run: Path, prompts: Path) -> None:
    """Print a few completions and what the lanes did in one decode step."""
    click.secho("\ncompletions", bold=True)
    for prompt, text in completions(run / "outputs.jsonl", prompts)[:SHOWN]:
        click.echo(f"  {prompt} ▸" + click.style(text.rstrip(), fg="green"))
    content: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    layers = two_layers(read_chrome_trace(run / "trace.json"), step=5, layer=3)
    seconds = f"{layers.makespan_s * 1e3:.0f} ms"
    click.secho(f"\ntwo layers of a decode step ({seconds}), {content['accelerator']['description']}", bold=True)
    click.echo(lane_chart(layers))
    click.echo(
        "      W weight page in, A projections, Q queries, keys and values out, B attention,\n"
        "      H attention's output in, C rest of the layer with experts; small letters: briefly"
    )


if __name__ == "__main__":
    demo()
