"""What NVML tells of a GPU: name, driver, clocks, power, ECC, PCIe link, slices, other tenants.

All of it is a courtesy: what cannot be read is left out, and nothing here fails.
"""

import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Final

from hrm.units import counted, format_bytes

SLOWED_BY: Final = {  # bits of nvmlClocksEventReasons, nvml.h
    0x4: "its power cap",
    0x8: "a hardware slowdown",
    0x20: "its temperature",
    0x40: "its temperature (hardware)",
    0x80: "the power brake",
}
BUSY_SHARE: Final = 5  # per cent of the time; more is another's work
_GB_PER_S_PER_LANE: Final = {1: 0.25, 2: 0.5, 3: 0.985, 4: 1.969, 5: 3.938, 6: 7.563}


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """Lines for a profile's environment, and what a reader of its figures must know."""

    lines: dict[str, str] = field(default_factory=dict[str, str])
    warnings: tuple[str, ...] = ()
    pcie_bytes_per_s: float | None = None


@contextmanager
def _opened(uuid: str, index: int) -> Generator[tuple[Any, Any] | None]:
    """NVML and the handle of the GPU (or slice) of that UUID; None where there is no NVML."""
    try:
        nvml: Any = import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # noqa: BLE001 - whatever is wrong with it, the machine can be measured
        yield None
        return
    try:
        yield nvml, _handle(nvml, uuid, index)
    finally:
        nvml.nvmlShutdown()


def _handle(nvml: Any, uuid: str, index: int) -> Any:
    """CUDA may show fewer devices, in another order, so they are matched by UUID if they can be."""
    bare = uuid.removeprefix("GPU-").removeprefix("MIG-")
    for name in (uuid, f"GPU-{bare}", f"MIG-{bare}"):
        try:
            return nvml.nvmlDeviceGetHandleByUUID(name)
        except nvml.NVMLError:
            continue
    try:
        return nvml.nvmlDeviceGetHandleByIndex(index)
    except nvml.NVMLError:
        return None


def clock_mhz(uuid: str, index: int) -> float | None:
    """The clock of the GPU's multiprocessors now."""
    with _opened(uuid, index) as opened:
        if opened is None:
            return None
        nvml, gpu = opened
        card, _ = _card_of(nvml, gpu)
        clock = _read(nvml, lambda: nvml.nvmlDeviceGetClockInfo(card, nvml.NVML_CLOCK_SM))
        return None if clock is None else float(clock)


def slowed_by(uuid: str, index: int) -> tuple[str, ...]:
    """What keeps the clock down now."""
    with _opened(uuid, index) as opened:
        if opened is None:
            return ()
        nvml, gpu = opened
        card, _ = _card_of(nvml, gpu)
        ask = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        ask = ask or nvml.nvmlDeviceGetCurrentClocksThrottleReasons  # the name before driver 535
        bits = int(_read(nvml, lambda: ask(card)) or 0)
        return tuple(reason for bit, reason in SLOWED_BY.items() if bits & bit)


def gpu_facts(uuid: str, index: int) -> GpuFacts:
    """Everything that NVML tells of a GPU; PCIe links idle slower, so ask while it is at work."""
    with _opened(uuid, index) as opened:
        if opened is None:
            return GpuFacts({"nvml": "not available"})
        nvml, gpu = opened
        if gpu is None:
            return GpuFacts({"nvml": "does not know this GPU"})
        return _facts(nvml, gpu)


def _facts(nvml: Any, gpu: Any) -> GpuFacts:
    card, is_slice = _card_of(nvml, gpu)

    def ecc() -> str:
        return "on" if nvml.nvmlDeviceGetEccMode(card)[0] else "off"

    def mig() -> str:
        if is_slice:
            return f"this is a slice, {_text(nvml.nvmlDeviceGetName(gpu))}"
        return "on" if nvml.nvmlDeviceGetMigMode(card)[0] else "off"

    def numa_node() -> str:
        bus = _text(nvml.nvmlDeviceGetPciInfo(card).busId).lower()
        path = f"/sys/bus/pci/devices/{bus[-12:]}/numa_node"
        with open(path, encoding="utf-8") as file:  # noqa: PTH123 - one line
            return file.read().strip()

    readers: dict[str, Callable[[], object]] = {
        "driver": lambda: _text(nvml.nvmlSystemGetDriverVersion()),
        "max_sm_clock_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(card, nvml.NVML_CLOCK_SM),
        "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(card) / 1000,
        "ecc": ecc,
        "mig": mig,
        "gpu_numa_node": numa_node,
    }
    lines = {name: str(value) for name, read in readers.items() if (value := _read(nvml, read))}
    generation = _read(nvml, lambda: nvml.nvmlDeviceGetCurrPcieLinkGeneration(card))
    width = _read(nvml, lambda: nvml.nvmlDeviceGetCurrPcieLinkWidth(card))
    if generation and width:
        lines["pcie"] = f"generation {generation} x{width}"
    warnings = [f"the GPU is a slice of a card (MIG): {lines['mig']}"] if is_slice else []
    warnings += _tenants(nvml, card, lines)
    lane = _GB_PER_S_PER_LANE.get(generation or 0)
    return GpuFacts(lines, tuple(warnings), 1e9 * lane * width if lane and width else None)


def _tenants(nvml: Any, card: Any, lines: dict[str, str]) -> list[str]:
    """Other processes on the card, also in other slices; added to the lines."""
    running = _read(nvml, lambda: nvml.nvmlDeviceGetComputeRunningProcesses(card))
    if running is None:
        return []
    others = [process for process in running if process.pid != os.getpid()]
    lines["other_gpu_processes"] = str(len(others))
    if not others:
        return []
    held = sum(process.usedGpuMemory or 0 for process in others)
    holding = f", holding {format_bytes(held)}" if held else ""
    return [f"others use the card: {counted(len(others), 'process')}{holding}"]


def busy_before(uuid: str, index: int) -> tuple[str, ...]:
    """A warning if the card is at work for others; to be asked before any work of ours."""
    with _opened(uuid, index) as opened:
        if opened is None:
            return ()
        nvml, gpu = opened
        card, _ = _card_of(nvml, gpu)
        use = _read(nvml, lambda: nvml.nvmlDeviceGetUtilizationRates(card).gpu)
        if use is None or use <= BUSY_SHARE:
            return ()
        return (f"the card was busy {use}% of the time before it was measured",)


def _card_of(nvml: Any, gpu: Any) -> tuple[Any, bool]:
    """The whole card that a handle belongs to, and whether the handle is a slice of it."""
    is_slice = _read(nvml, lambda: nvml.nvmlDeviceIsMigDeviceHandle(gpu))
    if not is_slice:
        return gpu, False
    card = _read(nvml, lambda: nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(gpu))
    return (card if card is not None else gpu), True


def _read(nvml: Any, read: Callable[[], Any]) -> Any:
    """What NVML answers, or None: many cards do not tell everything."""
    try:
        return read()
    except (nvml.NVMLError, AttributeError, OSError, TypeError, ValueError):
        return None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
