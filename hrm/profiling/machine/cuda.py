"""A machine with CUDA devices: one, or several that a plan uses as one level."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import TYPE_CHECKING, Any, Final

from hrm.errors import ProfileError
from hrm.hardware import CPU, GPU, Figure, HardwareProfile, Link, MemoryLevel, Rate, Source
from hrm.machines import load_gpu
from hrm.profiling.machine.host import (
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
from hrm.profiling.machine.levels import each_figure, host_level, processor_of, ram_of, scaled
from hrm.profiling.machine.run import Run
from hrm.units import GIB, MIB, format_bandwidth

if TYPE_CHECKING:
    from hrm.profiling.contention import SharedMemory
    from hrm.profiling.gpu import AbstractGpu
    from hrm.profiling.nvml import GpuFacts
    from hrm.profiling.settle import Settling

CONTEXT_BYTES: Final = 800 * MIB
LARGEST_TRANSFER: Final = 512 * MIB
CONTENTION_TRANSFER: Final = 32 * MIB
SETTLING: Final = "gpu under load"
MEMORY: Final = "gpu memory"
EQUAL: Final = "gpus compared"
FACTS: Final = "gpu facts"
CONTENTION: Final = "contention"
UNEQUAL: Final = 0.90  # a GPU below this share of the first is named, and plans wait for it

DATASHEETS: Final = {  # CUDA's names of cards whose variant they leave in no doubt
    "Tesla T4": "T4",
    "Tesla V100-SXM2-16GB": "V100-16G",
    "Tesla V100-SXM2-32GB": "V100-32G",
    "Tesla V100-PCIE-16GB": "V100-PCIe-16G",
    "NVIDIA L4": "L4",
    "NVIDIA L40S": "L40S",
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
class _Memory:
    """What all the GPUs have at least, each."""

    free_bytes: int
    total_bytes: int
    capacity_bytes: int


def profile_cuda(
    run: Run, gpus: Sequence["AbstractGpu"], gpu_memory_bytes: int | None
) -> HardwareProfile:
    """The GPUs, the host and the links between them.

    Several GPUs are one level: the first is measured, the others are compared with it, and links
    are measured one by one and all at once. `gpu_memory_bytes` caps what they hold together.
    """
    from hrm.profiling.contention import SharedMemory, shared_roof

    busy = [warning for gpu in gpus for warning in gpu.busy_before()]
    memory = _memory_of(gpus, gpu_memory_bytes)
    _add_gpu(run, gpus[0], memory)
    if len(gpus) > 1:
        _add_comparison(run, gpus)
    add_processor(run, CPU, run.threads)
    add_host_memory(run, [run.threads])
    of_host = run.host.usable_ram_bytes // MOST_SHARE // len(gpus)
    largest = min(LARGEST_TRANSFER, memory.free_bytes // 4, of_host)
    planned, alone = _add_links(run, gpus, largest)
    _add_facts(run, gpus)
    add_staging(run, min(LARGEST_TRANSFER // 2, largest), gpus[0].pinned)
    run.steps.add(
        CONTENTION, 5, lambda seconds: _contention(run, gpus, largest, seconds), SharedMemory
    )
    add_disk(run)
    results = run.steps.run()

    facts: tuple[GpuFacts, ...] = results[FACTS]
    settling: Settling = results[SETTLING]
    shared: SharedMemory = results[CONTENTION]
    slowest = min(results[EQUAL]) / results[EQUAL][0] if len(gpus) > 1 else 1.0
    links, warnings = _links(results, planned, alone, facts, len(gpus))
    if slowest < UNEQUAL:
        index = results[EQUAL].index(min(results[EQUAL]))
        warnings.append(f"gpu{index} reaches {slowest:.0%} of gpu0; plans wait for the slowest")
    warnings += settling.warnings("gpu0")
    warnings += [
        f"gpu{index}: {text}" for index, told in enumerate(facts) for text in told.warnings
    ]
    disk, host_lines = host_facts_of(results)
    level = host_level(results, run, CPU, run.threads, *ram_of(run.host))
    host = replace(
        level,
        caches=results[CACHES],
        shared_bytes_per_s=shared_roof(shared.together_bytes_per_s, level.read_bytes_per_s),
    )
    factor = len(gpus) * (slowest if slowest < UNEQUAL else 1.0)
    gpu_level = _gpu_level(results, run, gpus, memory, factor, capped=gpu_memory_bytes is not None)
    count = f"{len(gpus)}x " if len(gpus) > 1 else ""
    return HardwareProfile(
        name=f"{count}{gpus[0].name} in {run.host.cpu_name}, {run.threads} cores",
        accelerator="cuda",
        num_gpus=len(gpus),
        levels=(gpu_level, host),
        links=(*links, results[STAGING]),
        disk=disk,
        contention=shared.kept,
        environment={
            **_environment(gpus, facts, settling),
            **host_lines,
            "warnings": "; ".join([*busy, *warnings]),
        },
    )


def _memory_of(gpus: Sequence["AbstractGpu"], asked_bytes: int | None) -> _Memory:
    sizes = [gpu.memory_bytes() for gpu in gpus]
    free, total = min(size for size, _ in sizes), min(size for _, size in sizes)
    if asked_bytes is not None and asked_bytes > total * len(gpus):
        raise ProfileError(
            "--gpu-memory", asked_bytes,
            f"{' and '.join(gpu.device for gpu in gpus)} have {total * len(gpus)} bytes",
            "ask for less",
        )  # fmt: skip
    return _Memory(free, total, (asked_bytes or total * len(gpus)) // len(gpus))


# --------------------------------------------------------------------------------------- steps


def _add_gpu(run: Run, gpu: "AbstractGpu", memory: _Memory) -> None:
    import torch

    from hrm.profiling.attention import Heads, attention_rate
    from hrm.profiling.gemm import gemm_rate, model_shapes
    from hrm.profiling.launch import launch_latency
    from hrm.profiling.memory import measure_device_memory
    from hrm.profiling.settle import Settling, settle
    from hrm.profiling.timing import Timing

    sampler, device = gpu.sampler(), gpu.device
    run.steps.add(SETTLING, 3, lambda seconds: settle(gpu, seconds=seconds), Settling)
    run.steps.add(
        launch_step(GPU), 1,
        lambda seconds: launch_latency(device=device, budget_s=seconds, sampler=sampler), Timing,
    )  # fmt: skip
    shapes, note = model_shapes(
        run.model, quick=run.quick, scale_down=memory.free_bytes < 16 * GIB
    )  # fmt: skip
    for dtype in run.dtypes:

        def gemm(seconds: float, dtype: str = dtype) -> Rate | None:
            # Kernels overlap with the launch of the next, so nothing is taken off.
            try:
                return gemm_rate(
                    dtype, shapes=shapes, shapes_note=note, quick=run.quick,
                    budget_s=seconds, launch_s=0.0, device=device, sampler=sampler,
                    most_bytes=memory.free_bytes / 2,
                )  # fmt: skip
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # a dtype that this card lacks
                return None

        run.steps.add(gemm_step(GPU, dtype), 4, gemm, Rate | None)
    run.steps.add(
        attention_step(GPU), 2,
        lambda seconds: attention_rate(
            run.dtypes[0], heads=Heads.of(run.model), quick=run.quick, budget_s=seconds,
            most_bytes=memory.free_bytes // MOST_SHARE, device=device, sampler=sampler,
        ),
        Rate,
    )  # fmt: skip
    array_bytes = _array_bytes(memory)
    run.steps.add(
        MEMORY, 2,
        lambda seconds: measure_device_memory(
            device, num_bytes=array_bytes, budget_s=seconds, sampler=sampler
        ),
        tuple[Timing, Timing],
    )  # fmt: skip


def _array_bytes(memory: _Memory) -> int:
    return max(MIB, min(GIB, memory.free_bytes // 4) // MIB * MIB)


def _add_comparison(run: Run, gpus: Sequence["AbstractGpu"]) -> None:
    """The same GEMM on every GPU, one after the other, warm."""
    from hrm.profiling.settle import settle

    run.steps.add(
        EQUAL, len(gpus),
        lambda seconds: tuple(
            settle(gpu, seconds=seconds / len(gpus)).settled_flops_per_s for gpu in gpus
        ),
        tuple[float, ...],
    )  # fmt: skip


def _add_links(
    run: Run, gpus: Sequence["AbstractGpu"], largest: int
) -> tuple[list[str], list[str]]:
    """Names of the steps of the links that are planned with, and of each GPU's own."""
    planned: list[str] = []
    alone: list[str] = []
    for to_device in (True, False):
        planned += [
            _add_link(run, gpus, GPU, largest, to_device=to_device, pinned=True),
            _add_link(
                run,
                gpus[:1],
                GPU,
                largest,
                to_device=to_device,
                pinned=False,
                note="one GPU at a time" if len(gpus) > 1 else "",
            ),
        ]
    if len(gpus) > 1:
        alone += [
            _add_link(run, [gpu], f"{GPU}{index}", largest, to_device=to_device, pinned=True)
            for index, gpu in enumerate(gpus)
            for to_device in (True, False)
        ]
        neighbours = [(i, (i + 1) % len(gpus)) for i in range(len(gpus))]
        pairs = neighbours if run.quick else list(permutations(range(len(gpus)), 2))
        alone += [_add_peer(run, gpus, pair, largest, len(pairs)) for pair in pairs]
    return planned, alone


