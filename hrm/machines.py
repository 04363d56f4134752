"""Machines from files: one YAML file per GPU, host or whole machine, and how they compose.

`4xT4` is a GPU file, a count and a host. What GPUs bring adds up: memory, bandwidth, compute and
links, the links up to what the host's memory can be read at. A host alone is a machine without
GPUs, and a chip with unified memory is a whole machine by itself.
"""

import math
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from hrm.catalog import Part, find_file, is_path, kind_of, kind_words
from hrm.decoding import read_yaml, reads_as_text
from hrm.errors import ProfileError
from hrm.files import is_file, write_whole
from hrm.hardware import Figure, GpuCard, HardwareProfile, Host, Link, MemoryLevel, Rate, Source
from hrm.strict import decode_strictly
from hrm.units import format_bandwidth

MAX_RESERVE_SHARE: Final = 0.05  # of a capacity given by the user, who knows what is free

_T = TypeVar("_T")
_GPUS: Final = re.compile(r"\s*(?:(\d{1,9})\s*[x×]\s*)?(\S(?:.*\S)?)\s*", re.IGNORECASE)


def load_profile(name_or_path: str | Path) -> HardwareProfile:
    """Read a machine from a YAML file, or one that comes with hrm by its name.

    Raises ProfileError naming the file and field if there is none or it is malformed.
    """
    name = str(name_or_path)
    if isinstance(name_or_path, Path) or is_path(name) or is_file(Path(name)):
        return _read("--profile", Path(name_or_path), HardwareProfile)
    return _read("--profile", find_file("--profile", name, ("machines",)), HardwareProfile)


def load_gpu(name: str) -> GpuCard:
    """A GPU from a YAML file, or by its name: `RTX 4090`, `rtx4090` and `4090` are the same.

    Raises ProfileError if there is no such GPU.
    """
    return _load("--gpus", "gpus", name, GpuCard)


def load_host(name: str) -> Host:
    """A host from a YAML file, or by its name, whatever the case; ProfileError if there is none."""
    return _load("--host", "hosts", name, Host)


def load_any(name: str, flag: str = "hrm profiles") -> Part:
    """A GPU, host or machine of the catalog by its name, or what a YAML file holds.

    Raises ProfileError naming `flag` if there is none.
    """
    path = Path(name) if is_path(name) else find_file(flag, name)
    plain = _parse(path)
    return decode_strictly(plain, kind_of(plain) or HardwareProfile, str(path))


def parse_gpus(gpus: str) -> tuple[int, str]:
    """The count and the name of `4xT4`; ProfileError if there is none, or the count is 0."""
    match = _GPUS.fullmatch(gpus)
    if match is None or int(match[1] or 1) < 1:
        raise ProfileError(
            "--gpus",
            gpus,
            "must be a GPU or a count of at least 1 and a GPU",
            "write it like 4xT4; --host alone is a machine without GPUs",
        )
    return int(match[1] or 1), match[2]


def compose(gpus: str, host: str | None = None) -> HardwareProfile:
    """A machine of `4xT4` (or `T4`) in `host`, or else in the host that the GPU's file names.

    A GPU of one's own is a YAML file, `2x./mine.yaml`, and so is a host. Whole machines, such as
    those with unified memory, are named alike. Raises ProfileError if there is no such GPU or host,
    or the host does not take that many.
    """
    count, name = parse_gpus(gpus)
    path = Path(name) if is_path(name) else find_file("--gpus", name, ("gpus", "machines"))
    found = _read("--gpus", path, GpuCard, HardwareProfile)
    if isinstance(found, GpuCard):
        return assemble(found, count, _usual_host(found, path) if host is None else load_host(host))
    if count > 1:
        raise ProfileError(
            "--gpus", gpus, f"{found.name} is a whole machine, and plans are for one", "leave out the count"
        )
    if host is not None:
        raise ProfileError("--host", host, f"goes with GPUs, and {found.name} is a whole machine", "leave it out")
    return found


def _usual_host(card: GpuCard, path: Path) -> Host:
    where = f"{path}: default_host"
    return _read(where, find_file(where, card.default_host, ("hosts",)), Host)


def without_gpus(host: Host) -> HardwareProfile:
    """The host as a machine of one level, on which the CPU does everything."""
    return HardwareProfile(name=host.name, accelerator="catalog", levels=(host.level,))


def assemble(card: GpuCard, count: int, machine: Host) -> HardwareProfile:
    """A machine of `count` equal GPUs in a host.

    Memory, bandwidth, compute and links of the GPUs add up; the links together are no faster than
    the host's memory is read and than its root ports. Raises ProfileError if the host does not take
    that many GPUs.
    """
    if count > machine.max_gpus:
        raise ProfileError(
            "--gpus",
            f"{count}x{card.name}",
            f"{machine.name} takes at most {machine.max_gpus} GPUs",
            "ask for fewer or name another --host; hrm profiles lists them",
        )
    links = [_sum_link(link, count, machine) for link in (card.h2d, card.d2h)]
    if count > 1:
        links.append(card.peer)
    return HardwareProfile(
        name=f"{count}x{card.name} on {machine.name}",
        accelerator="catalog",
        num_gpus=count,
        levels=(_sum_level(card.level, count), machine.level),
        links=(*links, machine.staging),
    )


