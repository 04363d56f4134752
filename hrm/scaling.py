"""The same machine with more or less of one resource, for sweeps and what-if questions.

A resource is one capacity, or all rates that one piece of hardware sets: twice the `cpu-bandwidth`
is reading, copying, decode attention and staging at twice the rate. Figures that were changed say
so: their source is `derived`, and their note ends with the factor.
"""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from enum import StrEnum

from hrm.errors import ProfileError
from hrm.hardware import Figure, HardwareProfile, Link, MemoryLevel, Rate, Source
from hrm.machines import with_memory


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

    @property
    def is_memory(self) -> bool:
        """Whether it is a capacity, in bytes."""
        return self.value.endswith("memory")

    @property
    def is_bandwidth(self) -> bool:
        """Whether it is a rate of moving data, in bytes a second."""
        return self.value.endswith("bandwidth")

    @property
    def column(self) -> str:
        """Its name in a table, with the unit: `cpu_memory_bytes`, `gpu_flops_per_s`."""
        name = self.value.replace("-", "_")
        if self.is_memory:
            return f"{name}_bytes"
        return f"{name}_bytes_per_s" if self.is_bandwidth else f"{name}_per_s"


def resources(profile: HardwareProfile) -> tuple[Resource, ...]:
    """The resources that a machine has: none of a GPU without one, no peer link for a lone GPU.

    Of unified memory and its GPU there is one each.
    """
    return tuple(resource for resource in Resource if not _missing(profile, resource))


def resource_value(
    profile: HardwareProfile, resource: Resource, *, dtype: str = "bfloat16"
) -> float:
    """How much of it plans are made with: bytes, bytes a second, or FLOP/s of GEMMs in `dtype`.

    Raises ProfileError if the machine does not have the resource, or no rate for `dtype`.
    """
    _require(profile, resource)
    match resource:
        case Resource.GPU_MEMORY | Resource.CPU_MEMORY:
            return _level(profile, resource).capacity_bytes.value
        case Resource.GPU_BANDWIDTH | Resource.CPU_BANDWIDTH:
            return _level(profile, resource).read_bytes_per_s.planned.value
        case Resource.GPU_FLOPS | Resource.CPU_FLOPS:
            return _level(profile, resource).processor.flops_per_s(dtype)
        case Resource.H2D_BANDWIDTH:
            return profile.h2d.bandwidth_bytes_per_s.planned.value
        case Resource.D2H_BANDWIDTH:
            return profile.d2h.bandwidth_bytes_per_s.planned.value
        case Resource.PEER_BANDWIDTH:
            peers = [link for link in profile.links if _sets(profile, resource, link)]
            return peers[0].bandwidth_bytes_per_s.planned.value


def scale(profile: HardwareProfile, resource: Resource, factor: float) -> HardwareProfile:
    """The machine with `factor` times as much of one resource, everything else as it was.

    Data sheet, ceiling and achieved figures, curves and spreads change alike; a memory's reserve
    grows with it. Latencies, caches and shares kept under contention stay.
    Raises ProfileError if the machine does not have the resource or the factor is impossible.
    """
    _require(profile, resource)
    if not (0 < factor < math.inf):
        raise ProfileError(
            resource.value, factor, "must be changed by a positive, finite factor", "give one"
        )

    def times(figure: Figure) -> Figure:
        note = f"times {factor:.6g}"
        return replace(
            figure,
            value=figure.value * factor,
            source=Source.DERIVED,
            note=f"{figure.note}; {note}" if figure.note else note,
            curve=tuple((size, value * factor) for size, value in figure.curve),
            p20=None if figure.p20 is None else figure.p20 * factor,
            p80=None if figure.p80 is None else figure.p80 * factor,
        )

    changed = _level(profile, resource)
    levels = tuple(
        _scale_level(level, resource, times) if level is changed else level
        for level in profile.levels
    )
    links = tuple(
        replace(link, bandwidth_bytes_per_s=_each(link.bandwidth_bytes_per_s, times))
        if _sets(profile, resource, link)
        else link
        for link in profile.links
    )
    return replace(profile, levels=levels, links=links)


def with_resource(
    profile: HardwareProfile, resource: Resource, value: float, *, dtype: str = "bfloat16"
) -> HardwareProfile:
    """The machine with this much of one resource, in the units of `resource_value`.

    Rates of other dtypes change in proportion. A memory is resized as by --gpu-memory and
    --cpu-memory, reserve included, and not scaled. Raises ProfileError as `scale` does.
    """
    now = resource_value(profile, resource, dtype=dtype)
    if not (0 < value < math.inf):
        raise ProfileError(resource.value, value, "must be positive and finite", "give another")
    if resource is Resource.GPU_MEMORY:
        return with_memory(profile, gpu_memory_bytes=value)
    if resource is Resource.CPU_MEMORY:
        return with_memory(profile, cpu_memory_bytes=value)
    return scale(profile, resource, value / now)


def _missing(profile: HardwareProfile, resource: Resource) -> str:
    """What the machine lacks to have the resource; empty if it has it."""
    if resource is Resource.PEER_BANDWIDTH:
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
            resource.value, "<missing>", f"{profile.name} {missing}",
            f"choose one of {', '.join(resources(profile))}, or another machine",
        )  # fmt: skip


def _level(profile: HardwareProfile, resource: Resource) -> MemoryLevel:
    return profile.host if resource.value.startswith("cpu-") else profile.top


def _scale_level(
    level: MemoryLevel, resource: Resource, times: Callable[[Figure], Figure]
) -> MemoryLevel:
    processor = level.processor
    match resource:
        case Resource.GPU_MEMORY | Resource.CPU_MEMORY:
            return replace(
                level,
                capacity_bytes=times(level.capacity_bytes),
                reserve_bytes=times(level.reserve_bytes),
                pinnable_bytes=None if level.pinnable_bytes is None
                else times(level.pinnable_bytes),
            )  # fmt: skip
        case Resource.GPU_BANDWIDTH | Resource.CPU_BANDWIDTH:
            attention = _each_of(processor.attention_bytes_per_s, times)
            return replace(
                level,
                read_bytes_per_s=_each(level.read_bytes_per_s, times),
                copy_bytes_per_s=_each_of(level.copy_bytes_per_s, times),
                shared_bytes_per_s=_each_of(level.shared_bytes_per_s, times),
                processor=replace(processor, attention_bytes_per_s=attention),
            )
        case Resource.GPU_FLOPS | Resource.CPU_FLOPS:
            rates = {d: _each(rate, times) for d, rate in processor.compute_flops_per_s.items()}
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


def _each(rate: Rate, times: Callable[[Figure], Figure]) -> Rate:
    named = {item.name: getattr(rate, item.name) for item in fields(rate)}
    return Rate(**{name: times(figure) for name, figure in named.items() if figure is not None})


def _each_of(rate: Rate | None, times: Callable[[Figure], Figure]) -> Rate | None:
    return None if rate is None else _each(rate, times)
