"""What is measured alike on every kind of machine: processors and the host's memory."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hrm.hardware import CPU, Link, Rate
from hrm.model_spec import ModelSpec
from hrm.profiling.environment import HostFacts
from hrm.profiling.machine.steps import Steps

if TYPE_CHECKING:
    from hrm.profiling.timing import Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the steps of one profile share."""

    host: HostFacts
    quick: bool
    model: ModelSpec | None
    dtypes: tuple[str, ...]
    steps: Steps

    def add_processor(self, level: str, threads: int) -> None:
        """Launch latency, GEMMs and decode attention with so many of the CPU's threads."""
        from hrm.profiling.attention import Heads, attention_rate
        from hrm.profiling.gemm import gemm_rate, model_shapes
        from hrm.profiling.launch import launch_latency

        launches: list[float] = []

        def launch(seconds: float) -> "Timing":
            with torch_threads(threads):
                timing = launch_latency(budget_s=seconds)
            launches.append(timing.median_s)
            return timing

        self.steps.add(f"{level} launch latency", 1, launch)
        shapes, note = model_shapes(self.model, quick=self.quick)
        for dtype in self.dtypes:

            def gemm(seconds: float, dtype: str = dtype) -> Rate:
                with torch_threads(threads):
                    return gemm_rate(
                        dtype, shapes=shapes, shapes_note=note, quick=self.quick, budget_s=seconds,
                        launch_s=launches[0],
                    )  # fmt: skip

            self.steps.add(f"{level} GEMM {dtype}", 4, gemm)

        def attention(seconds: float) -> Rate:
            with torch_threads(threads):
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
            with torch_threads(1):
                return measure_link(
                    CPU, CPU, host_transfer(largest_bytes, pin_target=pinned), kind="staging",
                    sizes=transfer_sizes(largest_bytes, quick=self.quick), budget_s=seconds,
                    note="one thread" if pinned else "one thread; nothing is pinned here",
                )  # fmt: skip

        self.steps.add("staging", 1, staging)


@contextmanager
def torch_threads(count: int) -> Generator[None]:
    """Let torch use so many threads within."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
