"""A machine whose accelerator is emulated on its CPU."""

from dataclasses import replace
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Final

from hrm.contract.lane_threads import lane_threads
from hrm.contract.pacing import EMULATED_LATENCY_S, PacedCopy, Waits
from hrm.hardware import CPU, GPU, Figure, HardwareProfile, Link, MemoryLevel, Rate, Source
from hrm.machines import of_parts
from hrm.profiling.machine.host import (
    ALL_AT_ONCE,
    CACHES,
    STAGING,
    TASKS,
    add_disk,
    add_host_memory,
    add_processor,
    add_staging,
    add_tasks,
    attention_worker,
    host_facts_of,
    staging_worker,
)
from hrm.profiling.machine.levels import host_level, ram_of, request_latency, threads_of_ranks
from hrm.profiling.machine.options import LONGEST_TRANSFER_S, SMALLEST_ARENA
from hrm.profiling.machine.run import Run, torch_threads
from hrm.tasks import Lane
from hrm.units import GB, GIB, KIB, MIB, counted, format_bandwidth

if TYPE_CHECKING:
    from hrm.profiling.timing import Call, Timing

EMULATED_LINK_BYTES_PER_S: Final = 2.0 * GB
EMULATED_GPU_BYTES: Final = GIB
STAGED_BYTES: Final = MIB
CONTENTION_TRANSFER_S: Final = 0.005
SUMS: Final = "sums between ranks"
FEW_SUMMED_BYTES: Final = 4 * KIB
MANY_SUMMED_BYTES: Final = MIB
BOTH_BUSY: Final = "launch latency with both lanes busy"


