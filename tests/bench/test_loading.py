"""Loading a checkpoint to its places against reading the same files plainly, from the disk and from its cache.

The reference checkpoint is loaded as a run loads it, with nothing resident. Plain reading is of whole
files by one thread, and by as many as loading has, each into one buffer of its own.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from executor.backends.base import host_memory
from executor.backends.cpu import CpuBackend
from executor.checkpoint import Checkpoint
from executor.families import family_for
from executor.loading import READERS
from executor.safetensors_file import PART_BYTES
from executor.weight_pages import WEIGHTS_ON_GPU, StoredWeights, WeightPages
from hrm.buffers import Needs, Purpose, bytes_by_purpose
from hrm.model_spec import ModelSpec
from hrm.policy import Policy
from tests.bench.machine import circumstances
from tests.bench.reference_checkpoint import reference_checkpoint

REPEATS = 3


def test_loading() -> None:
    folder = reference_checkpoint()
    with Checkpoint.open(folder) as checkpoint:
        family = family_for(checkpoint.config, checkpoint.config_path)
        arch = family.architecture(checkpoint.config, checkpoint.config_path)
        files = checkpoint.weight_files
        num_bytes = sum(file.stat().st_size for file in files)
        print(f"\nloading {num_bytes / 1e9:.2f} GB; {circumstances()}")
        print(f"  {'':<28}  from the disk  from its cache  processor")

        def row(name: str, way: Callable[[], object]) -> None:
            (cold_s, _), (warm_s, processor_s) = least(way, files), least(way, ())
            rates = f"{num_bytes / cold_s / 1e9:>8.2f} GB/s  {num_bytes / warm_s / 1e9:>9.2f} GB/s"
            print(f"  {name:<28}  {rates}  {processor_s:>7.2f} s")

        stored = StoredWeights(checkpoint, family)
        for threads in (1, READERS):
            row(f"read plainly, {threads} threads", lambda threads=threads: read(files, threads))
        for dtype in ("bfloat16", "float32"):
            pages = pages_of(arch.spec, dtype)
            row(f"load as {dtype}", lambda pages=pages: pages.load(stored, CpuBackend(), None))


def pages_of(spec: ModelSpec, dtype: str) -> WeightPages:
    """Where a run has its weights, with as little as possible resident."""
    policy = Policy(
        batch_size=1,
        micro_batch_size=1,
        resident_experts=(0,) * spec.num_layers,
        kv_tokens_per_micro_batch=256,
        prefill_chunk_tokens=256,
        dtype=dtype,
    )
    needs = Needs.of_policy(spec, policy)
    on_gpu, on_host = bytes_by_purpose(needs.on_gpu()), bytes_by_purpose(needs.on_host())
    sizes = {purpose: on_gpu[purpose] for purpose in WEIGHTS_ON_GPU}
    sizes |= {purpose: on_host[purpose] for purpose in (Purpose.WEIGHTS, Purpose.STAGING)}
    return WeightPages(spec, policy, {purpose: host_memory(num_bytes) for purpose, num_bytes in sizes.items()})


def read(files: list[Path], threads: int) -> None:
    """All bytes of the files, in parts, by so many threads."""
    parts = [(file, start) for file in files for start in range(0, file.stat().st_size, PART_BYTES)]

    def some(mine: list[tuple[Path, int]]) -> None:
        buffer = bytearray(PART_BYTES)
        for file, start in mine:
            handle = os.open(file, os.O_RDONLY)
            os.preadv(handle, [buffer], start)
            os.close(handle)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(some, (parts[index::threads] for index in range(threads))))


def least(way: Callable[[], object], forgotten: list[Path] | tuple[()]) -> tuple[float, float]:
    """Seconds on the wall's clock and of the processor, the least of several times."""
    taken = []
    for _ in range(REPEATS):
        for file in forgotten:  # by the system's cache
            with file.open("rb") as open_file:
                os.posix_fadvise(open_file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start_s, start_processor_s = time.perf_counter(), time.process_time()
        way()
        taken.append((time.perf_counter() - start_s, time.process_time() - start_processor_s))
    return min(taken)
