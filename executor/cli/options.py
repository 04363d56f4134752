"""Options that both commands have."""

from typing import TYPE_CHECKING

import click

from hrm.cli.params import together
from hrm.units import parse_bandwidth, parse_bytes

if TYPE_CHECKING:
    from executor.job.machine import AcceleratorOptions


def _asked_for(*, accelerator: str, gpu_memory: str | None, link_bandwidth: str | None) -> "AcceleratorOptions":
    """The accelerator that the options ask for; UnitError for a malformed size or rate."""
    from executor.job.machine import AcceleratorOptions

    return AcceleratorOptions(
        name=accelerator,
        gpu_memory_bytes=None if gpu_memory is None else parse_bytes(gpu_memory, "--gpu-memory"),
        link_bytes_per_s=None if link_bandwidth is None else parse_bandwidth(link_bandwidth, "--link-bandwidth"),
    )


accelerator_options = together(
    "accelerator",
    _asked_for,
    click.option(
        "--accelerator",
        default="auto",
        show_default=True,
        metavar="NAME",
        help="auto, emulated, cpu, cuda:K (of several GPUs the first, or all, as in cuda:0,2), or null (sleeps for the"
        " predicted time and answers nothing).",
    ),
    click.option("--gpu-memory", metavar="16GB", help="Memory of the accelerator to use."),
    click.option("--link-bandwidth", metavar="2GB/s", help="Pace of the emulated accelerator's link."),
)
