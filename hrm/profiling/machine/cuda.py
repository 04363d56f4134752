"""A machine with CUDA devices: one, or several that a plan uses as one level."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from hrm.contract.lane_threads import lane_threads
from hrm.hardware import CPU, GPU, Figure, HardwareProfile, Rate
from hrm.profiling.machine.gpu_level import FACTS, MEMORY, GpuMemory, gpu_environment, gpu_level, memory_of
from hrm.profiling.machine.gpu_links import add_links, links_of
from hrm.profiling.machine.host import (
    ALL_AT_ONCE,
    CACHES,
    MOST_SHARE,
    STAGING,
    add_disk,
    add_host_memory,
    add_processor,
    add_staging,
    attention_step,
    attention_worker,
    gemm_step,
    host_facts_of,
    launch_step,
    staging_worker,
)
from hrm.profiling.machine.levels import host_level, pinnable_of, ram_of
from hrm.profiling.machine.run import Run
from hrm.tasks import Lane
from hrm.units import GIB, MIB

if TYPE_CHECKING:
    from hrm.profiling.gpu import AbstractGpu
    from hrm.profiling.nvml import GpuFacts
    from hrm.profiling.settle import Settling
    from hrm.profiling.timing import Computer

QUICK_TRANSFER: Final = 128 * MIB  # the largest that is timed; buffers take long to fill and check
FULL_TRANSFER: Final = 512 * MIB
CONTENTION_TRANSFER: Final = 32 * MIB
SETTLING: Final = "gpu under load"
EQUAL: Final = "gpus compared"
UNEQUAL: Final = 0.90  # a GPU below this share of the first is named, and plans wait for it


def profile_cuda(run: Run, gpus: Sequence["AbstractGpu"]) -> HardwareProfile:
    """The GPUs, the host and the links between them.

    Several GPUs are one level: the first is measured, the others are compared with it, and links
    are measured one by one and all at once. What they hold together may be capped by an option.
    """
    from hrm.profiling.contention import shared_roof

    busy = [warning for gpu in gpus for warning in gpu.busy_before()]
    if not all(gpu.has_bfloat16 for gpu in gpus):
        run = replace(run, options=run.options.without_bfloat16())
    memory = memory_of(gpus, run.options.gpu_memory_bytes)
    _add_gpu(run, gpus[0], memory)
    if len(gpus) > 1:
        _add_comparison(run, gpus)
    cpu_threads = _threads(run, Lane.CPU)
    add_processor(run, CPU, cpu_threads)
    add_host_memory(run, [cpu_threads])
    of_host = run.host.usable_ram_bytes // MOST_SHARE // len(gpus)
    most = QUICK_TRANSFER if run.options.quick else FULL_TRANSFER
    largest = min(most, memory.free_bytes // 4, of_host)
    planned, alone = add_links(run, gpus, largest)
    _add_facts(run, gpus)
    add_staging(run, _threads(run, Lane.STAGE), gpus[0].pinned)
    run.steps.add(ALL_AT_ONCE, 2, lambda seconds: _all_at_once(run, gpus, largest, seconds), Figure)
    add_disk(run)
    results = run.steps.run()

    facts: tuple[GpuFacts, ...] = results[FACTS]
    settling: Settling = results[SETTLING]
    slowest = min(results[EQUAL]) / results[EQUAL][0] if len(gpus) > 1 else 1.0
    links, of_links = links_of(results, planned, alone, facts, len(gpus))
    warnings = [*busy, *of_links, *_warnings(results, gpus, slowest)]
    disk, host_lines = host_facts_of(results)
    level = host_level(results, run, CPU, cpu_threads, *ram_of(run.host))
    host = replace(
        level,
        pinnable_bytes=pinnable_of(run.host),
        caches=results[CACHES],
        shared_bytes_per_s=shared_roof(results[ALL_AT_ONCE], level.read_bytes_per_s),
    )
    factor = len(gpus) * (slowest if slowest < UNEQUAL else 1.0)
    capped = run.options.gpu_memory_bytes is not None
    count = f"{len(gpus)}x " if len(gpus) > 1 else ""
    return HardwareProfile(
        name=f"{count}{gpus[0].name} in {run.host.cpu_name}, {run.threads} cores",
        accelerator="cuda",
        num_gpus=len(gpus),
        levels=(gpu_level(results, run, gpus, memory, factor, capped=capped), host),
        links=(*links, results[STAGING]),
        disk=disk,
        environment={**gpu_environment(gpus, facts, settling), **host_lines, "warnings": "; ".join(warnings)},
    )


def _warnings(results: dict[str, Any], gpus: Sequence["AbstractGpu"], slowest: float) -> list[str]:
    """What a reader must know of GPUs, the slowest of which reaches such a share of the first."""
    found: list[str] = []
    if slowest < UNEQUAL:
        index = results[EQUAL].index(min(results[EQUAL]))
        found.append(f"gpu{index} reaches {slowest:.0%} of gpu0; plans wait for the slowest")
    if len({gpu.name for gpu in gpus}) > 1:
        found.append(f"the GPUs differ: {', '.join(gpu.name for gpu in gpus)}")
    if any(gpu.shares_memory for gpu in gpus):
        found.append(
            "GPU and CPU share one memory, which these levels count twice: plan with --gpu-memory"
            " and --cpu-memory that add up to it, or with unified memory of the catalog"
        )
    settling: Settling = results[SETTLING]
    facts: tuple[GpuFacts, ...] = results[FACTS]
    of_gpus = [f"gpu{index}: {text}" for index, told in enumerate(facts) for text in told.warnings]
    return [*found, *settling.warnings("gpu0"), *of_gpus]


def _add_gpu(run: Run, gpu: "AbstractGpu", memory: GpuMemory) -> None:
    """Add the steps that measure one GPU: it settles, then launches, products, attention and memory."""
    from hrm.profiling.attention import Heads, attention_rate
    from hrm.profiling.launch import launch_latency
    from hrm.profiling.memory import DeviceMemoryRates, measure_device_memory
    from hrm.profiling.settle import Settling, settle
    from hrm.profiling.timing import Computer, Latency

    sampler, device = gpu.sampler(), gpu.device
    computer = Computer(device=device, sampler=sampler)
    run.steps.add(SETTLING, 3, lambda seconds: settle(gpu, seconds=seconds), Settling, once=True)
    run.steps.add(
        launch_step(GPU), 1, lambda seconds: launch_latency(device=device, budget_s=seconds, sampler=sampler), Latency
    )
    _add_products(run, computer, memory)
    run.steps.add(
        attention_step(GPU),
        2,
        lambda seconds: attention_rate(
            run.dtypes[0],
            Heads.of(run.options.model),
            replace(computer, most_bytes=memory.free_bytes // MOST_SHARE),
            quick=run.options.quick,
            budget_s=seconds,
            at_once=True,
        ),
        Rate,
    )
    array_bytes = max(MIB, min(GIB, memory.free_bytes // 4) // MIB * MIB)
    run.steps.add(
        MEMORY,
        2,
        lambda seconds: measure_device_memory(device, num_bytes=array_bytes, budget_s=seconds, sampler=sampler),
        DeviceMemoryRates,
    )


def _add_products(run: Run, computer: "Computer", memory: GpuMemory) -> None:
    """GEMMs of the model's shapes in every dtype, as far as the card has it."""
    import torch

    from hrm.profiling.gemm import gemm_rate, model_shapes

    shapes = model_shapes(run.options.model, quick=run.options.quick, scale_down=memory.free_bytes < 16 * GIB)
    for dtype in run.dtypes:

        def gemm(seconds: float, dtype: str = dtype) -> Rate | None:
            # Kernels overlap with the launch of the next, so nothing is taken off.
            try:
                return gemm_rate(
                    dtype,
                    shapes,
                    replace(computer, most_bytes=memory.free_bytes / 2),
                    quick=run.options.quick,
                    budget_s=seconds,
                    launch_s=0.0,
                )
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # a dtype that this card lacks
                return None

        run.steps.add(gemm_step(GPU, dtype), 4, gemm, Rate | None)