def one_part(profile: HardwareProfile, *, is_stage: bool) -> HardwareProfile:
    """One of the GPUs with an equal share of everything that the machine has, host included.

    It is a stage of a pipeline, or a rank in tensor parallel, which keeps its link to the others.
    """
    count = profile.num_gpus
    part = _times(profile, 1 / count, note=f"one of {count} parts")
    return replace(
        part,
        name=f"one of {count} parts of {profile.name}",
        num_gpus=1,
        num_stages=count if is_stage else 1,
        links=tuple(link for link in part.links if not (is_stage and link.kind == "peer")),
    )


def of_parts(part: HardwareProfile, count: int, peer: Link) -> HardwareProfile:
    """The machine of which that is one rank's part, see `one_part`: so many GPUs with such a link between them."""
    whole = _times(part, count)
    return replace(whole, num_gpus=count, links=(*whole.links, peer))


def _times(profile: HardwareProfile, factor: float, note: str = "") -> HardwareProfile:
    """The machine with so many times everything but the links between its GPUs."""

    def times(figure: Figure) -> Figure:
        return figure.times(factor, note=note)

    def link_times(link: Link) -> Link:
        if link.kind == "peer":
            return link
        size_factor = 1.0 if link.kind == "staging" else factor
        rate = link.bandwidth_bytes_per_s.each(lambda f: f.times(factor, note=note, size_factor=size_factor))
        return replace(link, bandwidth_bytes_per_s=rate)

    return replace(
        profile,
        levels=tuple(_change_level(level, times) for level in profile.levels),
        links=tuple(map(link_times, profile.links)),
    )


def with_memory(
    profile: HardwareProfile, gpu_memory_bytes: float | None = None, cpu_memory_bytes: float | None = None
) -> HardwareProfile:
    """The same machine with other memory capacities, as the user gives them.

    The reserve shrinks to at most 5 % of the new capacity, and the part that can be pinned changes
    with it. Unified memory is the GPU's. Raises ProfileError if there is no such level to give
    memory to.
    """
    levels = list(profile.levels)
    if cpu_memory_bytes is not None and profile.unified_memory:
        raise ProfileError(
            "--cpu-memory",
            cpu_memory_bytes,
            f"{profile.name} has unified memory, which --gpu-memory says",
            "give that instead",
        )
    if gpu_memory_bytes is not None:
        if not profile.has_gpu:
            raise ProfileError(
                "--gpu-memory",
                gpu_memory_bytes,
                f"{profile.name} has no GPU level",
                "leave it out or choose another machine",
            )
        levels[0] = _resize(levels[0], gpu_memory_bytes, "--gpu-memory")
    if cpu_memory_bytes is not None:
        index = levels.index(profile.host)
        levels[index] = _resize(levels[index], cpu_memory_bytes, "--cpu-memory")
    return replace(profile, levels=tuple(levels))


def reserve_if_resized(level: MemoryLevel) -> float:
    """Bytes that a level reserves of any other capacity that is given for it, at most.

    Of one that was given already, its file's reserve is not known any more: without end.
    """
    given = level.capacity_bytes.source is Source.GIVEN
    return math.inf if given else level.reserve_bytes.value


def save_profile(path: str | Path, profile: Part) -> None:
    """Write a readable YAML file that loads to an equal profile; all of it or nothing.

    Raises ProfileError if the file cannot be written, see `write_whole`.
    """
    write_whole(path, dump_profile(profile), ProfileError)


def dump_profile(profile: Part) -> str:
    """The YAML text of a profile, defaults left out and plain figures on a line each."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Floats with an exponent where they are long, as data sheets have them."""

    def represent_float(dumper: Any, value: float) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:float", _float_text(value))

    def represent_text(dumper: Any, value: str) -> Any:
        quote = None if reads_as_text(value) else "'"
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=quote)

    Dumper.add_representer(float, represent_float)
    Dumper.add_representer(str, represent_text)
    return yaml.dump(_to_plain(profile), Dumper=Dumper, sort_keys=False, default_flow_style=None, width=100)


def _float_text(value: float) -> str:
    """The shortest text that YAML reads back as the same float."""
    if 1e-3 <= abs(value) < 1e5 or value == 0:
        return repr(value)
    texts = (f"{value:.{digits}e}" for digits in range(1, 18))
    mantissa, _, exponent = next(t for t in texts if float(t) == value).partition("e")
    return f"{mantissa}e{int(exponent):+d}"


