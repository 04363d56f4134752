"""What the machine is: cores, memory and caches that this process may use, and their names."""

import os
import platform
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hrm.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

_CGROUP: Final = Path("/sys/fs/cgroup")
_CPU: Final = Path("/sys/devices/system/cpu")


@dataclass(frozen=True, slots=True)
class HostFacts:
    """The host as this process sees it; a cgroup's quota and limit count, not the host's size."""

    cpu_name: str
    sockets: int
    cores: int
    threads: int
    usable_cores: int
    quota_cores: float | None
    ram_bytes: int
    ram_limit_bytes: int | None
    last_level_cache_bytes: int
    numa_nodes: int

    @property
    def usable_ram_bytes(self) -> int:
        """RAM, or the cgroup's limit if that is less."""
        return min(self.ram_bytes, self.ram_limit_bytes or self.ram_bytes)

    def describe(self) -> dict[str, str]:
        """As the lines of a profile's environment."""
        lines = {
            "cpu": self.cpu_name,
            "cores": f"{self.cores} cores, {self.threads} hardware threads, {self.sockets} sockets,"
            f" {self.numa_nodes} NUMA nodes",
            "usable_cores": str(self.usable_cores),
            "ram": format_bytes(self.ram_bytes),
            "last_level_cache": format_bytes(self.last_level_cache_bytes),
        }
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
    cpu_name, sockets = _cpu_name_and_sockets()
    return HostFacts(
        cpu_name=cpu_name,
        sockets=sockets,
        cores=psutil.cpu_count(logical=False) or threads,
        threads=threads,
        usable_cores=usable_cores(),
        quota_cores=quota,
        ram_bytes=ram,
        ram_limit_bytes=limit if limit is not None and limit < ram else None,
        last_level_cache_bytes=_last_level_cache_bytes(),
        numa_nodes=max(1, len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))),
    )


def usable_cores() -> int:
    """Cores that this process may keep busy: its affinity, or its cgroup's CPU quota if less."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _quota_cores()
    return cores if quota is None else max(1, min(cores, int(quota)))


def software() -> dict[str, str]:
    """Versions, as lines of a profile's environment."""
    import torch

    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def gpu_facts(index: int) -> dict[str, str]:
    """GPU name, driver, clocks, power limit, ECC, PCIe link and other tenants, where NVML tells.

    `index` counts the devices that CUDA shows; what cannot be read is left out.
    """
    import torch

    cuda: Any = torch.cuda
    properties = cuda.get_device_properties(index)
    facts = {"gpu": str(properties.name), "cuda": str(torch.version.cuda)}
    try:
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
    except Exception as error:  # noqa: BLE001 - NVML is a courtesy, whatever is wrong with it
        return facts | {"nvml": f"not available: {error}"}
    try:
        gpu = _nvml_handle(nvml, str(properties.uuid), index)
        return facts | _nvml_facts(nvml, gpu)
    except Exception as error:  # noqa: BLE001 - as above
        return facts | {"nvml": f"not available: {error}"}
    finally:
        nvml.nvmlShutdown()


def _nvml_handle(nvml: Any, uuid: str, index: int) -> Any:
    """CUDA may show fewer devices, in another order, so they are matched by UUID if they can be."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(
            uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        )
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetHandleByIndex(index)


def _nvml_facts(nvml: Any, gpu: Any) -> dict[str, str]:
    def pcie() -> str:
        generation = nvml.nvmlDeviceGetCurrPcieLinkGeneration(gpu)
        return f"generation {generation} x{nvml.nvmlDeviceGetCurrPcieLinkWidth(gpu)}"

    def others() -> int:
        running = nvml.nvmlDeviceGetComputeRunningProcesses(gpu)
        return sum(process.pid != os.getpid() for process in running)

    readers: dict[str, Callable[[], object]] = {
        "driver": nvml.nvmlSystemGetDriverVersion,
        "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
        "max_sm_clock_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
        "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000,
        "ecc": lambda: "on" if nvml.nvmlDeviceGetEccMode(gpu)[0] else "off",
        "pcie": pcie,
        "mig": lambda: "on" if nvml.nvmlDeviceGetMigMode(gpu)[0] else "off",
        "other_gpu_processes": others,
    }
    facts: dict[str, str] = {}
    for name, read in readers.items():
        try:
            facts[name] = str(read())
        except nvml.NVMLError:  # many cards do not tell everything
            continue
    return facts


def _own_cgroups() -> list[Path]:
    """Folders of this process's cgroup and those above it, version 2 and 1."""
    folders: list[Path] = []
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        top = _CGROUP / controllers if controllers else _CGROUP
        folder = top / path.lstrip("/")
        folders += [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]
    return [*folders, _CGROUP, _CGROUP / "cpu", _CGROUP / "memory"]


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except OSError:
        return []


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
        int(words[0])
        for folder in _own_cgroups()
        for name in ("memory.max", "memory.limit_in_bytes")
        if (words := _read_words(folder / name)) and words[0].isdigit()
    ]
    return min(limits, default=None)


def _cpu_name_and_sockets() -> tuple[str, int]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    pairs = [(key.strip(), value.strip()) for key, _, value in (x.partition(":") for x in lines)]
    names = [value for key, value in pairs if key == "model name"]
    sockets = {value for key, value in pairs if key == "physical id"}
    return names[0] if names else platform.processor() or platform.machine(), max(1, len(sockets))


def _last_level_cache_bytes() -> int:
    sizes = [0]
    for path in _CPU.glob("cpu0/cache/index*/size"):
        words = _read_words(path)
        if words and words[0][:-1].isdigit() and words[0][-1] in "KM":
            sizes.append(int(words[0][:-1]) * {"K": 2**10, "M": 2**20}[words[0][-1]])
    return max(sizes)
