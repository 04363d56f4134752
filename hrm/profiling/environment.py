"""What the machine is: cores, memory and caches that this process may use, and their names."""

import os
import platform
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, final

from hrm.profiling import topology
from hrm.profiling.topology import CacheFacts
from hrm.units import counted, format_bytes

BUSY: Final = 0.05  # of the hardware threads; more of others' work disturbs a measurement

_CGROUP: Final = Path("/sys/fs/cgroup")
_OWN_CGROUP: Final = Path("/proc/self/cgroup")
_MEMORY_FILES: Final = (  # limit, use, and in memory.stat what gives way; version 2 and 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True, slots=True)
class HostFacts:
    """The host as this process sees it; a cgroup's quota and limit count, not the host's size."""

    cpu_name: str
    sockets: int
    cores: int
    threads: int
    usable_cores: int
    usable_physical_cores: int
    quota_cores: float | None
    ram_bytes: int
    ram_limit_bytes: int | None
    caches: tuple[CacheFacts, ...]
    numa_nodes: int
    is_virtual: bool
    is_wsl: bool = False

    @property
    def usable_ram_bytes(self) -> int:
        """RAM, or the cgroup's limit if that is less."""
        return self.ram_bytes if self.ram_limit_bytes is None else min(self.ram_bytes, self.ram_limit_bytes)

    @property
    def compute_threads(self) -> int:
        """Threads worth computing with: hyper-threads of one core share its arithmetic units."""
        return min(self.usable_cores, self.usable_physical_cores)

    @property
    def last_level_cache_bytes(self) -> int:
        """All caches of the last level that the usable cores reach; 0 if nothing is known."""
        if not self.caches:
            return 0
        last = self.caches[-1]
        return last.each_bytes * min(last.instances, self.usable_cores)

    def describe(self) -> dict[str, str]:
        """As the lines of a profile's environment."""
        lines = {
            "cpu": self.cpu_name,
            "cores": f"{counted(self.cores, 'core')}, {counted(self.threads, 'hardware thread')},"
            f" {counted(self.sockets, 'socket')}, {counted(self.numa_nodes, 'NUMA node')}",
            "usable_cores": f"{self.usable_cores} hardware threads on {counted(self.usable_physical_cores, 'core')}",
            "ram": format_bytes(self.ram_bytes),
            "last_level_cache": format_bytes(self.last_level_cache_bytes),
        }
        if self.is_virtual:
            lines["virtual_machine"] = "yes: a core may be a hyper-thread, a cache may be shared"
        if self.quota_cores is not None:
            lines["cgroup_cpu_quota"] = f"{self.quota_cores:g} cores"
        if self.ram_limit_bytes is not None:
            lines["cgroup_memory_limit"] = format_bytes(self.ram_limit_bytes)
        return lines


def host_facts() -> HostFacts:
    """Read what this machine is."""
    import psutil

    quota, ram = _quota_cores(), psutil.virtual_memory().total
    limit = _memory_limit_bytes()
    threads = os.cpu_count() or 1
    cpu_name, sockets, is_virtual = _cpu()
    cpus = topology.allowed_cpus()
    return HostFacts(
        cpu_name=cpu_name,
        sockets=sockets,
        cores=psutil.cpu_count(logical=False) or threads,
        threads=threads,
        usable_cores=usable_cores(),
        usable_physical_cores=topology.physical_cores(cpus),
        quota_cores=quota,
        ram_bytes=ram,
        ram_limit_bytes=limit if limit is not None and limit < ram else None,
        caches=topology.caches(cpus),
        numa_nodes=len(topology.numa_nodes(range(threads))),
        is_virtual=is_virtual,
        is_wsl="microsoft" in platform.release().lower(),
    )


def usable_cores() -> int:
    """Cores that this process may keep busy: its affinity, or its cgroup's CPU quota if less."""
    cores = len(topology.allowed_cpus())
    quota = _quota_cores()
    return cores if quota is None else max(1, min(cores, int(quota)))


def available_ram_bytes() -> int:
    """RAM that can still be taken: the system's, or what its cgroups' limits leave if that is less.

    Files that a cgroup has read and does not use give way, as those of the system do.
    """
    import psutil

    left = [
        limit - used + reclaimable
        for folder in _own_cgroups()
        for limit_file, used_file, reclaimable_key in _MEMORY_FILES
        if (limit := _number(folder / limit_file)) is not None and (used := _number(folder / used_file)) is not None
        for reclaimable in (_number_of(reclaimable_key, folder / "memory.stat"),)
    ]
    return max(0, min([psutil.virtual_memory().available, *left]))


def software() -> dict[str, str]:
    """Versions, as lines of a profile's environment."""
    import torch

    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


@final
class Others:
    """What others kept of the machine between two moments: the rest of a measurement's noise."""

    def __init__(self) -> None:
        """Start to watch."""
        self._start = _cpu_seconds()

    def share(self) -> float:
        """Share of all hardware threads that others, the hypervisor included, kept busy."""
        wall, others, stolen, _ = self._since()
        return max(0.0, others + stolen) / max(wall * (os.cpu_count() or 1), 1e-9)

    def describe(self) -> str:
        """What happened since the start, in words."""
        wall, others, stolen, stopped = self._since()
        capacity = max(wall * (os.cpu_count() or 1), 1e-9)
        text = f"others kept {max(0.0, others / capacity):.1%} of the hardware threads busy"
        if stolen > 0:
            text += f", the hypervisor took {stolen / capacity:.1%}"
        if stopped > 0:
            text += f", the CPU quota stopped this process for {stopped:.1f} s"
        return text

    def _since(self) -> tuple[float, float, float, float]:
        wall, others, stolen, stopped = (now - before for now, before in zip(_cpu_seconds(), self._start, strict=True))
        return wall, others, stolen, stopped


def _cpu_seconds() -> tuple[float, float, float, float]:
    """Seconds on the wall, of others' work, stolen by the hypervisor, stopped by the quota."""
    import psutil

    times: dict[str, float] = psutil.cpu_times()._asdict()
    working = ("user", "nice", "system", "irq", "softirq")  # a guest's time is in user's too
    busy = sum(times.get(name, 0.0) for name in working)
    stopped = [
        int(words[index + 1]) * (1e-6 if name == "throttled_usec" else 1e-9)
        for folder in _own_cgroups()[:1]
        for words in (_read_words(folder / "cpu.stat"),)
        for index, name in enumerate(words[:-1])
        if name in {"throttled_usec", "throttled_time"}
    ]
    others = busy - sum(os.times()[:4])  # of this process and of those it has waited for
    return time.monotonic(), others, times.get("steal", 0.0), sum(stopped)


def _own_cgroups() -> list[Path]:
    """Folders of this process's cgroup and those above it, version 2 and 1."""
    folders: list[Path] = []
    for line in topology.read_text(_OWN_CGROUP).splitlines():
        if line.count(":") < 2:
            continue
        _, controllers, path = line.split(":", 2)
        top = _CGROUP / controllers if controllers else _CGROUP
        folder = top / path.lstrip("/")
        folders += [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]
    return [*folders, _CGROUP, _CGROUP / "cpu", _CGROUP / "memory"]


def _read_words(path: Path) -> list[str]:
    return topology.read_text(path).split()


def _quota_cores() -> float | None:
    quotas: list[float] = []
    for folder in _own_cgroups():
        words = _read_words(folder / "cpu.max")  # version 2: quota and period, or "max"
        if not words:
            words = _read_words(folder / "cpu.cfs_quota_us")
            words += _read_words(folder / "cpu.cfs_period_us")
        if len(words) == 2 and words[0].isdigit() and int(words[1]) > 0:
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _memory_limit_bytes() -> int | None:
    limits = [
        limit
        for folder in _own_cgroups()
        for name, _, _ in _MEMORY_FILES
        if (limit := _number(folder / name)) is not None
    ]
    return min(limits, default=None)


def _number(path: Path) -> int | None:
    """The number that the file begins with; None if there is none, as in "max"."""
    words = _read_words(path)
    return int(words[0]) if words and words[0].isdigit() else None


def _number_of(key: str, path: Path) -> int:
    """The number that follows a word in the file; 0 without it."""
    words = _read_words(path)
    return next((int(after) for word, after in pairwise(words) if word == key), 0)


def _cpu() -> tuple[str, int, bool]:
    """The CPU's name, how many sockets there are, and whether a hypervisor lies below."""
    lines = topology.read_text(Path("/proc/cpuinfo")).splitlines()
    pairs = [(key.strip(), value.strip()) for key, _, value in (x.partition(":") for x in lines)]
    names = [value for key, value in pairs if key == "model name"]
    sockets = {value for key, value in pairs if key == "physical id"}
    is_virtual = any(key == "flags" and "hypervisor" in value.split() for key, value in pairs)
    name = names[0] if names else platform.processor() or platform.machine()
    return name, max(1, len(sockets)), is_virtual
