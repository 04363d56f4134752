"""From benchmarks to the profile of this machine.

A profile is a list of steps, each with its share of the time; what a step finds is used by the
next ones (a GEMM's rate is taken without the launch latency).
"""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal

from hrm.errors import ProfileError
from hrm.hardware import (
    CPU,
    GPU,
    Figure,
    HardwareProfile,
    Link,
    MemoryLevel,
    Processor,
    Rate,
    Source,
)
from hrm.model_spec import ModelSpec
from hrm.operators import ATTENTION_LAUNCHES_PER_REQUEST
from hrm.profiling.environment import HostFacts, gpu_facts, host_facts, software
from hrm.profiling.pacing import PacedCopy
from hrm.units import DTYPE_BYTES, GB, GIB, MIB, format_bandwidth

if TYPE_CHECKING:
    from hrm.profiling.memory import MemoryRates
    from hrm.profiling.timing import Sampler, Timing

Progress = Callable[[float, float, str], None]

DTYPES: Final = ("bfloat16", "float16", "float32")
EMULATED_LINK_BYTES_PER_S: Final = 2.0 * GB
EMULATED_LATENCY_S: Final = 20e-6
EMULATED_GPU_BYTES: Final = GIB
QUICK_S: Final = 20.0
FULL_S: Final = 240.0
RESERVE_SHARE: Final = 0.10
CONTEXT_BYTES: Final = 800 * MIB


class ProfilingInterrupted(Exception):  # noqa: N818 - the user's wish, no error
    """Ctrl-C while measuring; `measured` and `lost` name the steps, `results` has what was found.

    No profile is made of half the figures.
    """

    def __init__(self, results: dict[str, Any], lost: Sequence[str]) -> None:
        """Tell what is measured and what is lost."""
        self.results, self.measured, self.lost = results, tuple(results), tuple(lost)
        super().__init__(
            f"interrupted; measured: {', '.join(self.measured) or 'nothing'};"
            f" not measured: {', '.join(self.lost)}"
        )


@dataclass(slots=True)
class _Steps:
    """Named measurements in order; each is called with its seconds and its result is kept."""

    total_s: float
    progress: Progress | None
    steps: list[tuple[str, float, Callable[[float], Any]]] = field(
        default_factory=list[tuple[str, float, Callable[[float], Any]]]
    )

    def add(self, name: str, weight: float, run: Callable[[float], Any]) -> None:
        """Append a step that gets `weight` parts of the time."""
        self.steps.append((name, weight, run))

    def run(self) -> dict[str, Any]:
        """Everything measured, by the names of the steps."""
        results: dict[str, Any] = {}
        unit_s = self.total_s / sum(weight for _, weight, _ in self.steps)
        start_s = time.monotonic()
        for index, (name, weight, run) in enumerate(self.steps):
            self._tell(start_s, unit_s * sum(w for _, w, _ in self.steps[index:]), name)
            try:
                results[name] = run(unit_s * weight)
            except KeyboardInterrupt as error:
                lost = [name for name, _, _ in self.steps[index:]]
                raise ProfilingInterrupted(results, lost) from error
        self._tell(start_s, 0.0, "done")
        return results

    def _tell(self, start_s: float, remaining_s: float, text: str) -> None:
        if self.progress is not None:
            done_s = time.monotonic() - start_s
            self.progress(done_s, done_s + remaining_s, text)


