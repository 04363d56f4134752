"""A machine with a CUDA device."""

from typing import TYPE_CHECKING, Final

from hrm.errors import ProfileError
from hrm.hardware import CPU, GPU, Figure, HardwareProfile, Link, MemoryLevel, Rate, Source
from hrm.profiling.environment import gpu_facts
from hrm.profiling.machine.levels import host_level, processor_of, ram_of
from hrm.profiling.machine.run import Run
from hrm.units import GIB, MIB

if TYPE_CHECKING:
    from hrm.profiling.timing import Sampler, Timing

CONTEXT_BYTES: Final = 800 * MIB


def profile_cuda(run: Run, device: str, gpu_memory_bytes: int | None) -> HardwareProfile:
    """The GPU `device`, the host and the links between them."""
    import torch

    from hrm.profiling.attention import Heads, attention_rate
    from hrm.profiling.gemm import gemm_rate, model_shapes
    from hrm.profiling.launch import launch_latency
    from hrm.profiling.link import cuda_transfer, measure_link, transfer_sizes
    from hrm.profiling.memory import measure_device_memory
    from hrm.profiling.timing import cuda_sampler

    sampler: Sampler = cuda_sampler(device)
    index = int(device.partition(":")[2])
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    if gpu_memory_bytes is not None and gpu_memory_bytes > total_bytes:
        raise ProfileError(
            "--gpu-memory", gpu_memory_bytes, f"{device} has {total_bytes} bytes", "ask for less"
        )
    capacity_bytes = gpu_memory_bytes or total_bytes
    in_use = 0 if gpu_memory_bytes else total_bytes - free_bytes
    array_bytes = max(MIB, min(GIB, free_bytes // 4) // MIB * MIB)
    launches: list[float] = []

    def launch(seconds: float) -> "Timing":
        timing = launch_latency(device=device, budget_s=seconds, sampler=sampler)
        launches.append(timing.median_s)
        return timing

    run.steps.add(f"{GPU} launch latency", 1, launch)
    shapes, shapes_note = model_shapes(
        run.model, quick=run.quick, scale_down=free_bytes < 16 * GIB
    )  # fmt: skip
    for dtype in run.dtypes:

        def gemm(seconds: float, dtype: str = dtype) -> Rate | None:
            # Kernels overlap with the launch of the next, so nothing is taken off.
            try:
                return gemm_rate(
                    dtype, shapes=shapes, shapes_note=shapes_note, quick=run.quick,
                    budget_s=seconds, launch_s=0.0, device=device, sampler=sampler,
                )  # fmt: skip
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # a dtype that this card lacks
                return None

        run.steps.add(f"{GPU} GEMM {dtype}", 4, gemm)
    run.steps.add(
        f"{GPU} attention", 2,
        lambda seconds: attention_rate(
            run.dtypes[0], heads=Heads.of(run.model), quick=run.quick, budget_s=seconds,
            device=device, sampler=sampler,
        ),
    )  # fmt: skip
    run.steps.add(
        f"{GPU} memory", 2,
        lambda seconds: measure_device_memory(
            device, num_bytes=array_bytes, budget_s=seconds, sampler=sampler
        ),
    )  # fmt: skip
    threads = run.host.usable_cores
    run.add_processor(CPU, threads)
    run.add_host_memory([threads])
    largest = min(512 * MIB, free_bytes // 4)
    names: list[str] = []
    for source, target in ((CPU, GPU), (GPU, CPU)):
        for pinned in (True, False):

            def transfers(
                seconds: float, source: str = source, target: str = target, *, pinned: bool = pinned
            ) -> Link:
                return measure_link(
                    source, target,
                    cuda_transfer(
                        device, to_device=target == GPU, pinned=pinned, largest_bytes=largest
                    ),
                    sizes=transfer_sizes(largest, quick=run.quick), budget_s=seconds,
                    kind="pinned" if pinned else "pageable", sampler=sampler,
                )  # fmt: skip

            names.append(f"{'pinned' if pinned else 'pageable'} link {source} to {target}")
            run.steps.add(names[-1], 2, transfers)
    run.add_staging(min(256 * MIB, largest), pinned=True)
    results = run.steps.run()
    read, copy = results[f"{GPU} memory"]
    facts = gpu_facts(index)
    note = "given on the command line" if gpu_memory_bytes else ""
    reserve_bytes = min(max(CONTEXT_BYTES, in_use), int(0.5 * capacity_bytes))
    reserve_note = "CUDA context and allocator"
    if in_use > CONTEXT_BYTES:
        reserve_note = "memory in use when measured, by this process and others"
    gpu_level = MemoryLevel(
        name=GPU,
        capacity_bytes=Figure(value=float(capacity_bytes), source=Source.MEASURED, note=note),
        reserve_bytes=Figure(value=float(reserve_bytes), source=Source.ASSUMED, note=reserve_note),
        read_bytes_per_s=Rate(achieved=read.rate(array_bytes, "dot product")),
        copy_bytes_per_s=Rate(achieved=copy.rate(array_bytes, "copy")),
        processor=processor_of(results, GPU, run, facts["gpu"], 0),
    )
    return HardwareProfile(
        name=f"{facts['gpu']} in {run.host.cpu_name}, {threads} cores",
        accelerator="cuda",
        levels=(gpu_level, host_level(results, run, CPU, threads, *ram_of(run.host))),
        links=(*(results[name] for name in names), results["staging"]),
        environment=facts,
    )