def profile_emulated(run: Run) -> HardwareProfile:
    """Half of the cores as the GPU, the rest as the CPU, and links of the asked-for bandwidth.

    Of several emulated accelerators one is measured with as many threads as its share of the cores has, the host's
    memory with the threads of all of them, as all use it at once; and sums between processes that have such shares.
    """
    count = run.options.emulated_count
    gpu_bytes = run.options.gpu_memory_bytes
    if gpu_bytes is None:
        gpu_bytes = min(EMULATED_GPU_BYTES, run.host.usable_ram_bytes // 8)
    if count == 1:
        return _profile_one(run, gpu_bytes)
    run.steps.add(SUMS, 0.1, lambda _: _between_ranks(run, count), Link, once=True)
    part = _profile_one(replace(run, threads=max(1, run.threads // count)), gpu_bytes // count, count)
    whole = of_parts(part, count, run.steps.found[SUMS])
    return replace(whole, name=f"{count} emulated accelerators on {run.host.cpu_name}, {run.threads} cores")


def _between_ranks(run: Run, count: int) -> Link:
    """What sums of few and of many bytes tell of the ring that `hrm.costs` has them go around."""
    from hrm.profiling.timing import measured

    kernels = run.options.kernels
    assert kernels is not None, "checked with the options"
    assert kernels.sums_between is not None, "checked with the options"
    taken = kernels.sums_between(count, (FEW_SUMMED_BYTES, MANY_SUMMED_BYTES))
    few, many = (sorted(taken[size]) for size in (FEW_SUMMED_BYTES, MANY_SUMMED_BYTES))
    turns = 2 * (count - 1)
    latencies = [seconds / turns for seconds in few]
    moved = turns / count * (MANY_SUMMED_BYTES - FEW_SUMMED_BYTES)
    note = f"sums between {count} processes, among the tasks of their other lanes"
    # What many of them take together counts: now and then all wait for one that is late.
    found = measured(fmean(latencies), latencies, note)
    rate = moved / max(median(many) - median(few), 1e-9)
    bandwidth = Figure(value=rate, source=Source.MEASURED, note=note, samples=len(many))
    return Link(source=GPU, target=GPU, kind="peer", latency_s=found, bandwidth_bytes_per_s=Rate(achieved=bandwidth))


def _profile_one(run: Run, gpu_bytes: int, count: int = 1) -> HardwareProfile:
    from hrm.profiling.contention import shared_roof

    gpu_threads, cpu_threads = _threads(run, Lane.GPU), _threads(run, Lane.CPU)
    capacity, reserve = (figure.times(1 / count) for figure in ram_of(run.host, count * gpu_bytes))
    # Plans that know how many cores lanes share have each wait while another has them.
    if not (add_tasks(run, count) and gpu_threads + cpu_threads > run.threads):
        _add_both_busy(run, gpu_threads, cpu_threads)
    results = _measured(run, gpu_bytes, gpu_threads, cpu_threads, count)
    gpu_capacity = Figure(value=float(gpu_bytes), source=Source.ASSUMED, note="emulated")
    none = Figure(value=0.0, source=Source.ASSUMED, note="the whole arena is used")
    gpu = host_level(results, run, GPU, gpu_threads, gpu_capacity, none, count)
    cpu = host_level(results, run, CPU, cpu_threads, capacity, reserve, count)
    disk, facts = host_facts_of(results)
    return HardwareProfile(
        name=f"emulated accelerator on {run.host.cpu_name}, {run.threads} cores",
        accelerator="emulated",
        levels=(
            _with_launch_latency(gpu, results.get(BOTH_BUSY)),
            replace(
                _with_launch_latency(cpu, results.get(BOTH_BUSY)),
                caches=results[CACHES],
                shared_bytes_per_s=shared_roof(results[ALL_AT_ONCE], cpu.read_bytes_per_s),
            ),
        ),
        links=(results[f"link {CPU} to {GPU}"], results[f"link {GPU} to {CPU}"], results[STAGING]),
        lane_threads=results.get(TASKS),
        disk=disk,
        environment={
            "emulated_lanes": f"gpu {counted(gpu_threads, 'thread')}, cpu {counted(cpu_threads, 'thread')}",
            **facts,
        },
    )


def _measured(run: Run, gpu_bytes: int, gpu_threads: int, cpu_threads: int, ranks: int) -> dict[str, Any]:
    """What all steps found; levels of equally many threads are the same cores and measured once."""
    add_processor(run, GPU, gpu_threads)
    if cpu_threads != gpu_threads:
        add_processor(run, CPU, cpu_threads)
    add_host_memory(run, [threads_of_ranks(run, threads, ranks) for threads in (gpu_threads, cpu_threads)])
    bandwidth = run.options.link_bandwidth_bytes_per_s
    if bandwidth is None:
        bandwidth = EMULATED_LINK_BYTES_PER_S
    most = (16 if run.options.quick else 256) * MIB
    arena = max(SMALLEST_ARENA, min(gpu_bytes, most, int(bandwidth * LONGEST_TRANSFER_S)))
    for source, target in ((CPU, GPU), (GPU, CPU)):
        _add_link(run, source, target, arena, bandwidth)
    add_staging(run, _threads(run, Lane.STAGE))
    run.steps.add(ALL_AT_ONCE, 2, lambda seconds: _all_at_once(run, seconds, arena, bandwidth, ranks), Figure)
    add_disk(run)
    results = run.steps.run()
    if cpu_threads != gpu_threads:
        return results
    of_gpu = {name.removeprefix(GPU): found for name, found in results.items() if name.startswith(f"{GPU} ")}
    return results | {f"{CPU}{name}": found for name, found in of_gpu.items()}


def _add_both_busy(run: Run, gpu_threads: int, cpu_threads: int) -> None:
    from hrm.profiling.launch import launch_latency_beside_another
    from hrm.profiling.timing import Latency

    run.steps.add(
        BOTH_BUSY,
        4,
        lambda seconds: launch_latency_beside_another(budget_s=seconds, threads=(gpu_threads, cpu_threads)),
        Latency,
    )


def _add_link(run: Run, source: str, target: str, arena: int, bandwidth: float) -> None:
    from hrm.profiling.link import measure_link, paced_transfer, transfer_sizes

    def transfers(seconds: float) -> Link:
        with torch_threads(1):
            link = measure_link(
                source,
                target,
                paced_transfer(_pace(bandwidth), arena),
                sizes=transfer_sizes(arena, quick=run.options.quick),
                budget_s=seconds,
                note="emulated",
            )
        return _as_paced(link, bandwidth)

    run.steps.add(f"link {source} to {target}", 2, transfers, Link)


def _with_launch_latency(level: MemoryLevel, beside: "Timing | None") -> MemoryLevel:
    """The level with the launch latency beside another busy lane, which is how it is used, if that was measured."""
    if beside is None:
        return level
    alone = level.processor.launch_latency_s.value
    note = f"with the other lane busy too; alone {alone:.2g} s"
    processor = replace(
        level.processor,
        launch_latency_s=beside.duration(note),
        attention_request_s=level.processor.attention_request_s and request_latency(beside),
    )
    return replace(level, processor=processor)


def _pace(bandwidth: float) -> PacedCopy:
    return PacedCopy(latency_s=EMULATED_LATENCY_S, bandwidth_bytes_per_s=bandwidth, sleep=Waits().sleep)


def _as_paced(link: Link, bandwidth: float) -> Link:
    """The link with the bandwidth that it is paced to stated, and without what a noisy fit found above that."""
    note = f"stated: the emulated link is paced to {format_bandwidth(bandwidth)}"
    stated, found = Figure(value=bandwidth, source=Source.ASSUMED, note=note), link.bandwidth_bytes_per_s.planned
    if found.value > bandwidth:
        p20 = bandwidth if found.p20 is None else min(found.p20, bandwidth)
        found = replace(found, value=bandwidth, p20=p20)
    return replace(link, bandwidth_bytes_per_s=Rate(datasheet=stated, achieved=found))


def _threads(run: Run, lane: Lane) -> int:
    return lane_threads("emulated", lane, run.threads)


def _all_at_once(run: Run, seconds: float, arena: int, bandwidth: float, ranks: int) -> Figure:
    """Attention, staging, the link and GEMMs at once, those of all ranks; one's share of the bytes.

    A paced transfer reads and writes the host's memory, as the GPU's arena lies there too; GEMMs
    stay in the caches.
    """
    import torch

    from hrm.profiling.contention import BusyLane, bytes_together
    from hrm.profiling.link import paced_transfer

    dtype: torch.dtype = getattr(torch, run.dtypes[0])
    size = max(SMALLEST_ARENA, min(arena, MIB, int(bandwidth * CONTENTION_TRANSFER_S)))

    def products() -> "Call":
        x, weight = torch.randn(64, 512).to(dtype), torch.randn(512, 1024).to(dtype)
        out = torch.empty(64, 1024, dtype=dtype)
        return lambda: torch.mm(x, weight, out=out)

    def lanes() -> dict[str, BusyLane]:
        transfer = paced_transfer(_pace(bandwidth), size)(size)
        return {
            "attention": attention_worker(run, _threads(run, Lane.CPU)),
            "staging": staging_worker(run, STAGED_BYTES, _threads(run, Lane.STAGE)),
            "h2d": BusyLane(transfer, lambda: torch.set_num_threads(1), 2.0 * size),
            "gemm": BusyLane(products(), lambda: torch.set_num_threads(_threads(run, Lane.GPU))),
        }

    workers = {
        f"{name} of rank {rank}" if ranks > 1 else name: lane for rank in range(ranks) for name, lane in lanes().items()
    }
    with torch.inference_mode():
        return bytes_together(workers, budget_s=seconds).times(1 / ranks)