def _add_comparison(run: Run, gpus: Sequence["AbstractGpu"]) -> None:
    """The same GEMM on every GPU, one after the other, warm."""
    from hrm.profiling.settle import settle

    run.steps.add(
        EQUAL,
        len(gpus),
        lambda seconds: tuple(settle(gpu, seconds=seconds / len(gpus)).settled_flops_per_s for gpu in gpus),
        tuple[float, ...],
    )


def _add_facts(run: Run, gpus: Sequence["AbstractGpu"]) -> None:
    """After the links, as PCIe slows down when nothing crosses it."""
    from hrm.profiling.gpu_link import gpu_transfer
    from hrm.profiling.nvml import GpuFacts

    def facts(_: float) -> tuple[GpuFacts, ...]:
        found: list[GpuFacts] = []
        for gpu in gpus:
            gpu_transfer([gpu], to_device=True, pinned=True, largest_bytes=MIB)(MIB)()
            found.append(gpu.facts())
        return tuple(found)

    run.steps.add(FACTS, 0.1, facts, tuple[GpuFacts, ...], once=True)


def _threads(run: Run, lane: Lane) -> int:
    return lane_threads("cuda", lane, run.threads)


def _all_at_once(run: Run, gpus: Sequence["AbstractGpu"], largest: int, seconds: float) -> Figure:
    """CPU attention, staging and the links to the GPUs at once."""
    import torch

    from hrm.profiling.contention import BusyLane, bytes_together
    from hrm.profiling.gpu_link import gpu_transfer

    size = min(CONTENTION_TRANSFER, largest)

    queued = [gpu.queued(gpu_transfer([gpu], to_device=True, pinned=True, largest_bytes=size)(size)) for gpu in gpus]

    def transfers() -> None:
        for one in queued:
            one.run()
        for one in queued:
            one.wait()

    workers = {
        "attention": attention_worker(run, _threads(run, Lane.CPU)),
        "staging": staging_worker(run, size, _threads(run, Lane.STAGE), gpus[0].pinned),
        "h2d": BusyLane(transfers, lambda: torch.set_num_threads(1), float(size * len(gpus))),
    }
    with torch.inference_mode():
        return bytes_together(workers, budget_s=seconds)
