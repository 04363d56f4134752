"""The same machine with more or less of one resource, for sweeps and what-if questions.

A resource is one capacity, or all rates that one piece of hardware sets: twice the `cpu-bandwidth`
is reading, copying, decode attention and staging at twice the rate. A latency is what one kernel or
one transfer costs however small it is, that of requests attended to one by one included. Figures
that were changed say so: their source is `derived`, and their note ends with the factor; or it is
`given`, where the user said how much there is.
"""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from typing import Final

from hrm.errors import ProfileError
from hrm.gpus import each_gpu
from hrm.hardware import Figure, HardwareProfile, Link, MemoryLevel, Rate, Source
from hrm.machines import with_memory
from hrm.units import (
    KIB,
    LARGEST,
    format_bandwidth,
    format_bytes,
    format_flops,
    format_seconds,
    parse_bandwidth,
    parse_bytes,
    parse_flops,
    parse_seconds,
)

# Of what is given; of rates, ten times as much is still within `LARGEST`.
_LEAST_BYTES: Final = 4 * KIB  # of each GPU
_MOST_BYTES_PER_S: Final = 1e15
_MOST_FLOPS_PER_S: Final = 1e17
_MOST_LATENCY_S: Final = 3600.0


class Resource(StrEnum):
    """What a machine may have more of."""

    GPU_MEMORY = "gpu-memory"
    GPU_BANDWIDTH = "gpu-bandwidth"
    GPU_FLOPS = "gpu-flops"
    CPU_MEMORY = "cpu-memory"
    CPU_BANDWIDTH = "cpu-bandwidth"
    CPU_FLOPS = "cpu-flops"
    H2D_BANDWIDTH = "h2d-bandwidth"
    D2H_BANDWIDTH = "d2h-bandwidth"
    PEER_BANDWIDTH = "peer-bandwidth"
    GPU_LAUNCH_LATENCY = "gpu-launch-latency"
    CPU_LAUNCH_LATENCY = "cpu-launch-latency"
    LINK_LATENCY = "link-latency"
    PEER_LATENCY = "peer-latency"

    @property
    def is_memory(self) -> bool:
        """Whether it is a capacity, in bytes."""
        return self.value.endswith("memory")

    @property
    def is_bandwidth(self) -> bool:
        """Whether it is a rate of moving data, in bytes a second."""
        return self.value.endswith("bandwidth")

    @property
    def is_latency(self) -> bool:
        """Whether it is a duration, in seconds, of which less is better."""
        return self.value.endswith("latency")

    @property
    def grows_with_gpus(self) -> bool:
        """Whether a machine with more GPUs has more of it."""
        return self.value.startswith(("gpu-", "h2d-", "d2h-")) and not self.is_latency

    @property
    def column(self) -> str:
        """Its name in a table, with the unit: `cpu_memory_bytes`, `gpu_flops_per_s`."""
        name = self.value.replace("-", "_")
        if self.is_latency:
            return f"{name}_s"
        if self.is_memory:
            return f"{name}_bytes"
        return f"{name}_bytes_per_s" if self.is_bandwidth else f"{name}_per_s"

    def least_and_most(self, num_gpus: int) -> tuple[float, float]:
        """How much of it a machine may be given; of memory at least a page for each GPU."""
        if self.is_memory:
            return float(num_gpus * _LEAST_BYTES), LARGEST
        if self.is_latency:
            return 0.0, _MOST_LATENCY_S
        return 1.0, _MOST_BYTES_PER_S if self.is_bandwidth else _MOST_FLOPS_PER_S

    def read(self, text: str, where: str) -> float:
        """An amount of it as people write it: `64GB`, `12GB/s`, `65TFLOP/s`, `5us`; UnitError naming `where`."""
        if self.is_memory:
            return float(parse_bytes(text, where))
        if self.is_latency:
            return parse_seconds(text, where, is_latency=True)
        return parse_bandwidth(text, where) if self.is_bandwidth else parse_flops(text, where)

    def show(self, amount: float) -> str:
        """So much of it, with its unit: `24.0 GB/s`."""
        if self.is_memory:
            return format_bytes(amount)
        if self.is_latency:
            return format_seconds(amount)
        return format_bandwidth(amount) if self.is_bandwidth else format_flops(amount)


