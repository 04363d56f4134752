"""`hrm profile`: measure this machine."""

import shlex
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hrm.cli.console import console
from hrm.cli.params import OUT_FILE
from hrm.cli.program import Interrupted
from hrm.contract.openmp import spin_briefly
from hrm.errors import ProfileError
from hrm.files import is_stream
from hrm.formats import FORMATS
from hrm.machines import save_profile
from hrm.model_spec import load_model
from hrm.units import counted, parse_bandwidth, parse_bytes

if TYPE_CHECKING:
    from hrm.profiling import ProfilingInterrupted


@click.command()
@click.option(
    "--accelerator",
    default="auto",
    show_default=True,
    metavar="auto|cuda:0|cuda:0,1|cuda:all|emulated|emulated:2|cpu",
    help="What computes at the top level: one CUDA device, several that plans use as one level, an "
    "accelerator emulated on half of the CPU's cores, several on a share of them each, or none; auto "
    "is the first CUDA device, or else the CPU alone.",
)
@click.option(
    "--gpu-memory", metavar="16GB", help="Memory of the emulated accelerator, or a cap on what all GPUs together hold."
)
@click.option("--link-bandwidth", metavar="2GB/s", help="What the emulated accelerator's link is paced to.")
@click.option(
    "--model",
    metavar="NAME-or-PATH",
    help="Measure GEMMs at the shapes of this model's experts, and attention with its heads; of a "
    "checkpoint folder, the disk is measured too.",
)
@click.option(
    "--dtype",
    "dtypes",
    type=click.Choice(list(FORMATS)),
    multiple=True,
    help="Measure GEMMs in this dtype, and attention in the first [default: bfloat16, float16 and "
    "float32]; repeat it for more.",
)
@click.option(
    "--disk",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Measure the disk under this folder: large files there are read, or a temporary one is "
    "written [default: the checkpoint's folder, or that of --out].",
)
@click.option("--quick", is_flag=True, help="Fewer sizes and samples: under a minute instead of about eight.")
@click.option("--resume", is_flag=True, help="Go on with what an interrupted measurement has left beside --out.")
@click.option("--out", type=OUT_FILE, default="machine.yaml", show_default=True, help="The profile to write.")
def profile(
    accelerator: str,
    gpu_memory: str | None,
    link_bandwidth: str | None,
    model: str | None,
    dtypes: tuple[str, ...],
    disk: Path | None,
    quick: bool,
    resume: bool,
    out: Path,
) -> None:
    """Measure this machine into a hardware profile (YAML).

    Measure at a quiet moment: others' work is in the figures, and the profile says how much of it
    there was. On Ctrl-C, what was measured is kept in a file beside --out for --resume; a profile
    that is not whole is never written.
    """
    from hrm.contract.host_kernels import installed_kernels
    from hrm.profiling import ProfileOptions, ProfilingInterrupted, partial_path, profile_machine
    from hrm.profiling.machine import DTYPES

    spin_briefly()
    if disk is not None and not disk.is_dir():
        raise ProfileError("--disk", str(disk), "must be an existing folder", "correct it")
    partial = None if is_stream(out) else partial_path(out)  # nothing lies beside a pipe
    left = None if partial is None else _left(partial, resume=resume)
    options = ProfileOptions(
        accelerator,
        gpu_memory_bytes=parse_bytes(gpu_memory, "--gpu-memory") if gpu_memory else None,
        link_bandwidth_bytes_per_s=parse_bandwidth(link_bandwidth, "--link-bandwidth") if link_bandwidth else None,
        quick=quick,
        dtypes=dtypes or DTYPES,
        model=load_model(model) if model else None,
        disk=disk or _folder_of_interest(model, out),
        kernels=installed_kernels(),
        partial=partial,
        resume=resume,
        command=shlex.join(["hrm", *sys.argv[1:]]),
    )
    try:
        with _progress(left) as progress:
            measured = profile_machine(options, save=lambda whole: save_profile(out, whole), progress=progress)
    except ProfilingInterrupted as interrupted:
        raise Interrupted(_interrupted(interrupted, partial, resume=resume)) from interrupted
    from hrm.cli.machine_table import print_profile

    print_profile(measured)
    console.print(f"\nwritten to {out}")


@contextmanager
def _progress(left_before: str | None) -> Generator[Callable[[float, float, str], None]]:
    """A bar of the seconds done and those in all, drawn when it is told of them, below what was left by others.

    That is between measurements only: one that moves by itself would disturb them. It is there from the first
    measurement on, so that a mistake in the options shows none.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[left]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        auto_refresh=False,
    )
    shown = bar.add_task("measuring", total=1.0, left="")

    def draw(done_s: float, total_s: float, text: str) -> None:
        if not bar.live.is_started:
            if left_before is not None:
                click.echo(left_before, err=True)
            bar.start()
        left = f"about {max(total_s - done_s, 0.0):.0f} s left"
        total_s = max(total_s, 1e-9)
        bar.update(shown, completed=done_s, total=total_s, description=text, left=left, refresh=True)

    try:
        yield draw
    finally:
        if bar.live.is_started:
            bar.stop()


def _left(partial: Path, *, resume: bool) -> str | None:
    """Whether what an interrupted measurement has left is used, if there is anything to say of it."""
    if not partial.exists():
        return f"there is no {partial}: measuring from the start" if resume else None
    return f"going on with {partial}" if resume else f"measuring afresh; --resume would have gone on with {partial}"


def _folder_of_interest(model: str | None, out: Path) -> Path:
    """Where weights will be read from: the checkpoint's folder if there is one, or else --out's."""
    if model is not None and Path(model).is_dir():
        return Path(model)
    return Path() if is_stream(out) else out.parent


def _interrupted(interrupted: "ProfilingInterrupted", partial: Path | None, *, resume: bool) -> str:
    """What was kept, and the command that goes on."""
    done, lost = len(interrupted.measured), len(interrupted.lost)
    if not done or partial is None:
        return "interrupted; nothing was measured or written"
    again = shlex.join(["hrm", *sys.argv[1:], *([] if resume else ["--resume"])])
    return (
        f"interrupted; {done} of {counted(done + lost, 'measurement')} kept in {partial}, no"
        f" profile written; go on with: {again}"
    )