def _add_link(
    run: Run, gpus: Sequence["AbstractGpu"], name: str, largest: int, *,
    to_device: bool, pinned: bool, note: str = "",
) -> str:  # fmt: skip
    """A step for the link of one GPU, or of several at once; returns its name."""
    from hrm.profiling.gpu import together
    from hrm.profiling.gpu_link import gpu_transfer
    from hrm.profiling.link import measure_link, transfer_sizes

    source, target = (CPU, name) if to_device else (name, CPU)
    kind = "pinned" if pinned else "pageable"

    def transfers(seconds: float) -> Link:
        several = len(gpus) > 1
        most = largest * len(gpus)
        transfer = gpu_transfer(gpus, to_device=to_device, pinned=pinned, largest_bytes=most)
        return measure_link(
            source, target, transfer, sizes=transfer_sizes(most, quick=run.quick),
            budget_s=seconds, kind=kind,
            note=f"all {len(gpus)} GPUs at once, each its share" if several else note,
            sampler=together(gpus) if several else gpus[0].sampler(),
        )  # fmt: skip

    step = f"{kind} link {source} to {target}"
    run.steps.add(step, 2, transfers, Link)
    return step


def _add_peer(
    run: Run, gpus: Sequence["AbstractGpu"], pair: tuple[int, int], largest: int, pairs: int
) -> str:
    from hrm.profiling.gpu_link import peer_transfer
    from hrm.profiling.link import measure_link, transfer_sizes

    source, target = (gpus[index] for index in pair)

    def transfers(seconds: float) -> Link:
        straight = source.reaches(target)
        return measure_link(
            f"{GPU}{pair[0]}", f"{GPU}{pair[1]}", peer_transfer(source, target, largest),
            sizes=transfer_sizes(largest, quick=run.quick), budget_s=seconds, kind="peer",
            note="straight" if straight else "through the host's memory",
            sampler=source.sampler(),
        )  # fmt: skip

    step = f"peer link {GPU}{pair[0]} to {GPU}{pair[1]}"
    run.steps.add(step, 6 / pairs, transfers, Link)
    return step


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

    run.steps.add(FACTS, 0.1, facts, tuple[GpuFacts, ...])