def resources(profile: HardwareProfile) -> tuple[Resource, ...]:
    """The resources that a machine has: none of a GPU without one, no peer link for a lone GPU.

    Of unified memory and its GPU there is one each.
    """
    return tuple(resource for resource in Resource if not _missing(profile, resource))


def resource_value(profile: HardwareProfile, resource: Resource, *, dtype: str = "bfloat16") -> float:
    """How much of it plans are made with: bytes, bytes a second, GEMM FLOP/s in `dtype`, seconds.

    Raises ProfileError if the machine does not have the resource, or no rate for `dtype`.
    """
    _require(profile, resource)
    if resource in {Resource.GPU_FLOPS, Resource.CPU_FLOPS}:
        return _level(profile, resource).processor.flops_per_s(dtype)
    return _figures(profile, resource)[0].value


def scale(profile: HardwareProfile, resource: Resource, factor: float, *, given: str = "") -> HardwareProfile:
    """The machine with `factor` times as much of one resource, everything else as it was.

    Data sheet, ceiling and achieved figures, curves and spreads change alike; a memory's reserve
    grows with it. Caches stay, and latencies unless they are asked
    for. With `given`, the user's words for it, only the planned figure of every rate is left, and
    it says that it was given.
    Raises ProfileError if the machine does not have the resource or the factor is impossible.
    """
    _require(profile, resource)
    if not (0 < factor < math.inf):
        raise ProfileError(resource.value, factor, "must be changed by a positive, finite factor", "give one")

    def times(figure: Figure) -> Figure:
        product = figure.times(factor, note=f"times {factor:.6g}", source=Source.DERIVED)
        if not given:
            return product
        note = f"given on the command line: {given}"
        return Figure(value=product.value, source=Source.GIVEN, note=note, curve=product.curve)

    if resource.is_latency:
        with _told_of(resource, f"<times {factor:.3g}>"):
            return _with_latency(profile, resource, times)

    def each(rate: Rate) -> Rate:
        return Rate(achieved=times(rate.planned)) if given else rate.each(times)

    changed = _level(profile, resource)
    levels = tuple(
        _scale_level(level, resource, times, each) if level is changed else level for level in profile.levels
    )
    links = tuple(
        replace(link, bandwidth_bytes_per_s=each(link.bandwidth_bytes_per_s))
        if _sets(profile, resource, link)
        else link
        for link in profile.links
    )
    with _told_of(resource, f"<times {factor:.3g}>"):
        gpus = each_gpu(profile, lambda gpu: scale(gpu, resource, factor, given=given))
        return replace(profile, levels=levels, links=links, gpus=gpus)


def at_cost(profile: HardwareProfile, resource: Resource, factor: float) -> HardwareProfile:
    """The machine where what is spent on the resource takes `factor` times as long.

    A factor below 1 is a higher rate, or a lower latency; a memory is scaled by its inverse too.
    Raises ProfileError as `scale` does.
    """
    return scale(profile, resource, factor if resource.is_latency else 1 / factor)


