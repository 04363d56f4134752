"""Options that several commands share."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from hrm.units import parse_bandwidth, parse_bytes

if TYPE_CHECKING:
    from executor.job.machine import AcceleratorOptions


def accelerator_arguments(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --accelerator, --gpu-memory and --link-bandwidth; see `accelerator_options`."""
    for option in (
        click.option("--link-bandwidth", metavar="2GB/s", help="Pace of the emulated accelerator's link."),
        click.option("--gpu-memory", metavar="16GB", help="Memory of the accelerator to use."),
        click.option(
            "--accelerator",
            default="auto",
            show_default=True,
            metavar="NAME",
            help="auto, emulated, cpu, cuda:K, or null (sleeps for the predicted time).",
        ),
    ):
        command = option(command)
    return command


def accelerator_options(accelerator: str, gpu_memory: str | None, link_bandwidth: str | None) -> "AcceleratorOptions":
    """What `accelerator_arguments` were given; UnitError for a malformed size or rate."""
    from executor.job.machine import AcceleratorOptions

    return AcceleratorOptions(
        name=accelerator,
        gpu_memory_bytes=parse_bytes(gpu_memory, "--gpu-memory") if gpu_memory else None,
        link_bytes_per_s=(parse_bandwidth(link_bandwidth, "--link-bandwidth") if link_bandwidth else None),
    )
