"""A machine as a hierarchy of memory levels: what each holds, how fast it is read and computed on.

Levels go from fast to slow (`gpu`, `cpu`); level 0 is where most computing is done. Each level has
its own processor, as in the hierarchical roofline model (MoE-Lightning, arXiv 2411.11217, §3).
Every figure says where it came from; a rate may be a curve over size where it bends.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Final, Literal

from hrm.errors import ProfileError
from hrm.figures import NOISY_SPREAD, Figure, Rate, Source
from hrm.levels import Cache, MemoryLevel, Processor, check_figures
from hrm.numeric import Number, maximum

__all__ = [
    "CPU",
    "GPU",
    "NOISY_SPREAD",
    "SCHEMA",
    "Cache",
    "Disk",
    "Figure",
    "GpuCard",
    "HardwareProfile",
    "Host",
    "Link",
    "LinkKind",
    "MemoryLevel",
    "Processor",
    "Rate",
    "SharedLink",
    "Source",
    "check_figures",
]

GPU: Final = "gpu"
CPU: Final = "cpu"
SCHEMA: Final = 1


LinkKind = Literal["pinned", "pageable", "staging", "peer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """Transfers from one level to another: `latency_s` each, then `bandwidth_bytes_per_s`.

    `pinned` and `pageable` say what memory the host's side is in; `staging` is the copy from
    pageable to pinned memory within the host (`source` and `target` are then both the host), and
    `peer` what one GPU sends to another (both are then the GPU level). Where a machine has several
    GPUs, the link to the GPU level is all of theirs at once; one of them alone is named `gpu0`.
    """

    source: str
    target: str
    kind: LinkKind = "pinned"
    latency_s: Figure
    bandwidth_bytes_per_s: Rate

    def seconds(self, num_bytes: Number) -> Number:
        """Time to move `num_bytes` at once; nothing to move takes no time."""
        bandwidth = self.bandwidth_bytes_per_s.planned.value
        if self.bandwidth_bytes_per_s.planned.curve:
            bandwidth = self.bandwidth_bytes_per_s.at(maximum(num_bytes, 1))
        return (num_bytes > 0) * self.latency_s.value + num_bytes / bandwidth


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """Storage below the host's memory, read in large blocks past the page cache."""

    path: str
    capacity_bytes: Figure
    read_bytes_per_s: Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuCard:
    """One GPU as its file describes it: its memory level, its links and the host it usually has.

    `peer` is the link to another GPU of its kind in the same machine.
    """

    schema: int = SCHEMA
    name: str
    level: MemoryLevel
    h2d: Link
    d2h: Link
    peer: Link
    default_host: str

    def __post_init__(self) -> None:
        """Reject impossible hardware (ProfileError naming the figure)."""
        _check_schema(self.name, self.schema)
        check_figures(self.name, self)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneThreads:
    """What lanes share that are threads of one process: so many cores.

    `task_s` is how long running a task keeps one of them busy at least, whichever lane it is in and whatever it does.
    """

    cores: int
    task_s: Figure


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """A whole machine: levels from fast to slow and the links between them.

    `accelerator` says what level 0 is: `cuda`, `emulated` (a capped arena, a thread pool and a
    paced link on the CPU), `cpu` (one level, no accelerator) or `catalog` (never measured). With
    `num_stages` above 1 it is one of so many equal parts of a machine, a stage of a pipeline that
    keeps the KV caches of as many batches.

    Where its GPUs are not all alike, `gpus` has each of them, in their order, with the links that are
    its own; level 0 and the links are then what all have together, in the dtypes that all know.

    With `unified_memory` a GPU and a CPU work in one memory. It is the only level, and its
    processor is the GPU: the CPU would read the same bytes no sooner and computes less. Nothing is
    held twice and nothing crosses a link.

    `lane_threads` are measured where lanes compute on the host.
    """

    RETIRED: ClassVar = frozenset({"contention"})  # what files of before may hold, and no plan asks for

    schema: int = SCHEMA
    name: str
    accelerator: Literal["cuda", "emulated", "cpu", "catalog"]
    num_gpus: int = 1
    num_stages: int = 1
    unified_memory: bool = False
    levels: tuple[MemoryLevel, ...]
    links: tuple[Link, ...] = ()
    gpus: tuple[GpuCard, ...] = ()
    lane_threads: LaneThreads | None = None
    disk: Disk | None = None
    environment: dict[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        """Reject impossible hardware (ProfileError naming the figure)."""
        _check_schema(self.name, self.schema)
        if not self.levels or len({level.name for level in self.levels}) < len(self.levels):
            raise ProfileError(
                f"{self.name}: levels",
                [level.name for level in self.levels],
                "must be one or more with distinct names",
                "list each memory level once",
            )
        for name, count in (("num_gpus", self.num_gpus), ("num_stages", self.num_stages)):
            if count < 1:
                raise ProfileError(f"{self.name}: {name}", count, "must be at least 1", "correct it")
        if self.unified_memory and (len(self.levels) > 1 or self.num_gpus > 1):
            raise ProfileError(
                f"{self.name}: unified_memory",
                True,
                "goes with one level and one GPU",
                "leave one level, the memory with its GPU, or leave this out",
            )
        check_figures(self.name, self)
        if len(self.levels) > 1:
            fast, slow = self.levels[0].name, self.levels[1].name
            self.link(slow, fast)
            self.link(fast, slow)
            if self.num_gpus > 1:
                self.link(fast, fast, "peer")
        if self.gpus:
            _check_gpus(self)

    @cached_property
    def _parts(self) -> "dict[Hashable, HardwareProfile]":
        return {}

    def part(self, key: Hashable, make: "Callable[[], HardwareProfile]") -> "HardwareProfile":
        """A part of the machine, which is made once: searches ask for the same ones again and again."""
        if key not in self._parts:
            self._parts[key] = make()
        return self._parts[key]

    @property
    def has_accelerator(self) -> bool:
        """Whether there is a level above the host's memory."""
        return len(self.levels) > 1

    @property
    def has_gpu(self) -> bool:
        """Whether a GPU computes: in a memory of its own, or in unified memory."""
        return self.has_accelerator or self.unified_memory

    @property
    def top(self) -> MemoryLevel:
        """The fastest level: the GPU's memory, or the host's where there is no GPU."""
        return self.levels[0]

    @property
    def host(self) -> MemoryLevel:
        """The host's memory; the same as `top` on a machine without an accelerator."""
        return self.levels[min(1, len(self.levels) - 1)]

    def link(self, source: str, target: str, kind: LinkKind = "pinned") -> Link:
        """The link of that direction and kind; ProfileError if the profile has none."""
        for link in self.links:
            if (link.source, link.target, link.kind) == (source, target, kind):
                return link
        raise ProfileError(
            f"{self.name}: links",
            [f"{x.source}->{x.target} {x.kind}" for x in self.links],
            f"has no {kind} link {source}->{target}",
            "measure it with hrm profile or add it",
        )

    def has_link(self, source: str, target: str, kind: LinkKind = "pinned") -> bool:
        """Whether `link` finds one."""
        return any((x.source, x.target, x.kind) == (source, target, kind) for x in self.links)

    @property
    def default_dtype(self) -> str:
        """bfloat16, or float16 where the top level's processor has no bfloat16."""
        has_bfloat16 = "bfloat16" in self.top.processor.compute_flops_per_s
        return "bfloat16" if has_bfloat16 else "float16"

    @property
    def peer(self) -> Link:
        """One GPU to another."""
        return self.link(self.top.name, self.top.name, "peer")

    @property
    def host_accesses_a_transferred_byte(self) -> int:
        """How often a byte on the link is read or written in the host's memory.

        An emulated link is a memcpy within it.
        """
        return 2 if self.accelerator == "emulated" else 1

    @property
    def h2d(self) -> Link:
        """Host to device, pinned."""
        return self.link(self.host.name, self.top.name)

    @property
    def d2h(self) -> Link:
        """Device to host, pinned."""
        return self.link(self.top.name, self.host.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedLink:
    """A root port, or the upper side of a PCIe switch, behind which there are several GPUs.

    `gpus` are their numbers from 0, in the order of --gpus; together they move at most that much in
    one direction.
    """

    gpus: tuple[int, ...]
    bandwidth_bytes_per_s: Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One host as its file describes it: memory, CPU and how it stages to pinned memory.

    `root_port_bytes_per_s` is the most that all its GPUs' links move in one direction at once, and
    `shared_links` are those that some of the GPUs have to share besides.
    """

    schema: int = SCHEMA
    name: str
    level: MemoryLevel
    staging: Link
    root_port_bytes_per_s: Rate
    shared_links: tuple[SharedLink, ...] = ()
    max_gpus: int = 1

    def __post_init__(self) -> None:
        """Reject impossible hardware (ProfileError naming the figure)."""
        _check_schema(self.name, self.schema)
        check_figures(self.name, self)
        behind = [gpu for shared in self.shared_links for gpu in shared.gpus]
        if (
            len(set(behind)) < len(behind)
            or min(behind, default=0) < 0
            or any(len(x.gpus) < 2 for x in self.shared_links)
        ):
            raise ProfileError(
                f"{self.name}: shared_links",
                [list(shared.gpus) for shared in self.shared_links],
                "must each be of two GPUs or more, by their numbers from 0, and no GPU be behind two of them",
                "write it like gpus: [0, 1]",
            )


def _check_gpus(profile: HardwareProfile) -> None:
    """Reject GPUs that cannot be those of the machine (ProfileError)."""
    where, count = f"{profile.name}: gpus", len(profile.gpus)
    if count < 2 or count != profile.num_gpus or not profile.has_accelerator:
        rule = "must be as many as num_gpus says, two or more, in a machine of two levels"
        raise ProfileError(where, f"<{count} of them>", rule, "list every GPU, or leave them out if all are alike")
    ways = {(link.source, link.target, link.kind) for link in (profile.h2d, profile.d2h, profile.peer)}
    for index, card in enumerate(profile.gpus):
        own = {(link.source, link.target, link.kind) for link in (card.h2d, card.d2h, card.peer)}
        if card.level.name != profile.top.name or own != ways:
            rule = f"must have level {profile.top.name} and the links to and from it that the machine has"
            raise ProfileError(f"{where}[{index}]", card.name, rule, "name levels and links alike")
    together = sum(card.level.capacity_bytes.value for card in profile.gpus)
    if not math.isclose(together, profile.top.capacity_bytes.value, rel_tol=1e-6):
        rule = f"must have the {profile.top.capacity_bytes.value:.6g} bytes of level {profile.top.name} together"
        raise ProfileError(f"{where}.level.capacity_bytes", together, rule, "correct the level, or a GPU")


def _check_schema(name: str, schema: int) -> None:
    if schema != SCHEMA:
        raise ProfileError(
            f"{name}: schema",
            schema,
            f"this version reads schema {SCHEMA}",
            "measure the machine again with hrm profile or upgrade hrm",
        )
