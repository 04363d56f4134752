"""Steps about the host, which every kind of machine has: processor, memory, caches, disk."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from hrm.hardware import CPU, Cache, Disk, LaneThreads, Link, Rate
from hrm.profiling import topology
from hrm.profiling.machine.run import Run, torch_threads
from hrm.units import MIB, counted

if TYPE_CHECKING:
    import torch

    from hrm.profiling.contention import BusyLane
    from hrm.profiling.link import Transfer

MEMORY: Final = "host memory"
CACHES: Final = "caches"
NUMA: Final = "NUMA nodes"
STAGING: Final = "staging"
ALL_AT_ONCE: Final = "host memory, all at once"
DISK: Final = "disk"
TASKS: Final = "running tasks"
QUICK_SOURCE_BYTES: Final = 512 * MIB
MOST_SHARE: Final = 8  # a buffer takes this part of the memory at most


def launch_step(level: str) -> str:
    """Name of the step that measures the launch latency at a level."""
    return f"{level} launch latency"


def gemm_step(level: str, dtype: str) -> str:
    """Name of the step that measures GEMMs of a dtype at a level."""
    return f"{level} GEMM {dtype}"


def attention_step(level: str) -> str:
    """Name of the step that measures decode attention at a level."""
    return f"{level} attention"


@dataclass(frozen=True, slots=True)
class DiskFound:
    """The disk, or why it was not measured."""

    disk: Disk | None = None
    why_not: str = ""


def add_processor(run: Run, level: str, threads: int) -> None:
    """Launch latency, GEMMs and decode attention with so many of the CPU's threads."""
    from hrm.profiling.attention import Heads, attention_rate
    from hrm.profiling.gemm import gemm_rate, model_shapes
    from hrm.profiling.launch import launch_latency
    from hrm.profiling.timing import Computer, Latency

    computer = Computer(kernels=run.options.kernels)

    def launch(seconds: float) -> Latency:
        with torch_threads(threads):
            return launch_latency(budget_s=seconds)

    run.steps.add(launch_step(level), 1, launch, Latency)
    shapes = model_shapes(run.options.model, quick=run.options.quick)
    plain = [(dtype, dtype, "", 4) for dtype in run.dtypes]
    packed = [(code, run.dtypes[0], form, 2) for code, form in run.packed.items()]
    for name, dtype, form, share in (*plain, *packed):

        def gemm(seconds: float, dtype: str = dtype, form: str = form) -> Rate:
            with torch_threads(threads):
                return gemm_rate(
                    dtype,
                    shapes,
                    computer,
                    quick=run.options.quick,
                    budget_s=seconds,
                    launch_s=run.steps.found[launch_step(level)].median_s,
                    packed=form,
                )

        run.steps.add(gemm_step(level, name), share, gemm, Rate)

    def attention(seconds: float) -> Rate:
        with torch_threads(threads):
            return attention_rate(
                run.dtypes[0],
                Heads.of(run.options.model),
                replace(computer, most_bytes=run.host.usable_ram_bytes // MOST_SHARE),
                quick=run.options.quick,
                budget_s=seconds,
            )

    run.steps.add(attention_step(level), 3, attention, Rate)


def add_host_memory(run: Run, threads: Sequence[int]) -> None:
    """Memory over a sweep of threads, these among them; its caches; its NUMA nodes."""
    from hrm.profiling.caches import measure_caches
    from hrm.profiling.memory import MemoryRates, array_bytes, measure_memory
    from hrm.profiling.numa import NumaRead, measure_numa

    host = run.host
    cores, cache = host.usable_cores, host.last_level_cache_bytes
    sweep = {1, *threads, cores}
    doubled = 2
    while not run.options.quick and doubled < cores:
        sweep.add(doubled)
        doubled *= 2
    size = array_bytes(cache, host.usable_ram_bytes, quick=run.options.quick)
    run.steps.add(
        MEMORY,
        5,
        lambda seconds: measure_memory(num_bytes=size, last_level_cache_bytes=cache, threads=sweep, budget_s=seconds),
        MemoryRates,
    )
    run.steps.add(
        CACHES,
        3,
        lambda seconds: measure_caches(
            host.caches, threads=host.compute_threads, budget_s=seconds, quick=run.options.quick
        ),
        tuple[Cache, ...],
    )
    nodes = topology.numa_nodes(topology.allowed_cpus())
    if len(nodes) > 1:
        node_bytes = array_bytes(0, host.usable_ram_bytes // len(nodes), quick=run.options.quick)
        run.steps.add(
            NUMA,
            2 * len(nodes),
            lambda seconds: measure_numa(nodes, num_bytes=node_bytes, budget_s=seconds),
            tuple[NumaRead, ...],
        )


def add_staging(run: Run, threads: int, pinned: "Callable[[int], torch.Tensor] | None" = None) -> None:
    """Copies within the host by the threads of a lane, from pageable to `pinned` memory.

    Without any they go to pageable memory.
    """
    from hrm.profiling.link import measure_link, transfer_sizes

    largest = _largest_staged(run)

    def staging(seconds: float) -> Link:
        with torch_threads(threads):
            return measure_link(
                CPU,
                CPU,
                _staging_transfer(run, largest, pinned),
                kind="staging",
                sizes=transfer_sizes(largest, quick=run.options.quick),
                budget_s=seconds,
                note=counted(threads, "thread") + ("" if pinned else "; nothing is pinned here"),
            )

    run.steps.add(STAGING, 2, staging, Link)


def _largest_staged(run: Run) -> int:
    most = (16 if run.options.quick else 256) * MIB
    return max(MIB, min(most, run.host.usable_ram_bytes // MOST_SHARE))


def _staging_transfer(run: Run, largest: int, pinned: "Callable[[int], torch.Tensor] | None") -> "Transfer":
    """Staging out of more than the caches hold."""
    import torch

    from hrm.profiling.link import host_transfer
    from hrm.profiling.memory import array_bytes

    host = run.host
    beyond = array_bytes(host.last_level_cache_bytes, host.usable_ram_bytes, quick=run.options.quick)
    source = max(largest, min(beyond, QUICK_SOURCE_BYTES) if run.options.quick else beyond)
    target = pinned(largest) if pinned else torch.zeros(largest, dtype=torch.uint8)
    if run.options.kernels is None:
        return host_transfer(source, target)
    return host_transfer(source, target, run.options.kernels.stage)


def add_disk(run: Run) -> None:
    """The disk under a folder, if one is to be measured."""
    folder = run.options.disk
    if folder is None:
        return
    from hrm.profiling.disk import DiskError, measure_disk

    def disk(seconds: float) -> DiskFound:
        try:
            return DiskFound(measure_disk(folder, budget_s=seconds, quick=run.options.quick))
        except DiskError as error:
            return DiskFound(why_not=str(error))

    run.steps.add(DISK, 3, disk, DiskFound)


def add_tasks(run: Run, ranks: int = 1) -> bool:
    """What running a task takes whatever it does, of one of so many ranks; whether a runtime tells."""
    kernels = run.options.kernels
    if kernels is None or (seconds_a_task := kernels.seconds_a_task) is None:
        return False
    from hrm.profiling.timing import Latency

    def lanes(_: float) -> LaneThreads:
        a_task = Latency.of(seconds_a_task(ranks)).duration(
            "of the processor, for tasks of decode that do next to nothing"
        )
        return LaneThreads(cores=run.threads, task_s=a_task)

    run.steps.add(TASKS, 0.1, lanes, LaneThreads, once=True)
    return True


def host_facts_of(results: dict[str, Any]) -> tuple[Disk | None, dict[str, str]]:
    """The disk, and lines for the environment: of NUMA nodes, and why there is no disk."""
    from hrm.profiling.numa import describe_numa

    found: DiskFound = results.get(DISK, DiskFound())
    lines = {"numa": describe_numa(results[NUMA])} if NUMA in results else {}
    if found.why_not and found.disk is None:
        lines["disk"] = f"not measured: {found.why_not}"
    return found.disk, lines


def attention_worker(run: Run, threads: int) -> "BusyLane":
    """Decode attention as a lane does it; its bytes are the KV cache's."""
    import torch

    from hrm.profiling.attention import QUICK_BYTES, Heads, KvCache, attention_call, kernels_call
    from hrm.profiling.contention import BusyLane

    most = min(QUICK_BYTES, run.host.usable_ram_bytes // MOST_SHARE)
    cache = KvCache(getattr(torch, run.dtypes[0]), Heads.of(run.options.model), most, "cpu")
    context = 512
    requests = min(16, cache.tokens // context)
    if run.options.kernels is None:
        call = attention_call(cache, requests, context)
    else:
        call = kernels_call(run.options.kernels, cache, requests, context)
    host_bytes = requests * context * cache.token_bytes
    return BusyLane(call, lambda: torch.set_num_threads(threads), host_bytes)


def staging_worker(
    run: Run, size: int, threads: int, pinned: "Callable[[int], torch.Tensor] | None" = None
) -> "BusyLane":
    """Staging as a lane does it; a copy reads and writes."""
    import torch

    from hrm.profiling.contention import BusyLane

    call = _staging_transfer(run, size, pinned)(size)
    return BusyLane(call, lambda: torch.set_num_threads(threads), 2.0 * size)
