"""Machines from files: one YAML file per GPU, host or whole machine, and how they compose.

`4xT4` is a GPU file, a count and a host, and `2xT4+1xL4` a machine with GPUs of two kinds. What GPUs
bring adds up: memory, bandwidth, compute and links, the links up to what the host's memory can be
read at. A host alone is a machine without GPUs, and a chip with unified memory is a whole machine by
itself.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from hrm.catalog import CatalogPart, find_file, is_path, kind_of, kind_words
from hrm.contract.launches import HOST_FUSES_OPERATORS
from hrm.decoding import read_yaml
from hrm.errors import ProfileError
from hrm.files import is_file, write_whole
from hrm.gpus import alike, at_once, behind_shared_links, change_level, limited, names_text, side_by_side, smallest_of
from hrm.hardware import Figure, GpuCard, HardwareProfile, Host, Link, MemoryLevel, Source
from hrm.profile_text import dump_profile
from hrm.strict import decode_strictly

MAX_RESERVE_SHARE: Final = 0.05  # of a capacity given by the user, who knows what is free

MOST_TOLD_APART: Final = 256  # GPUs of a machine in which not all are alike

_T = TypeVar("_T")
_GPUS: Final = re.compile(r"\s*(?:(\d{1,9})\s*[x×]\s*)?(\S(?:.*\S)?)\s*", re.IGNORECASE)
_BETWEEN: Final = re.compile(r"\+(?!-)")  # kinds of GPU; `AI-Max+-395` is one name


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


def load_any(name: str) -> CatalogPart:
    """A GPU, host or machine of the catalog by its name, or what a YAML file holds; ProfileError if there is none."""
    path = Path(name) if is_path(name) else find_file("hrm profiles", name)
    plain = _parse(path)
    return decode_strictly(plain, kind_of(plain) or HardwareProfile, str(path))


def parse_gpus(gpus: str) -> list[tuple[int, str]]:
    """The kinds of GPU of a machine: counts and names of `4xT4`, or of `2xT4+1xL4`.

    Raises ProfileError if one has no name, or a count of 0.
    """
    whole = _GPUS.fullmatch(gpus)
    names_file = whole is not None and is_path(whole[2]) and is_file(Path(whole[2]))
    kinds: list[tuple[int, str]] = []
    for kind in [gpus] if names_file else _BETWEEN.split(gpus):
        match = _GPUS.fullmatch(kind)
        if match is None or int(match[1] or 1) < 1:
            raise ProfileError(
                "--gpus",
                gpus,
                "must be a GPU or a count of at least 1 and a GPU",
                "write it like 4xT4, or 2xT4+1xL4; --host alone is a machine without GPUs",
            )
        kinds.append((int(match[1] or 1), match[2]))
    return kinds


def compose(gpus: str, host: str | None = None) -> HardwareProfile:
    """A machine of `4xT4` (or `T4`, or `2xT4+1xL4`) in `host`, or else in the host that the first GPU's file names.

    A GPU of one's own is a YAML file, `2x./mine.yaml`, and so is a host. Whole machines, such as
    those with unified memory, are named alike. Raises ProfileError if there is no such GPU or host,
    or the host does not take that many.
    """
    kinds = parse_gpus(gpus)
    paths = [Path(name) if is_path(name) else find_file("--gpus", name, ("gpus", "machines")) for _, name in kinds]
    cards: list[tuple[int, GpuCard]] = []
    for (count, _), path in zip(kinds, paths, strict=True):
        found = _read("--gpus", path, GpuCard, HardwareProfile)
        if isinstance(found, GpuCard):
            cards.append((count, found))
        elif count > 1 or len(kinds) > 1:
            remedy = "leave out the count" if len(kinds) == 1 else "name it alone"
            raise ProfileError("--gpus", gpus, f"{found.name} is a whole machine, and plans are for one", remedy)
        elif host is not None:
            raise ProfileError("--host", host, f"goes with GPUs, and {found.name} is a whole machine", "leave it out")
        else:
            return found
    machine = _usual_host(cards[0][1], paths[0]) if host is None else load_host(host)
    return assemble_all(cards, machine)


def _usual_host(card: GpuCard, path: Path) -> Host:
    where = f"{path}: default_host"
    return _read(where, find_file(where, card.default_host, ("hosts",)), Host)


def without_gpus(host: Host) -> HardwareProfile:
    """The host as a machine of one level, on which the CPU does everything."""
    return HardwareProfile(name=host.name, accelerator="catalog", levels=(_with_own_kernels(host.level),))


def assemble(card: GpuCard, count: int, machine: Host) -> HardwareProfile:
    """A machine of `count` GPUs of one kind in a host, see `assemble_all`."""
    return assemble_all([(count, card)], machine)


def assemble_all(kinds: Sequence[tuple[int, GpuCard]], machine: Host) -> HardwareProfile:
    """A machine of so many GPUs of each kind in a host, in this order.

    Memory, bandwidth, compute and links of the GPUs add up; the links together are no faster than
    the host's memory is read and than its root ports, and some may share one before. Raises
    ProfileError if the host does not take that many GPUs.
    """
    count = sum(number for number, _ in kinds)
    told_apart = len(kinds) > 1 or bool(machine.shared_links)
    most = min(machine.max_gpus, MOST_TOLD_APART) if told_apart else machine.max_gpus
    if count > most:
        raise ProfileError(
            "--gpus",
            "+".join(f"{number}x{card.name}" for number, card in kinds),
            f"{machine.name} takes at most {most} GPUs",
            "ask for fewer or name another --host; hrm profiles lists them",
        )
    each = [card for number, card in kinds for _ in range(number)] if told_apart else [kinds[0][1]]
    cards = behind_shared_links(each, machine)
    limits = (
        (machine.level.read_bytes_per_s.planned, "the host's memory, read"),
        (machine.root_port_bytes_per_s.planned, "the host's root ports, which move"),
    )
    level, links, peer = side_by_side(cards, count)
    for limit, what in limits:
        links = [limited(link, limit, what) for link in links]
    return HardwareProfile(
        name=f"{names_text(each) if told_apart else f'{count}x{cards[0].name}'} on {machine.name}",
        accelerator="catalog",
        num_gpus=count,
        levels=(level, _with_own_kernels(machine.level)),
        links=(*links, *([peer] if count > 1 else []), machine.staging),
        gpus=() if alike(cards) else cards,
    )


def _with_own_kernels(host: MemoryLevel) -> MemoryLevel:
    """The host's memory where the executor's kernels compute: no data sheet knows of them."""
    return replace(host, processor=replace(host.processor, fuses_operators=HOST_FUSES_OPERATORS))


def one_part(profile: HardwareProfile, *, is_stage: bool) -> HardwareProfile:
    """One of the GPUs with an equal share of everything that the machine has, host included.

    It is a stage of a pipeline, or a rank in tensor parallel, which keeps its link to the others. Where
    GPUs are not all alike, it has of everything as little as any of them has while all are in use.
    """
    return profile.part(("one", is_stage), lambda: _one_part(profile, is_stage=is_stage))


def _one_part(profile: HardwareProfile, *, is_stage: bool) -> HardwareProfile:
    count = profile.num_gpus
    part = _Times(1 / count, f"one of {count} parts").of(profile)
    if profile.gpus:
        part = _with_gpu(part, smallest_of(at_once(profile)))
    return replace(
        part,
        name=f"one of {count} parts of {profile.name}",
        num_gpus=1,
        num_stages=count if is_stage else 1,
        links=tuple(link for link in part.links if not (is_stage and link.kind == "peer")),
    )


def stage_part(profile: HardwareProfile, index: int, share: float) -> HardwareProfile:
    """The stage of a pipeline on the GPU of that number, with such a share of the host; the same on GPUs alike."""
    which = index if profile.gpus else 0
    return profile.part(("stage", which, share), lambda: _stage_part(profile, which, share))


def _stage_part(profile: HardwareProfile, index: int, share: float) -> HardwareProfile:
    count = profile.num_gpus
    of_gpu, of_host = _Times(1 / count, f"one of {count} parts"), _Times(share, f"{share:.3g} of it")
    crossing = [link for link in profile.links if link.source != link.target]
    within = [link for link in profile.links if link.source == link.target and link.kind != "peer"]
    part = replace(
        profile,
        name=f"GPU {index} of {profile.name}" if profile.gpus else f"a GPU of {profile.name}",
        num_gpus=1,
        num_stages=count,
        gpus=(),
        levels=(of_gpu.level(profile.top), of_host.level(profile.host)),
        links=(*map(of_gpu.link, crossing), *map(of_host.link, within)),
    )
    return _with_gpu(part, at_once(profile)[index]) if profile.gpus else part


def _with_gpu(part: HardwareProfile, card: GpuCard) -> HardwareProfile:
    """The part with that GPU and its links for its own."""
    others = tuple(link for link in part.links if link.kind == "peer" or link.source == link.target)
    return replace(part, gpus=(), levels=(card.level, *part.levels[1:]), links=(card.h2d, card.d2h, *others))


def with_host_memory(part: HardwareProfile, usable_bytes: int, pinned_bytes: int) -> HardwareProfile:
    """The part of a machine with so much of the host's memory, and of that to be pinned if not all of it can be."""
    host = part.host
    changed = replace(
        host,
        capacity_bytes=replace(host.capacity_bytes, value=usable_bytes),
        reserve_bytes=replace(host.reserve_bytes, value=0),
        pinnable_bytes=host.pinnable_bytes and replace(host.pinnable_bytes, value=pinned_bytes),
    )
    return replace(part, levels=tuple(changed if level is host else level for level in part.levels))