def with_resource(
    profile: HardwareProfile, resource: Resource, value: float, *, dtype: str = "bfloat16", given: str = ""
) -> HardwareProfile:
    """The machine with this much of one resource, in the units of `resource_value`.

    Rates of other dtypes change in proportion. A memory is resized as by --gpu-memory and
    --cpu-memory, reserve included, and not scaled. `given` is as for `scale`. Raises ProfileError as `scale` does,
    and for an amount that is not between those of `Resource.least_and_most`.
    """
    now = resource_value(profile, resource, dtype=dtype)
    is_none = resource.is_latency and value == 0
    least, most = resource.least_and_most(profile.num_gpus)
    if not (is_none or least <= value <= most):
        rule = f"must lie between {resource.show(least)} and {resource.show(most)}"
        raise ProfileError(resource.value, f"<{resource.show(value)}>", rule, "give another")
    if is_none or (resource.is_latency and now == 0):
        return _with_latency(profile, resource, lambda figure: replace(figure, value=value))
    if resource.is_latency and given:
        return _with_latency(profile, resource, lambda _: Figure(value=value, source=Source.GIVEN, note=given))
    if resource is Resource.GPU_MEMORY:
        return with_memory(profile, gpu_memory_bytes=value)
    if resource is Resource.CPU_MEMORY:
        return with_memory(profile, cpu_memory_bytes=value)
    return scale(profile, resource, value / now, given=given)


@contextmanager
def _told_of(resource: Resource, factor: str) -> Generator[None]:
    """Tell a figure that no machine can have by the resource that was changed, and not by where it stands."""
    try:
        yield
    except ProfileError as error:
        rule = f"gives the machine a figure that {error.rule}"
        raise ProfileError(resource.value, factor, rule, "change it less") from error


def given_resources(profile: HardwareProfile) -> dict[Resource, float]:
    """What the user gave of the machine, and how much, in the units of `resource_value`.

    Of compute, it is the rate of the machine's default dtype.
    """
    given: dict[Resource, float] = {}
    for resource in resources(profile):
        figures = _figures(profile, resource)
        if any(figure.source is Source.GIVEN for figure in figures):
            given[resource] = resource_value(profile, resource, dtype=profile.default_dtype)
    return given


def _figures(profile: HardwareProfile, resource: Resource) -> list[Figure]:
    """The figures that say how much of it there is, that of plans first; of compute, those of every dtype."""
    match resource:
        case Resource.GPU_MEMORY | Resource.CPU_MEMORY:
            return [_level(profile, resource).capacity_bytes]
        case Resource.GPU_BANDWIDTH | Resource.CPU_BANDWIDTH:
            return [_level(profile, resource).read_bytes_per_s.planned]
        case Resource.GPU_FLOPS | Resource.CPU_FLOPS:
            rates = _level(profile, resource).processor.compute_flops_per_s.values()
            return [rate.planned for rate in rates]
        case Resource.H2D_BANDWIDTH:
            first = profile.h2d
        case Resource.D2H_BANDWIDTH:
            first = profile.d2h
        case Resource.PEER_BANDWIDTH:
            first = profile.peer
        case Resource.GPU_LAUNCH_LATENCY | Resource.CPU_LAUNCH_LATENCY:
            return [_level(profile, resource).processor.launch_latency_s]
        case Resource.LINK_LATENCY:
            return [profile.h2d.latency_s]
        case Resource.PEER_LATENCY:
            return [profile.peer.latency_s]
    links = [first, *(link for link in profile.links if _sets(profile, resource, link))]
    return [link.bandwidth_bytes_per_s.planned for link in links]


def _with_latency(profile: HardwareProfile, resource: Resource, change: Callable[[Figure], Figure]) -> HardwareProfile:
    """The machine with each latency of the resource changed."""

    def of_level(level: MemoryLevel) -> MemoryLevel:
        processor = level.processor
        request = processor.attention_request_s
        return replace(
            level,
            processor=replace(
                processor,
                launch_latency_s=change(processor.launch_latency_s),
                attention_request_s=None if request is None else change(request),
            ),
        )

    launches = resource in {Resource.GPU_LAUNCH_LATENCY, Resource.CPU_LAUNCH_LATENCY}
    changed = _level(profile, resource) if launches else None
    levels = tuple(of_level(level) if level is changed else level for level in profile.levels)
    links = tuple(
        replace(link, latency_s=change(link.latency_s))
        if not launches and (link.kind == "peer") == (resource is Resource.PEER_LATENCY)
        else link
        for link in profile.links
    )
    gpus = each_gpu(profile, lambda gpu: _with_latency(gpu, resource, change))
    return replace(profile, levels=levels, links=links, gpus=gpus)


