"""Memory levels put together from what was measured."""

from typing import TYPE_CHECKING, Any, Final

from hrm.errors import ProfileError
from hrm.hardware import Figure, MemoryLevel, Processor, Rate, Source
from hrm.profiling.environment import HostFacts
from hrm.profiling.machine.run import Run
from hrm.units import counted

if TYPE_CHECKING:
    from hrm.profiling.memory import MemoryRates
    from hrm.profiling.timing import Timing

RESERVE_SHARE: Final = 0.10


def processor_of(results: dict[str, Any], level: str, run: Run, name: str, cores: int) -> Processor:
    """What was measured of the processor at a level."""
    launch: Timing = results[f"{level} launch latency"]
    return Processor(
        name=name,
        cores=cores,
        compute_flops_per_s={
            dtype: rate
            for dtype in run.dtypes
            if (rate := results[f"{level} GEMM {dtype}"]) is not None
        },
        attention_bytes_per_s=results[f"{level} attention"],
        launch_latency_s=launch.duration("a layer's small operators, on average"),
    )


def host_level(
    results: dict[str, Any], run: Run, name: str, threads: int, capacity: Figure, reserve: Figure
) -> MemoryLevel:
    """A level of host memory, used by so many threads."""
    memory: MemoryRates = results["host memory"]

    def rates(timings: "dict[int, Timing]", what: str) -> Rate:
        at_best = min(timings, key=lambda count: timings[count].median_s)
        figures = {
            count: timings[count].rate(
                memory.num_bytes, f"{what} with {counted(count, 'thread')} {memory.note}"
            )
            for count in (threads, at_best)
        }
        return Rate(ceiling=figures[at_best], achieved=figures[threads])

    return MemoryLevel(
        name=name,
        capacity_bytes=capacity,
        reserve_bytes=reserve,
        read_bytes_per_s=rates(memory.read, "dot product"),
        copy_bytes_per_s=rates(memory.copy, "copy"),
        processor=processor_of(results, name, run, run.host.cpu_name, threads),
    )


def ram_of(host: HostFacts, less_bytes: int = 0) -> tuple[Figure, Figure]:
    """Capacity and reserve of the host's memory, without what an emulated GPU takes."""
    note = "" if host.ram_limit_bytes is None else "the cgroup's limit"
    if less_bytes:
        note += f"{'; ' if note else ''}less the emulated GPU's memory"
    capacity = host.usable_ram_bytes - less_bytes
    if capacity <= 0:
        raise ProfileError(
            "--gpu-memory", less_bytes, f"must be less than the RAM of {host.usable_ram_bytes}",
            "ask for less",
        )  # fmt: skip
    reserve = int(RESERVE_SHARE * capacity)
    return (
        Figure(value=float(capacity), source=Source.MEASURED, note=note),
        Figure(value=float(reserve), source=Source.ASSUMED, note=f"{RESERVE_SHARE:.0%} of RAM"),
    )
