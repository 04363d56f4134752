"""Cores, caches and NUMA nodes as the kernel lists them, as far as this process may use them."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SYSTEM: Final = Path("/sys/devices/system")

_UNITS: Final = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True, slots=True)
class CacheFacts:
    """All caches of one level: how much one of them holds, how many there are and who shares it."""

    level: int
    each_bytes: int
    instances: int
    cpus_each: int

    @property
    def name(self) -> str:
        """`L1`, `L2` or `L3`."""
        return f"L{self.level}"


def allowed_cpus() -> frozenset[int]:
    """Numbers of the hardware threads that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return frozenset(affinity(0)) if affinity else frozenset(range(os.cpu_count() or 1))


def physical_cores(cpus: Iterable[int]) -> int:
    """Cores that these hardware threads are on; each counts as one where nothing is told."""
    return max(1, len({_core(cpu) for cpu in cpus}))


def one_of_each_core_first(cpus: Iterable[int]) -> list[int]:
    """These hardware threads, so that the first ones lie on different cores."""
    seen: set[object] = set()
    first: list[int] = []
    second: list[int] = []
    for cpu in sorted(cpus):
        (second if _core(cpu) in seen else first).append(cpu)
        seen.add(_core(cpu))
    return first + second


def _core(cpu: int) -> object:
    folder = SYSTEM / "cpu" / f"cpu{cpu}" / "topology"
    package, core = (read_text(folder / name) for name in ("physical_package_id", "core_id"))
    return (package, core) if core else cpu


def caches(cpus: Iterable[int]) -> tuple[CacheFacts, ...]:
    """Data and unified caches of these hardware threads by level, from the fastest on.

    Empty where the kernel does not tell, as on some virtual machines and on other systems.
    """
    wanted = set(cpus)
    found: dict[int, dict[frozenset[int], int]] = {}
    for cpu in sorted(wanted):
        for folder in sorted((SYSTEM / "cpu" / f"cpu{cpu}" / "cache").glob("index[0-9]*")):
            level, kind, size, shared = (
                read_text(folder / name) for name in ("level", "type", "size", "shared_cpu_list")
            )
            num_bytes = _size(size)
            if level.isdigit() and kind in {"Data", "Unified"} and num_bytes:
                users = cpu_list(shared) & wanted or frozenset({cpu})
                found.setdefault(int(level), {})[users] = num_bytes
    return tuple(
        CacheFacts(
            level=level,
            each_bytes=min(instances.values()),
            instances=len(instances),
            cpus_each=max(map(len, instances)),
        )
        for level, instances in sorted(found.items())
    )


def numa_nodes(cpus: Iterable[int]) -> dict[int, frozenset[int]]:
    """For each NUMA node with some of these hardware threads, which; node 0 if none is told."""
    wanted = frozenset(cpus)
    nodes = {
        int(folder.name.removeprefix("node")): cpu_list(read_text(folder / "cpulist")) & wanted
        for folder in (SYSTEM / "node").glob("node[0-9]*")
    }
    return {node: nodes[node] for node in sorted(nodes) if nodes[node]} or {0: wanted}


def cpu_list(text: str) -> frozenset[int]:
    """Read the kernel's `0-3,8`."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if first.isdigit():
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def read_text(path: Path) -> str:
    """The text of a small file without its ends; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _size(text: str) -> int:
    number, unit = text[:-1], text[-1:]
    return int(number) * _UNITS[unit] if number.isdigit() and unit in _UNITS else 0