def of_parts(part: HardwareProfile, count: int, peer: Link) -> HardwareProfile:
    """The machine of which that is one rank's part, see `one_part`: so many GPUs with such a link between them."""
    whole = _Times(count).of(part)
    return replace(whole, num_gpus=count, links=(*whole.links, peer))


class _Times(NamedTuple):
    """So many times as much of everything but of the links between GPUs."""

    factor: float
    note: str = ""

    def level(self, level: MemoryLevel) -> MemoryLevel:
        return change_level(level, lambda figure: figure.times(self.factor, note=self.note))

    def link(self, link: Link) -> Link:
        if link.kind == "peer":
            return link
        sizes = 1.0 if link.kind == "staging" else self.factor
        rate = link.bandwidth_bytes_per_s.each(lambda f: f.times(self.factor, note=self.note, size_factor=sizes))
        return replace(link, bandwidth_bytes_per_s=rate)

    def of(self, profile: HardwareProfile) -> HardwareProfile:
        """The whole machine so, of which none of the GPUs is told by itself."""
        levels, links = map(self.level, profile.levels), map(self.link, profile.links)
        return replace(profile, gpus=(), levels=tuple(levels), links=tuple(links))


def with_memory(
    profile: HardwareProfile, gpu_memory_bytes: float | None = None, cpu_memory_bytes: float | None = None
) -> HardwareProfile:
    """The same machine with other memory capacities, as the user gives them.

    The reserve shrinks to at most 5 % of the new capacity, and the part that can be pinned changes
    with it. GPUs that are not all alike get parts in proportion to what they have. Unified memory is the
    GPU's. Raises ProfileError if there is no such level to give
    memory to.
    """
    levels, gpus = list(profile.levels), profile.gpus
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
        share = gpu_memory_bytes / levels[0].capacity_bytes.value
        gpus = tuple(
            replace(card, level=_resize(card.level, share * card.level.capacity_bytes.value, "--gpu-memory"))
            for card in profile.gpus
        )
        profile = replace(profile, gpus=())
        levels[0] = _resize(levels[0], gpu_memory_bytes, "--gpu-memory")
    if cpu_memory_bytes is not None:
        index = levels.index(profile.host)
        levels[index] = _resize(levels[index], cpu_memory_bytes, "--cpu-memory")
    return replace(profile, levels=tuple(levels), gpus=gpus)


def reserve_if_resized(level: MemoryLevel) -> float:
    """Bytes that a level reserves of any other capacity that is given for it, at most.

    Of one that was given already, its file's reserve is not known any more: without end.
    """
    given = level.capacity_bytes.source is Source.GIVEN
    return math.inf if given else level.reserve_bytes.value


def save_profile(path: str | Path, profile: CatalogPart) -> None:
    """Write a readable YAML file that loads to an equal profile; all of it or nothing.

    Raises ProfileError if the file cannot be written, see `write_whole`.
    """
    write_whole(path, dump_profile(profile), ProfileError)


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