def profile_machine(
    accelerator: str = "auto",
    *,
    gpu_memory_bytes: int | None = None,
    link_bandwidth_bytes_per_s: float | None = None,
    quick: bool = False,
    model: ModelSpec | None = None,
    dtypes: Sequence[str] = DTYPES,
    progress: Progress | None = None,
    command: str = "",
    budget_s: float | None = None,
) -> HardwareProfile:
    """Measure this machine: about 20 s if `quick`, else 4 min; `budget_s` asks for other times.

    `accelerator` is `cuda:K`, `emulated`, `cpu`, or `auto` for the first GPU if there is one and
    the CPU if not. Emulated, the GPU level holds `gpu_memory_bytes` and its links are paced to
    `link_bandwidth_bytes_per_s`. GEMMs have the shapes of `model`. The first of `dtypes` is that
    of the KV cache. `progress(done_s, total_s, what)` is called before each step and at the end.
    Raises ProfileError if there is no such accelerator, ProfilingInterrupted on Ctrl-C.
    """
    kind, device = _resolve(accelerator)
    for dtype in dtypes:
        if dtype not in DTYPE_BYTES:
            raise ProfileError(
                "--dtype", dtype, f"must be one of {', '.join(DTYPE_BYTES)}", "correct it"
            )
    if link_bandwidth_bytes_per_s is not None and kind != "emulated":
        raise ProfileError(
            "--link-bandwidth", link_bandwidth_bytes_per_s,
            "is what an emulated link is paced to", "leave it out or use --accelerator emulated",
        )  # fmt: skip
    if gpu_memory_bytes is not None and kind == "cpu":
        raise ProfileError(
            "--gpu-memory", gpu_memory_bytes, "needs a GPU level, which accelerator cpu has not",
            "leave it out or use --accelerator emulated",
        )  # fmt: skip
    started_s, host = time.monotonic(), host_facts()
    run = _Run(
        host=host,
        quick=quick,
        model=model,
        dtypes=tuple(dict.fromkeys(dtypes)),
        steps=_Steps(budget_s or (QUICK_S if quick else FULL_S), progress),
    )
    match kind:
        case "cpu":
            profile = _profile_cpu(run)
        case "emulated":
            profile = _profile_emulated(
                run,
                gpu_memory_bytes or min(EMULATED_GPU_BYTES, host.usable_ram_bytes // 8),
                link_bandwidth_bytes_per_s or EMULATED_LINK_BYTES_PER_S,
            )
        case "cuda":
            profile = _profile_cuda(run, device, gpu_memory_bytes)
    facts = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "mode": "quick" if quick else "full",
        "seconds": f"{time.monotonic() - started_s:.1f}",
        **host.describe(),
        **software(),
        **profile.environment,
    }
    return replace(profile, environment={key: text for key, text in facts.items() if text})


def _resolve(accelerator: str) -> tuple[Literal["cuda", "emulated", "cpu"], str]:
    if accelerator == "cpu" or accelerator == "emulated":  # noqa: PLR1714 - narrows the type
        return accelerator, "cpu"
    import torch

    name, _, index = accelerator.partition(":")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if accelerator == "auto":
        return ("cuda", "cuda:0") if count else ("cpu", "cpu")
    if name != "cuda" or not (index or "0").isdigit():
        raise ProfileError(
            "--accelerator", accelerator, "must be auto, cuda:K, emulated or cpu", "choose one"
        )
    if int(index or 0) >= count:
        raise ProfileError(
            "--accelerator", accelerator, f"torch {torch.__version__} sees {count} CUDA devices",
            "use --accelerator emulated or cpu, or install a CUDA build of torch",
        )  # fmt: skip
    return "cuda", f"cuda:{index or 0}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What the steps of one profile share."""

    host: HostFacts
    quick: bool
    model: ModelSpec | None
    dtypes: tuple[str, ...]
    steps: _Steps

    def add_processor(self, level: str, threads: int) -> None:
        """Launch latency, GEMMs and decode attention with so many of the CPU's threads."""
        from hrm.profiling.attention import Heads, attention_rate
        from hrm.profiling.gemm import gemm_rate, model_shapes
        from hrm.profiling.launch import launch_latency

        launches: list[float] = []

        def launch(seconds: float) -> "Timing":
            with _threads(threads):
                timing = launch_latency(budget_s=seconds)
            launches.append(timing.median_s)
            return timing

        self.steps.add(f"{level} launch latency", 1, launch)
        shapes, note = model_shapes(self.model, quick=self.quick)
        for dtype in self.dtypes:

            def gemm(seconds: float, dtype: str = dtype) -> Rate:
                with _threads(threads):
                    return gemm_rate(
                        dtype, shapes=shapes, shapes_note=note, quick=self.quick, budget_s=seconds,
                        launch_s=launches[0],
                    )  # fmt: skip

            self.steps.add(f"{level} GEMM {dtype}", 4, gemm)

        def attention(seconds: float) -> Rate:
            with _threads(threads):
                return attention_rate(
                    self.dtypes[0], heads=Heads.of(self.model), quick=self.quick, budget_s=seconds
                )

        self.steps.add(f"{level} attention", 3, attention)

    def add_host_memory(self, threads: Sequence[int]) -> None:
        """Reading and copying host memory over a sweep of threads, these among them."""
        from hrm.profiling.memory import array_bytes, measure_memory

        cores, cache = self.host.usable_cores, self.host.last_level_cache_bytes
        sweep = {1, *threads, cores}
        while not self.quick and max(sweep - {cores}, default=cores) * 2 < cores:
            sweep.add(max(sweep - {cores}) * 2)
        size = array_bytes(cache, self.host.usable_ram_bytes, quick=self.quick)
        self.steps.add(
            "host memory", 4,
            lambda seconds: measure_memory(
                num_bytes=size, last_level_cache_bytes=cache, threads=sweep, budget_s=seconds
            ),
        )  # fmt: skip

    def add_staging(self, largest_bytes: int, *, pinned: bool) -> None:
        """Copies within the host, from pageable to pinned memory, by one thread as in a lane."""
        from hrm.profiling.link import host_transfer, measure_link, transfer_sizes

        def staging(seconds: float) -> Link:
            with _threads(1):
                return measure_link(
                    CPU, CPU, host_transfer(largest_bytes, pin_target=pinned), kind="staging",
                    sizes=transfer_sizes(largest_bytes, quick=self.quick), budget_s=seconds,
                    note="one thread" if pinned else "one thread; nothing is pinned here",
                )  # fmt: skip

        self.steps.add("staging", 1, staging)