def _to_plain(node: Any) -> Any:
    if isinstance(node, Source):
        return node.value
    if is_dataclass(node) and not isinstance(node, type):
        plain: dict[str, Any] = {}
        for item in fields(node):
            value = getattr(node, item.name)
            default = item.default_factory() if callable(item.default_factory) else item.default
            if item.name == "schema" or value != default:
                plain[item.name] = _to_plain(value)
        return plain
    if isinstance(node, dict):
        pairs = cast("dict[Any, Any]", node)
        return {key: _to_plain(value) for key, value in pairs.items()}
    if isinstance(node, tuple):
        return [_to_plain(item) for item in cast("tuple[Any, ...]", node)]
    return node


# ------------------------------------------------------------------------------------ composing


def _change_level(level: MemoryLevel, change: Callable[[Figure], Figure]) -> MemoryLevel:
    """The level with its sizes and rates changed; latencies and the number of cores stay."""

    def changed(rate: Rate | None) -> Rate | None:
        return None if rate is None else rate.each(change)

    processor = level.processor
    return replace(
        level,
        capacity_bytes=change(level.capacity_bytes),
        reserve_bytes=change(level.reserve_bytes),
        pinnable_bytes=None if level.pinnable_bytes is None else change(level.pinnable_bytes),
        read_bytes_per_s=level.read_bytes_per_s.each(change),
        copy_bytes_per_s=changed(level.copy_bytes_per_s),
        shared_bytes_per_s=changed(level.shared_bytes_per_s),
        caches=tuple(
            replace(
                cache, capacity_bytes=change(cache.capacity_bytes), read_bytes_per_s=cache.read_bytes_per_s.each(change)
            )
            for cache in level.caches
        ),
        processor=replace(
            processor,
            compute_flops_per_s={dtype: rate.each(change) for dtype, rate in processor.compute_flops_per_s.items()},
            attention_bytes_per_s=changed(processor.attention_bytes_per_s),
        ),
    )


def _sum_level(level: MemoryLevel, count: int) -> MemoryLevel:
    if count == 1:
        return level
    summed = _change_level(level, lambda figure: figure.times(count, note=f"times {count}"))
    processor = summed.processor
    named = replace(processor, name=f"{count} x {processor.name}", cores=count * processor.cores)
    return replace(summed, processor=named)


def _sum_link(link: Link, count: int, machine: Host) -> Link:
    """All links side by side; a transfer is split over them, so curves stretch over size.

    Together they are no faster than the host's root ports and than its memory is read.
    """

    def total(figure: Figure) -> Figure:
        return figure.times(count, note=f"times {count}", size_factor=count)

    rate = link.bandwidth_bytes_per_s if count == 1 else link.bandwidth_bytes_per_s.each(total)
    limits = (
        ("memory, read", machine.level.read_bytes_per_s.planned),
        ("root ports, which move", machine.root_port_bytes_per_s.planned),
    )
    for what, limit in limits:
        planned = rate.planned
        if planned.value > limit.value:
            shown = format_bandwidth(limit.value)
            capped = Figure(
                value=limit.value,
                source=Source.DERIVED,
                note=f"limited by the host's {what} at {shown} ({limit.source})",
                curve=tuple((size, min(value, limit.value)) for size, value in planned.curve),
            )
            rate = replace(rate, achieved=capped)
    return replace(link, bandwidth_bytes_per_s=rate)


def _resize(level: MemoryLevel, num_bytes: float, flag: str) -> MemoryLevel:
    if not 0 < num_bytes < float("inf"):
        raise ProfileError(flag, num_bytes, "must be a positive size", "write it like 16GB")
    note = "given on the command line"
    reserve = level.reserve_bytes
    most = int(MAX_RESERVE_SHARE * num_bytes)
    if reserve_if_resized(level) > most:
        reserve = Figure(value=most, source=Source.ASSUMED, note=f"{MAX_RESERVE_SHARE:.0%} of a capacity {note}")
    capacity = Figure(value=num_bytes, source=Source.GIVEN, note=note)
    pinnable = level.pinnable_bytes
    if pinnable is not None:
        pinnable = pinnable.times(num_bytes / level.capacity_bytes.value, note=f"of a capacity {note}")
    return replace(level, capacity_bytes=capacity, reserve_bytes=reserve, pinnable_bytes=pinnable)


# -------------------------------------------------------------------------------------- reading


def _load(flag: str, folder: str, name: str, kind: type[_T]) -> _T:
    return _read(flag, Path(name) if is_path(name) else find_file(flag, name, (folder,)), kind)


def _read(flag: str, path: Path, *kinds: type[_T]) -> _T:
    """What the file holds, which must be one of these kinds."""
    plain = _parse(path)
    found = kind_of(plain)
    if found is not None and found not in kinds:
        raise ProfileError(flag, str(path), f"is {kind_words(found)}", "name another file")
    kind = next((kind for kind in kinds if kind is found), kinds[0])
    return decode_strictly(plain, kind, str(path))


def _parse(path: Path) -> object:
    return read_yaml(path, "a file of valid YAML", ProfileError)
