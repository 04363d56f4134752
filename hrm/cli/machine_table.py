"""Machines as tables: every figure with its spread, its curve and where it came from."""

from collections.abc import Callable, Sequence

from rich.table import Table

from hrm.cli.console import as_is, console, plain_table
from hrm.hardware import (
    NOISY_SPREAD,
    Disk,
    Figure,
    GpuCard,
    HardwareProfile,
    Host,
    LaneThreads,
    Link,
    MemoryLevel,
    Rate,
    Source,
)
from hrm.profile_diff import figures_of
from hrm.units import counted, format_bandwidth, format_bytes, format_flops, format_seconds

Show = Callable[[float], str]


def print_profile(profile: HardwareProfile) -> None:
    """Print a machine with every figure and its source."""
    gpus = f", {profile.num_gpus} GPUs as one level" if profile.num_gpus > 1 else ""
    unified = ", unified memory of GPU and CPU" if profile.unified_memory else ""
    console.print(f"[bold]{as_is(profile.name)}[/] ({profile.accelerator}{gpus}{unified})")
    alike = 1 if profile.gpus else profile.num_gpus
    _print_levels(profile.levels, profile.disk, lane_threads=profile.lane_threads, alike=alike)
    if profile.links:
        _print_links(profile.links)
    for index, card in enumerate(profile.gpus):
        console.print(f"[bold]GPU {index}[/]  {as_is(card.name)}")
        _print_levels([card.level])
        _print_links([card.h2d, card.d2h, card.peer])
    _print_limits(profile)
    if any(figure.p20 is not None for figure in figures_of(profile).values()):
        console.print(f"[dim]spread: from the 20th to the 80th percentile; ! marks more than {NOISY_SPREAD:.0%}[/]")
    for key, value in profile.environment.items():
        if key != "warnings":
            console.print(f"[dim]{as_is(key)}: {as_is(value)}[/]")
    warnings = profile.environment.get("warnings")
    if warnings:
        console.print(f"[yellow]warnings: {as_is(warnings)}[/]")


def _print_limits(profile: HardwareProfile) -> None:
    """Say which links something else than themselves limits."""
    own = [(f"GPU {index}, ", link) for index, card in enumerate(profile.gpus) for link in (card.h2d, card.d2h)]
    for whose, link in [*(("", link) for link in profile.links), *own]:
        planned = link.bandwidth_bytes_per_s.planned
        if planned.source is Source.DERIVED and planned.note:
            console.print(f"[dim]{whose}{link.source} → {link.target}: {as_is(planned.note)}[/]")


def print_card(card: GpuCard) -> None:
    """Print one GPU of the catalog and its links."""
    console.print(f"[bold]{as_is(card.name)}[/] (usually in {as_is(card.default_host)})")
    _print_levels([card.level])
    _print_links([card.h2d, card.d2h, card.peer])


def print_host(host: Host) -> None:
    """Print one host of the catalog."""
    console.print(f"[bold]{as_is(host.name)}[/] (takes up to {counted(host.max_gpus, 'GPU')})")
    _print_levels([host.level], root_ports=host.root_port_bytes_per_s)
    _print_links([host.staging])
    for shared in host.shared_links:
        gpus, most = ", ".join(map(str, shared.gpus)), shared.bandwidth_bytes_per_s.planned
        console.print(f"GPUs {gpus} share a link of {format_bandwidth(most.value)} ({most.source})")


def _print_levels(
    levels: Sequence[MemoryLevel],
    disk: Disk | None = None,
    root_ports: Rate | None = None,
    *,
    lane_threads: LaneThreads | None = None,
    alike: int = 1,
) -> None:
    """All levels; so many processors like the one that it names are behind the first."""
    table = _table("level", "planned with")
    for level in levels:
        several = f"{alike} x " if alike > 1 and level is levels[0] else ""
        table.add_row(f"[bold]{level.name}[/]  {several}{as_is(level.processor.name)}")
        _add_figure(table, "capacity", level.capacity_bytes, format_bytes)
        _add_figure(table, "reserve", level.reserve_bytes, format_bytes)
        if level.pinnable_bytes is not None:
            _add_figure(table, "can be pinned", level.pinnable_bytes, format_bytes)
        rates = {
            "read": level.read_bytes_per_s,
            "copy": level.copy_bytes_per_s,
            "shared by all at once": level.shared_bytes_per_s,
            **{
                f"{as_is(cache.name)} read, {format_bytes(cache.capacity_bytes.value)} in all": (cache.read_bytes_per_s)
                for cache in level.caches
            },
            "decode attention": level.processor.attention_bytes_per_s,
        }
        for what, rate in rates.items():
            if rate is not None:
                unit = "tokens" if what == "decode attention" else ""
                _add_rate(table, (f"  {what}",), rate, format_bandwidth, unit)
        for dtype, rate in level.processor.compute_flops_per_s.items():
            _add_rate(table, (f"  {as_is(dtype)}",), rate, format_flops, "tokens")
        _add_figure(table, "launch latency", level.processor.launch_latency_s, format_seconds)
    if lane_threads is not None:
        _add_figure(table, "running a task, of a core", lane_threads.task_s, format_seconds)
    if root_ports is not None:
        _add_rate(table, ("  root ports of all GPUs",), root_ports, format_bandwidth)
    if disk is not None:
        table.add_row(f"[bold]disk[/]  {as_is(disk.path)}")
        _add_figure(table, "capacity", disk.capacity_bytes, format_bytes)
        _add_rate(table, ("  read",), disk.read_bytes_per_s, format_bandwidth)
    console.print(table)


def _print_links(links: Sequence[Link]) -> None:
    table = _table("link", "bandwidth", "latency")
    for link in links:
        head = f"{link.source} → {link.target}  {link.kind}"
        latency = format_seconds(link.latency_s.value)
        _add_rate(table, (head, latency), link.bandwidth_bytes_per_s, format_bandwidth)
    console.print(table)


def _table(first: str, value: str, second: str = "") -> Table:
    """A table of rates with the columns that all of them have."""
    columns = [first, *([second] if second else [])]
    return plain_table(*columns, "data sheet", "ceiling", value, "spread", "curve over", "source")


def _add_rate(table: Table, head: tuple[str, ...], rate: Rate, show: Show, unit: str = "") -> None:
    on_paper, ceiling = (show(figure.value) if figure is not None else "–" for figure in (rate.datasheet, rate.ceiling))
    planned = rate.planned
    table.add_row(
        *head,
        on_paper,
        ceiling,
        show(planned.value),
        spread_text(planned),
        _curve_text(planned, unit),
        planned.source.value,
    )


def _add_figure(table: Table, name: str, figure: Figure, show: Show) -> None:
    shown = show(figure.value)
    table.add_row(f"  {name}", "", "", shown, spread_text(figure), "", figure.source.value)


def spread_text(figure: Figure) -> str:
    """The 20th and the 80th percentile beside the value, `-0.4% +1.2%`; `!` marks noisy ones."""
    if figure.p20 is None or figure.p80 is None or figure.value == 0:
        return ""
    low, high = figure.p20 / figure.value - 1, figure.p80 / figure.value - 1
    text = f"{low:+.1%} {high:+.1%}" if high - low < 1 else f"{low:+.0%} {high:+.0%}"
    return f"[yellow]{text} ![/]" if figure.is_noisy else text


def _curve_text(figure: Figure, unit: str) -> str:
    if not figure.curve:
        return ""
    first, last = figure.curve[0][0], figure.curve[-1][0]
    if unit:
        return f"{first:.0f} to {last:.0f} {unit}"
    return f"{format_bytes(first)} to {format_bytes(last)}"