@contextmanager
def _threads(count: int) -> Generator[None]:
    """Let torch use so many threads within."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _processor(results: dict[str, Any], level: str, run: _Run, name: str, cores: int) -> Processor:
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
        attention_request_s=_request_latency(launch.median_s),
        launch_latency_s=launch.duration("a layer's small operators, on average"),
    )


def _request_latency(launch_s: float) -> Figure:
    """What a request costs in attention that takes requests one by one."""
    return Figure(
        value=ATTENTION_LAUNCHES_PER_REQUEST * launch_s,
        source=Source.DERIVED,
        note=f"{ATTENTION_LAUNCHES_PER_REQUEST} operators a request",
    )


def _cpu_level(
    results: dict[str, Any], run: _Run, name: str, threads: int, capacity: Figure, reserve: Figure
) -> MemoryLevel:
    """A level of host memory, used by so many threads."""
    memory: MemoryRates = results["host memory"]

    def rates(timings: "dict[int, Timing]", what: str) -> Rate:
        at_best = min(timings, key=lambda count: timings[count].median_s)
        figures = {
            count: timings[count].rate(
                memory.num_bytes, f"{what} with {_count(count)} {memory.note}"
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
        processor=_processor(results, name, run, run.host.cpu_name, threads),
    )


def _count(threads: int) -> str:
    return f"{threads} thread{'s' if threads > 1 else ''}"


def _ram(host: HostFacts, less_bytes: int = 0) -> tuple[Figure, Figure]:
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


# -------------------------------------------------------------------------------------- machines


def _profile_cpu(run: _Run) -> HardwareProfile:
    threads = run.host.usable_cores
    run.add_processor(CPU, threads)
    run.add_host_memory([threads])
    results = run.steps.run()
    return HardwareProfile(
        name=f"{run.host.cpu_name}, {threads} cores",
        accelerator="cpu",
        levels=(_cpu_level(results, run, CPU, threads, *_ram(run.host)),),
    )


def _profile_emulated(run: _Run, gpu_bytes: int, bandwidth: float) -> HardwareProfile:
    from hrm.profiling.launch import launch_latency_beside_another
    from hrm.profiling.link import measure_link, paced_transfer, transfer_sizes

    cores = run.host.usable_cores
    gpu_threads = max(1, cores // 2)
    cpu_threads = max(1, cores - gpu_threads)
    capacity, reserve = _ram(run.host, gpu_bytes)
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
            with _threads(1):
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
        processor = replace(
            level.processor,
            launch_latency_s=beside.duration(note),
            attention_request_s=_request_latency(beside.median_s),
        )
        return replace(level, processor=processor)

    return HardwareProfile(
        name=f"emulated accelerator on {run.host.cpu_name}, {cores} cores",
        accelerator="emulated",
        levels=(
            with_launch_latency(_cpu_level(results, run, GPU, gpu_threads, gpu_capacity, none)),
            with_launch_latency(_cpu_level(results, run, CPU, cpu_threads, capacity, reserve)),
        ),
        links=(
            results[f"link {CPU} to {GPU}"],
            results[f"link {GPU} to {CPU}"],
            results["staging"],
        ),
        environment={
            "emulated_lanes": f"gpu {_count(gpu_threads)}, cpu {_count(cpu_threads)}",
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
    run: _Run, seconds: float, gpu_threads: int, cpu_threads: int, arena: int, bandwidth: float
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


def _profile_cuda(run: _Run, device: str, gpu_memory_bytes: int | None) -> HardwareProfile:
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
        processor=_processor(results, GPU, run, facts["gpu"], 0),
    )
    return HardwareProfile(
        name=f"{facts['gpu']} in {run.host.cpu_name}, {threads} cores",
        accelerator="cuda",
        levels=(gpu_level, _cpu_level(results, run, CPU, threads, *_ram(run.host))),
        links=(*(results[name] for name in names), results["staging"]),
        environment=facts,
    )
