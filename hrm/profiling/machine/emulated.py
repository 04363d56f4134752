"""A machine whose accelerator is emulated on its CPU."""

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from hrm.hardware import CPU, GPU, Figure, HardwareProfile, Link, MemoryLevel, Source
from hrm.profiling.machine.levels import host_level, ram_of
from hrm.profiling.machine.run import Run, torch_threads
from hrm.profiling.pacing import PacedCopy
from hrm.units import GB, GIB, MIB, counted, format_bandwidth

if TYPE_CHECKING:
    from hrm.profiling.timing import Timing

EMULATED_LINK_BYTES_PER_S: Final = 2.0 * GB
EMULATED_LATENCY_S: Final = 20e-6
EMULATED_GPU_BYTES: Final = GIB


def profile_emulated(run: Run, gpu_bytes: int, bandwidth: float) -> HardwareProfile:
    """Half of the cores as the GPU, the rest as the CPU, and links paced to `bandwidth`."""
    from hrm.profiling.launch import launch_latency_beside_another
    from hrm.profiling.link import measure_link, paced_transfer, transfer_sizes

    cores = run.host.usable_cores
    gpu_threads = max(1, cores // 2)
    cpu_threads = max(1, cores - gpu_threads)
    capacity, reserve = ram_of(run.host, gpu_bytes)
    run.add_processor(GPU, gpu_threads)
    if cpu_threads != gpu_threads:
        run.add_processor(CPU, cpu_threads)
    run.add_host_memory([gpu_threads, cpu_threads])
    arena = min(gpu_bytes, (16 if run.quick else 256) * MIB)
    stated = Figure(
        value=bandwidth,
        source=Source.ASSUMED,
        note=f"stated: the emulated link is paced to {format_bandwidth(bandwidth)}",
    )
    for source, target in ((CPU, GPU), (GPU, CPU)):

        def transfers(seconds: float, source: str = source, target: str = target) -> Link:
            pace = PacedCopy(latency_s=EMULATED_LATENCY_S, bandwidth_bytes_per_s=bandwidth)
            with torch_threads(1):
                link = measure_link(
                    source, target, paced_transfer(pace, arena),
                    sizes=transfer_sizes(arena, quick=run.quick), budget_s=seconds,
                    note="emulated", datasheet=stated,
                )  # fmt: skip
            return _at_most(link, bandwidth)

        run.steps.add(f"link {source} to {target}", 1, transfers)
    run.add_staging(arena, pinned=False)
    run.steps.add(
        "launch latency with both lanes busy", 2,
        lambda seconds: launch_latency_beside_another(
            budget_s=seconds, threads=(gpu_threads, cpu_threads)
        ),
    )  # fmt: skip
    run.steps.add(
        "contention", 3,
        lambda seconds: _contention(run, seconds, gpu_threads, cpu_threads, arena, bandwidth),
    )  # fmt: skip
    results = run.steps.run()
    if cpu_threads == gpu_threads:  # the same cores by another name
        results |= {
            f"{CPU}{name.removeprefix(GPU)}": found
            for name, found in results.items()
            if name.startswith(f"{GPU} ")
        }
    gpu_capacity = Figure(value=float(gpu_bytes), source=Source.ASSUMED, note="emulated")
    none = Figure(value=0.0, source=Source.ASSUMED, note="the whole arena is used")
    beside: Timing = results["launch latency with both lanes busy"]

    def with_launch_latency(level: MemoryLevel) -> MemoryLevel:
        alone = level.processor.launch_latency_s.value
        note = f"with the other lane busy too; alone {alone:.2g} s"
        processor = replace(level.processor, launch_latency_s=beside.duration(note))
        return replace(level, processor=processor)

    return HardwareProfile(
        name=f"emulated accelerator on {run.host.cpu_name}, {cores} cores",
        accelerator="emulated",
        levels=(
            with_launch_latency(host_level(results, run, GPU, gpu_threads, gpu_capacity, none)),
            with_launch_latency(host_level(results, run, CPU, cpu_threads, capacity, reserve)),
        ),
        links=(
            results[f"link {CPU} to {GPU}"],
            results[f"link {GPU} to {CPU}"],
            results["staging"],
        ),
        environment={
            "emulated_lanes": f"gpu {counted(gpu_threads, 'thread')}, "
            f"cpu {counted(cpu_threads, 'thread')}",
            "contention": results["contention"],
        },
    )


def _at_most(link: Link, bandwidth: float) -> Link:
    """The link without what a noisy fit found above the bandwidth that it is paced to."""
    rate, found = link.bandwidth_bytes_per_s, link.bandwidth_bytes_per_s.planned
    if found.value <= bandwidth:
        return link
    return replace(
        link, bandwidth_bytes_per_s=replace(rate, achieved=replace(found, value=bandwidth))
    )


def _contention(
    run: Run, seconds: float, gpu_threads: int, cpu_threads: int, arena: int, bandwidth: float
) -> str:
    """What GEMMs, attention and a link's copies keep of their rates when all run at once."""
    import torch

    from hrm.profiling.attention import Heads, attention_call
    from hrm.profiling.contention import Worker, measure_contention
    from hrm.profiling.link import paced_transfer

    dtype: torch.dtype = getattr(torch, run.dtypes[0])
    x, weight = torch.randn(64, 512).to(dtype), torch.randn(512, 1024).to(dtype)
    out = torch.empty(64, 1024, dtype=dtype)
    pace = PacedCopy(latency_s=EMULATED_LATENCY_S, bandwidth_bytes_per_s=bandwidth)
    size = min(arena, MIB)
    shares = measure_contention(
        {
            "GEMM": Worker(
                lambda: torch.mm(x, weight, out=out), lambda: torch.set_num_threads(gpu_threads)
            ),
            "attention": Worker(
                attention_call(dtype, Heads.of(run.model), 4, 512),
                lambda: torch.set_num_threads(cpu_threads),
            ),
            "link": Worker(paced_transfer(pace, size)(size), lambda: torch.set_num_threads(1)),
        },
        budget_s=seconds,
    )
    kept = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    return f"share of the rate alone that is kept when all run at once: {kept}"
