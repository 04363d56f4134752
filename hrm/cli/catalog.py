"""`hrm profiles`: the machines that are known without measuring."""

from typing import Any

import click
from rich.table import Table

from hrm.cli.options import MachineChoice
from hrm.cli.report import console, print_json
from hrm.hardware import HardwareProfile, MemoryLevel, Rate
from hrm.machines import compose, list_files, load_gpu, load_host, load_profile
from hrm.units import format_bandwidth, format_bytes, format_flops, format_seconds

_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")


@click.command()
@click.argument("name", required=False)
@_json
def profiles(name: str | None, as_json: bool) -> None:
    """List the known GPUs, hosts and machines, or show NAME (4xT4, L4, a host, or a file)."""
    if name is None:
        files = list_files()
        named = {"gpus": files.gpus, "hosts": files.hosts, "machines": files.machines}
        if as_json:
            print_json({kind: list(names) for kind, names in named.items()})
            return
        for kind, names in named.items():
            console.print(f"[bold]{kind}[/]  {', '.join(names) or '–'}")
        return
    machine = _machine(name)
    if as_json:
        print_json({"profile": machine})
        return
    if isinstance(machine, HardwareProfile):
        print_profile(machine)
    else:
        _print_levels([machine])


def _machine(name: str) -> HardwareProfile | MemoryLevel:
    known = list_files()
    if name in known.hosts:
        return load_host(name).level
    if name in known.machines or name.endswith((".yaml", ".yml")):
        return load_profile(name)
    if name[:1].isdigit() and "x" in name.lower():
        return compose(name)
    if name.lower() in (gpu.lower() for gpu in known.gpus):
        return load_gpu(name).level
    return MachineChoice(profile=name).machine()


def print_profile(profile: HardwareProfile) -> None:
    """Print a machine with every figure and its source."""
    console.print(f"[bold]{profile.name}[/] ({profile.accelerator})")
    _print_levels(list(profile.levels))
    if profile.links:
        _print_links(profile)
    for key, value in profile.environment.items():
        console.print(f"[dim]{key}: {value}[/]")


def _print_links(profile: HardwareProfile) -> None:
    table = Table("link", "kind", "latency", "bandwidth", "source", box=None, pad_edge=False)
    for link in profile.links:
        bandwidth = link.bandwidth_bytes_per_s
        table.add_row(
            f"{link.source} → {link.target}",
            link.kind,
            format_seconds(link.latency_s.value),
            format_bandwidth(bandwidth.at()),
            bandwidth.planned.source.value,
        )
    console.print(table)


def _print_levels(levels: list[MemoryLevel]) -> None:
    table = Table(
        "level", "processor", "figure", "data sheet", "ceiling", "planned with", "source",
        box=None, pad_edge=False,
    )  # fmt: skip
    for level in levels:
        table.add_row(
            level.name, level.processor.name, "capacity", "", "",
            format_bytes(level.capacity_bytes.value), level.capacity_bytes.source.value,
        )  # fmt: skip
        _add_rate(table, "read", level.read_bytes_per_s, format_bandwidth)
        for dtype, rate in level.processor.compute_flops_per_s.items():
            _add_rate(table, dtype, rate, format_flops)
        if level.processor.attention_bytes_per_s is not None:
            _add_rate(
                table, "decode attention", level.processor.attention_bytes_per_s, format_bandwidth
            )
        latency = level.processor.launch_latency_s
        table.add_row(
            "", "", "launch latency", "", "", format_seconds(latency.value), latency.source.value
        )
    console.print(table)


def _add_rate(table: Table, name: str, rate: Rate, show: Any) -> None:
    on_paper, ceiling = (
        show(figure.value) if figure is not None else "–"
        for figure in (rate.datasheet, rate.ceiling)
    )
    planned = rate.planned
    table.add_row("", "", name, on_paper, ceiling, show(planned.value), planned.source.value)
