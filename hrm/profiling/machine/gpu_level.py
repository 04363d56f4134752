"""GPUs as one memory level, with what their data sheet says, and their lines of environment."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from hrm.errors import ProfileError
from hrm.hardware import GPU, Figure, MemoryLevel, Rate, Source
from hrm.machines import load_gpu
from hrm.profiling.machine.levels import processor_of
from hrm.profiling.machine.options import check_gpu_memory
from hrm.profiling.machine.run import Run
from hrm.units import MIB

if TYPE_CHECKING:
    from hrm.profiling.gpu import AbstractGpu
    from hrm.profiling.memory import DeviceMemoryRates
    from hrm.profiling.nvml import GpuFacts
    from hrm.profiling.settle import Settling

CONTEXT_BYTES: Final = 800 * MIB
MEMORY: Final = "gpu memory"
FACTS: Final = "gpu facts"

DATASHEETS: Final = {  # CUDA's names of cards whose variant they leave in no doubt
    "Tesla T4": "T4",
    "Tesla V100-SXM2-16GB": "V100-16G",
    "Tesla V100-SXM2-32GB": "V100-32G",
    "Tesla V100-PCIE-16GB": "V100-PCIe-16G",
    "NVIDIA L4": "L4",
    "NVIDIA L40": "L40",
    "NVIDIA L40S": "L40S",
    "NVIDIA A30": "A30",
    "NVIDIA A10G": "A10G",
    "NVIDIA A40": "A40",
    "NVIDIA RTX A6000": "RTX-A6000",
    "NVIDIA A100-SXM4-40GB": "A100-40G",
    "NVIDIA A100-SXM4-80GB": "A100-80G",
    "NVIDIA A100 80GB PCIe": "A100-PCIe-80G",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H100 PCIe": "H100-PCIe",
    "NVIDIA H200": "H200",
}


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """What all the GPUs have at least, each."""

    free_bytes: int
    total_bytes: int
    capacity_bytes: int


def memory_of(gpus: Sequence["AbstractGpu"], asked_bytes: int | None) -> GpuMemory:
    """Free and total memory; ProfileError if more is asked for than they have, or less than a level can be of."""
    sizes = [gpu.memory_bytes() for gpu in gpus]
    free, total = min(size for size, _ in sizes), min(size for _, size in sizes)
    if asked_bytes is not None and asked_bytes > total * len(gpus):
        raise ProfileError(
            "--gpu-memory",
            asked_bytes,
            f"{' and '.join(gpu.device for gpu in gpus)} have {total * len(gpus)} bytes",
            "ask for less",
        )
    if asked_bytes is not None:
        check_gpu_memory(asked_bytes, len(gpus))
    return GpuMemory(free, total, total if asked_bytes is None else asked_bytes // len(gpus))


def gpu_level(
    results: dict[str, Any], run: Run, gpus: Sequence["AbstractGpu"], memory: GpuMemory, factor: float, *, capped: bool
) -> MemoryLevel:
    """All the GPUs as one level, `factor` times the first."""
    count, name = len(gpus), gpus[0].name
    rates: DeviceMemoryRates = results[MEMORY]
    in_use = 0 if capped else memory.total_bytes - memory.free_bytes
    reserve = min(max(CONTEXT_BYTES, in_use), int(0.5 * memory.capacity_bytes))
    reserve_note = "CUDA context and allocator"
    if in_use > CONTEXT_BYTES:
        reserve_note = "memory in use when measured, by this process and others"
    processor = processor_of(results, GPU, run, name, 0)
    card = _datasheet_of(name, results[FACTS][0])
    of_dtype = card.processor.compute_flops_per_s if card else {}
    note = f"times {factor:.3g}, measured on gpu0"

    def all_of(rate: Rate, sheet: Rate | None) -> Rate:
        known = sheet.datasheet if sheet else None
        if count == 1:
            return replace(rate, datasheet=known)
        paper = None if known is None else known.times(count, note=f"times {count}")
        return replace(rate.each(lambda x: x.times(factor, note=note, source=Source.DERIVED)), datasheet=paper)

    attention = processor.attention_bytes_per_s
    return MemoryLevel(
        name=GPU,
        capacity_bytes=Figure(
            value=float(memory.capacity_bytes * count),
            source=Source.MEASURED,
            note="given on the command line" if capped else "",
        ),
        reserve_bytes=Figure(value=float(reserve * count), source=Source.ASSUMED, note=reserve_note),
        read_bytes_per_s=all_of(
            Rate(achieved=rates.read.rate(rates.num_bytes, "dot product")), card.read_bytes_per_s if card else None
        ),
        copy_bytes_per_s=all_of(Rate(achieved=rates.copy.rate(rates.num_bytes, "copy")), None),
        processor=replace(
            processor,
            compute_flops_per_s={
                dtype: all_of(rate, of_dtype.get(dtype)) for dtype, rate in processor.compute_flops_per_s.items()
            },
            attention_bytes_per_s=None if attention is None else all_of(attention, None),
            attention_request_s=None,  # a batch is one kernel there
            fuses_operators=False,  # those that were measured are the host's
            groups_experts=all(gpu.groups_experts for gpu in gpus),
        ),
    )


def _datasheet_of(name: str, facts: "GpuFacts") -> MemoryLevel | None:
    """The card as its data sheet has it, where its name leaves no doubt; a slice has none."""
    if facts.lines.get("mig", "off") != "off":
        return None
    return load_gpu(DATASHEETS[name]).level if name in DATASHEETS else None


def gpu_environment(gpus: Sequence["AbstractGpu"], facts: "Sequence[GpuFacts]", settling: "Settling") -> dict[str, str]:
    """Facts of the first GPU a line each, those of the others in a line."""
    lines = dict(facts[0].lines)
    clocks = {
        "idle": settling.idle_mhz,
        "highest under load": settling.peak_mhz,
        "settled under load": settling.settled_mhz,
        "afterwards": gpus[0].clock_mhz(),
    }
    known = [f"{mhz:.0f} {when}" for when, mhz in clocks.items() if mhz is not None]
    if known:
        lines["sm_clock_mhz"] = ", ".join(known)
    for index, told in enumerate(facts[1:], start=1):
        lines[f"gpu{index}"] = ", ".join(f"{key} {text}" for key, text in told.lines.items())
    return lines