def _missing(profile: HardwareProfile, resource: Resource) -> str:
    """What the machine lacks to have the resource; empty if it has it."""
    if resource in {Resource.PEER_BANDWIDTH, Resource.PEER_LATENCY}:
        has_peer = any(link.kind == "peer" for link in profile.links)
        return "" if has_peer else "has no link between GPUs"
    if profile.unified_memory:
        of_gpu = resource.value.startswith("gpu-")
        return "" if of_gpu else "has unified memory, in which its GPU does everything"
    of_host = resource.value.startswith("cpu-")
    return "" if of_host or profile.has_accelerator else "has no GPU level"


def _require(profile: HardwareProfile, resource: Resource) -> None:
    missing = _missing(profile, resource)
    if missing:
        raise ProfileError(
            resource.value,
            "<missing>",
            f"{profile.name} {missing}",
            f"choose one of {', '.join(resources(profile))}, or another machine",
        )


def _level(profile: HardwareProfile, resource: Resource) -> MemoryLevel:
    return profile.host if resource.value.startswith("cpu-") else profile.top


def _scale_level(
    level: MemoryLevel, resource: Resource, times: Callable[[Figure], Figure], each: Callable[[Rate], Rate]
) -> MemoryLevel:
    def each_of(rate: Rate | None) -> Rate | None:
        return None if rate is None else each(rate)

    processor = level.processor
    match resource:
        case Resource.GPU_MEMORY | Resource.CPU_MEMORY:
            return replace(
                level,
                capacity_bytes=times(level.capacity_bytes),
                reserve_bytes=times(level.reserve_bytes),
                pinnable_bytes=None if level.pinnable_bytes is None else times(level.pinnable_bytes),
            )
        case Resource.GPU_BANDWIDTH | Resource.CPU_BANDWIDTH:
            attention = each_of(processor.attention_bytes_per_s)
            return replace(
                level,
                read_bytes_per_s=each(level.read_bytes_per_s),
                copy_bytes_per_s=each_of(level.copy_bytes_per_s),
                shared_bytes_per_s=each_of(level.shared_bytes_per_s),
                processor=replace(processor, attention_bytes_per_s=attention),
            )
        case Resource.GPU_FLOPS | Resource.CPU_FLOPS:
            rates = {dtype: each(rate) for dtype, rate in processor.compute_flops_per_s.items()}
            return replace(level, processor=replace(processor, compute_flops_per_s=rates))
        case _:
            return level


def _sets(profile: HardwareProfile, resource: Resource, link: Link) -> bool:
    """Whether the resource sets that link's bandwidth; one GPU's own link counts as the GPUs'."""
    host = profile.host.name
    match resource:
        case Resource.CPU_BANDWIDTH:
            return link.kind == "staging"
        case Resource.H2D_BANDWIDTH:
            return link.kind != "peer" and link.source == host and link.target != host
        case Resource.D2H_BANDWIDTH:
            return link.kind != "peer" and link.source != host and link.target == host
        case Resource.PEER_BANDWIDTH:
            return link.kind == "peer"
        case _:
            return False


def paced(profile: HardwareProfile, h2d_bytes_per_s: float | None, d2h_bytes_per_s: float | None) -> HardwareProfile:
    """The machine with its pinned links at the pace that a run's links were held to, where they were."""
    if not profile.has_accelerator or h2d_bytes_per_s is None:
        return profile
    host, top = profile.host.name, profile.top.name
    paces = {(host, top): h2d_bytes_per_s, (top, host): d2h_bytes_per_s}

    def at_pace(link: Link) -> Link:
        pace = paces.get((link.source, link.target))
        if link.kind != "pinned" or pace is None:
            return link
        figure = replace(link.bandwidth_bytes_per_s.planned, value=pace, curve=())
        return replace(link, bandwidth_bytes_per_s=replace(link.bandwidth_bytes_per_s, achieved=figure))

    return replace(profile, links=tuple(map(at_pace, profile.links)))
