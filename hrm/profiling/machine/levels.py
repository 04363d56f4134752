"""Memory levels put together from what was measured."""

from typing import TYPE_CHECKING, Any, Final

from hrm.contract.launches import ATTENTION_LAUNCHES_PER_REQUEST
from hrm.errors import ProfileError
from hrm.hardware import Figure, MemoryLevel, Processor, Rate, Source
from hrm.profiling.environment import HostFacts
from hrm.profiling.machine.host import MEMORY, attention_step, gemm_step, launch_step
from hrm.profiling.machine.run import Run
from hrm.profiling.timing import significant
from hrm.units import counted, format_bandwidth, format_bytes

if TYPE_CHECKING:
    from hrm.profiling.memory import MemoryRates
    from hrm.profiling.timing import Timing

PINNED_BY_WSL: Final = 0.5  # a share of the memory; NVIDIA says only that it is limited
RESERVE_SHARE: Final = 0.10


def processor_of(results: dict[str, Any], level: str, run: Run, name: str, cores: int) -> Processor:
    """What was measured of the processor at a level."""
    launch: Timing = results[launch_step(level)]
    kernels = run.options.kernels
    return Processor(
        name=name,
        cores=cores,
        compute_flops_per_s={
            name: rate
            for name in (*run.dtypes, *run.packed)
            if (rate := results.get(gemm_step(level, name))) is not None
        },
        attention_bytes_per_s=results[attention_step(level)],
        attention_request_s=None if kernels else request_latency(launch),
        fuses_operators=kernels is not None and kernels.fuses_operators,
        native_up_to=native_up_to(run, cores),
        launch_latency_s=launch.duration("a layer's small operators, on average"),
    )


def native_up_to(run: Run, threads: int) -> dict[str, int]:
    """What the kernels are chosen by on so many threads of the host; 0 are a GPU."""
    kernels = run.options.kernels
    if kernels is None or kernels.native_up_to is None or not threads:
        return {}
    return dict(kernels.native_up_to(run.dtypes, threads, packed=bool(run.packed)))


def request_latency(launch: "Timing") -> Figure:
    """What a request costs in attention that takes requests one by one, as torch's does here."""
    value, low, high = (
        significant(ATTENTION_LAUNCHES_PER_REQUEST * seconds)
        for seconds in (launch.median_s, launch.p20_s, launch.p80_s)
    )
    return Figure(
        value=value,
        source=Source.DERIVED,
        note=f"{ATTENTION_LAUNCHES_PER_REQUEST} operators a request",
        p20=low,
        p80=high,
    )


def host_level(
    results: dict[str, Any], run: Run, name: str, threads: int, capacity: Figure, reserve: Figure, ranks: int = 1
) -> MemoryLevel:
    """A level of host memory, used by so many threads; by so many of each of several ranks, one's share of it."""
    memory: MemoryRates = results[MEMORY]
    all_threads = threads_of_ranks(run, threads, ranks)

    def rates(timings: "dict[int, Timing]", what: str) -> Rate:
        def figure(count: int, more: str = "") -> Figure:
            note = f"{what} with {counted(count, 'thread')} {memory.note}{more}"
            return timings[count].rate(memory.num_bytes, note)

        at_best = min(timings, key=lambda count: timings[count].median_s)
        others = [f"with {count} {format_bandwidth(figure(count).value)}" for count in timings if count != at_best]
        swept = f"; {', '.join(others)}" if others else ""
        return Rate(ceiling=figure(at_best, swept).times(1 / ranks), achieved=figure(all_threads).times(1 / ranks))

    return MemoryLevel(
        name=name,
        capacity_bytes=capacity,
        reserve_bytes=reserve,
        read_bytes_per_s=rates(memory.read, "dot product"),
        copy_bytes_per_s=rates(memory.copy, "copy"),
        processor=processor_of(results, name, run, run.host.cpu_name, threads),
    )


def threads_of_ranks(run: Run, threads: int, ranks: int) -> int:
    """How many threads all ranks have where one has so many: no more than there are cores, unless one rank has."""
    return max(threads, min(ranks * threads, run.host.usable_cores))


def ram_of(host: HostFacts, less_bytes: int = 0) -> tuple[Figure, Figure]:
    """Capacity and reserve of the host's memory, without what an emulated GPU takes."""
    note = "" if host.ram_limit_bytes is None else "the cgroup's limit"
    if less_bytes:
        note += f"{'; ' if note else ''}less the emulated GPU's memory"
    capacity = host.usable_ram_bytes - less_bytes
    if capacity <= 0:
        raise ProfileError(
            "--gpu-memory",
            f"<{format_bytes(less_bytes)}>",
            f"must be less than the {format_bytes(host.usable_ram_bytes)} of RAM, in which it lies",
            "ask for less",
        )
    reserve = int(RESERVE_SHARE * capacity)
    return (
        Figure(value=float(capacity), source=Source.MEASURED, note=note),
        Figure(value=float(reserve), source=Source.ASSUMED, note=f"{RESERVE_SHARE:.0%} of RAM"),
    )


def pinnable_of(host: HostFacts) -> Figure | None:
    """What the host can pin, where that is known not to be all."""
    if not host.is_wsl:
        return None
    return Figure(
        value=PINNED_BY_WSL * host.usable_ram_bytes,
        source=Source.ASSUMED,
        note=f"{PINNED_BY_WSL:.0%} of RAM: WSL pins a part of it, which was not measured",
    )