def _contention(
    run: Run, gpus: Sequence["AbstractGpu"], largest: int, seconds: float
) -> "SharedMemory":
    """What CPU attention, staging and both directions of the links take from one another."""
    import torch

    from hrm.profiling.contention import Worker, every_pair_and_all, measure_contention
    from hrm.profiling.gpu_link import gpu_transfer

    size = min(CONTENTION_TRANSFER, largest)

    def link(*, to_device: bool) -> Worker:
        queued = [
            gpu.queued(
                gpu_transfer([gpu], to_device=to_device, pinned=True, largest_bytes=size)(size)
            )
            for gpu in gpus
        ]

        def call() -> None:
            for one in queued:
                one.run()
            for one in queued:
                one.wait()

        return Worker(call, lambda: torch.set_num_threads(1), float(size * len(gpus)))

    workers = {
        "attention": attention_worker(run, run.threads),
        "staging": staging_worker(size, gpus[0].pinned(size)),
        "h2d": link(to_device=True),
        "d2h": link(to_device=False),
    }
    groups = [*every_pair_and_all(("attention", "staging", "h2d")), ("h2d", "d2h")]
    with torch.inference_mode():
        return measure_contention(workers, groups, budget_s=seconds)


# ------------------------------------------------------------------------------- put together


def _gpu_level(
    results: dict[str, Any], run: Run, gpus: Sequence["AbstractGpu"], memory: _Memory,
    factor: float, *, capped: bool,
) -> MemoryLevel:  # fmt: skip
    """All the GPUs as one level, `factor` times the first."""
    count, name = len(gpus), gpus[0].name
    read, copy = results[MEMORY]
    array_bytes = _array_bytes(memory)
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
        paper = None if known is None else scaled(known, count, f"times {count}")
        return replace(each_figure(rate, lambda x: scaled(x, factor, note)), datasheet=paper)

    attention = processor.attention_bytes_per_s
    return MemoryLevel(
        name=GPU,
        capacity_bytes=Figure(
            value=float(memory.capacity_bytes * count),
            source=Source.MEASURED,
            note="given on the command line" if capped else "",
        ),
        reserve_bytes=Figure(
            value=float(reserve * count), source=Source.ASSUMED, note=reserve_note
        ),
        read_bytes_per_s=all_of(
            Rate(achieved=read.rate(array_bytes, "dot product")),
            card.read_bytes_per_s if card else None,
        ),
        copy_bytes_per_s=all_of(Rate(achieved=copy.rate(array_bytes, "copy")), None),
        processor=replace(
            processor,
            name=f"{count} x {name}" if count > 1 else name,
            compute_flops_per_s={
                dtype: all_of(rate, of_dtype.get(dtype))
                for dtype, rate in processor.compute_flops_per_s.items()
            },
            attention_bytes_per_s=None if attention is None else all_of(attention, None),
        ),
    )


