"""`hrm profile`: measure this machine."""

import shlex
import sys
from pathlib import Path

import click

from hrm.cli.report import console
from hrm.errors import ProfileError
from hrm.machines import save_profile
from hrm.model_spec import load_model
from hrm.units import DTYPE_BYTES, parse_bandwidth, parse_bytes


@click.command()
@click.option(
    "--accelerator", default="auto", show_default=True, metavar="auto|cuda:K|emulated|cpu",
    help="What computes at the top level; auto is the first CUDA device, else the CPU alone.",
)  # fmt: skip
@click.option("--gpu-memory", metavar="16GB", help="Memory of the emulated accelerator, or a cap.")
@click.option("--link-bandwidth", metavar="2GB/s", help="Pace of the emulated accelerator's link.")
@click.option("--model", metavar="NAME-or-PATH", help="Measure GEMMs at this model's shapes.")
@click.option(
    "--dtype", "dtypes", type=click.Choice(list(DTYPE_BYTES)), multiple=True,
    help="Measure GEMMs in this dtype, and attention in the first [default: bfloat16, float16 and "
    "float32]; repeat it for more.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="Fewer sizes and samples; under a minute.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default="machine.yaml",
              show_default=True, help="The profile to write.")  # fmt: skip
def profile(
    accelerator: str, gpu_memory: str | None, link_bandwidth: str | None, model: str | None,
    dtypes: tuple[str, ...], quick: bool, out: Path,
) -> None:  # fmt: skip
    """Measure this machine into a hardware profile (YAML)."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from hrm.profiling.machine import DTYPES, ProfilingInterrupted, profile_machine

    if not out.parent.is_dir():
        raise ProfileError("--out", str(out), "must lie in an existing folder", "create it first")
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"),
        TimeElapsedColumn(), console=Console(stderr=True),
    )  # fmt: skip
    shown = bar.add_task("measuring", total=1.0, left="")

    def progress(done_s: float, total_s: float, text: str) -> None:
        left_s = max(total_s - done_s, 0.0)
        bar.start()  # with the first measurement: a mistake in the options shows no bar
        bar.update(
            shown, completed=done_s, total=max(total_s, 1e-9), description=text,
            left=f"about {left_s:.0f} s left",
        )  # fmt: skip

    try:
        measured = profile_machine(
            accelerator,
            gpu_memory_bytes=parse_bytes(gpu_memory, "--gpu-memory") if gpu_memory else None,
            link_bandwidth_bytes_per_s=(
                parse_bandwidth(link_bandwidth, "--link-bandwidth") if link_bandwidth else None
            ),
            quick=quick,
            dtypes=dtypes or DTYPES,
            model=load_model(model) if model else None,
            progress=progress,
            command=shlex.join(["hrm", *sys.argv[1:]]),
        )
    except ProfilingInterrupted as interrupted:
        if bar.live.is_started:
            bar.stop()
        click.echo(f"{interrupted}; nothing was written", err=True)
        sys.exit(130)
    finally:
        if bar.live.is_started:
            bar.stop()
    save_profile(out, measured)
    from hrm.cli.catalog import print_profile

    print_profile(measured)
    console.print(f"\nwritten to {out}")