def _datasheet_of(name: str, facts: "GpuFacts") -> MemoryLevel | None:
    """The card as its data sheet has it, where its name leaves no doubt; a slice has none."""
    if facts.lines.get("mig", "off") != "off":
        return None
    return load_gpu(DATASHEETS[name]).level if name in DATASHEETS else None


def _links(
    results: dict[str, Any], planned: Sequence[str], alone: Sequence[str],
    facts: "Sequence[GpuFacts]", count: int,
) -> tuple[list[Link], list[str]]:  # fmt: skip
    """All links, with what PCIe can do at most, and warnings of those that fall behind."""
    warnings: list[str] = []
    own: list[Link] = [results[step] for step in alone]
    links: list[Link] = []
    for step in planned:
        link: Link = results[step]
        total = [fact.pcie_bytes_per_s for fact in facts]
        if link.kind == "pinned":
            same = [x for x in own if _direction(x) == _direction(link)]
            link = _with_ceiling(link, same)
            known = [pcie for pcie in total if pcie is not None]
            if len(known) == count:
                link = _with_pcie(link, sum(known), warnings)
            warnings += _slow_slots(same)
        links.append(link)
    peers = [link for link in own if link.kind == "peer"]
    if peers:
        slowest = min(peers, key=lambda link: link.bandwidth_bytes_per_s.at())
        links.append(replace(slowest, source=GPU, target=GPU))
    return [*links, *own], warnings


def _direction(link: Link) -> str:
    if link.kind == "peer":
        return "peer"
    return "h2d" if link.source == CPU else "d2h"


def _with_ceiling(link: Link, alone: Sequence[Link]) -> Link:
    """All GPUs at once get at most the sum of what each gets alone."""
    if not alone:
        return link
    ceiling = Figure(
        value=sum(one.bandwidth_bytes_per_s.at() for one in alone),
        source=Source.DERIVED,
        note=f"the sum of {len(alone)} GPUs' links, each alone",
    )
    return replace(link, bandwidth_bytes_per_s=replace(link.bandwidth_bytes_per_s, ceiling=ceiling))


def _with_pcie(link: Link, pcie_bytes_per_s: float, warnings: list[str]) -> Link:
    """With the rate of PCIe as negotiated, unless the link is faster: the system then errs."""
    rate, achieved = link.bandwidth_bytes_per_s, link.bandwidth_bytes_per_s.planned
    if achieved.value > 1.05 * pcie_bytes_per_s:
        warnings.append(
            f"{link.source} to {link.target} moves {format_bandwidth(achieved.value)}, more than"
            f" PCIe as the driver tells it ({format_bandwidth(pcie_bytes_per_s)})"
        )
        return link
    sheet = Figure(
        value=pcie_bytes_per_s, source=Source.DATASHEET, note="PCIe as negotiated, one direction"
    )
    return replace(link, bandwidth_bytes_per_s=replace(rate, datasheet=sheet))


def _slow_slots(links: Sequence[Link]) -> list[str]:
    """GPUs whose own link is slower than the fastest one's: a bad slot is common."""
    rates = [link.bandwidth_bytes_per_s.at() for link in links]
    return [
        f"the link {link.source} to {link.target} reaches {rate / max(rates):.0%} of the fastest"
        for link, rate in zip(links, rates, strict=True)
        if rate < UNEQUAL * max(rates)
    ]


def _environment(
    gpus: Sequence["AbstractGpu"], facts: "Sequence[GpuFacts]", settling: "Settling"
) -> dict[str, str]:
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
