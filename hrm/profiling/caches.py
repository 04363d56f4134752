"""Caches as levels: how fast all cores together read arrays that stay in each of them.

Each thread reads an array of its own over and over, by NumPy's maximum: one native call of some
milliseconds without the interpreter lock, whose inner loop does nothing but load and compare. In
the smallest cache that loop is the limit rather than the cache. Threads are pinned to cores of
their own, as they would lose their caches with every move.
"""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import cycle
from statistics import mean
from threading import Barrier
from typing import Any, Final, Self, final

import numpy as np
from numpy.lib.stride_tricks import as_strided

from hrm.hardware import Cache, Figure, Rate, Source
from hrm.profiling.fit import BENT
from hrm.profiling.timing import Call, Timing, summarise, time_each
from hrm.profiling.topology import CacheFacts, allowed_cpus, one_of_each_core_first
from hrm.units import KIB, MIB, counted, format_bytes

SMALLEST_BYTES: Final = 8 * KIB
BYTES_A_CALL: Final = 256 * MIB
TILE_BYTES: Final = MIB


def cache_sizes(caches: Sequence[CacheFacts], threads: int) -> dict[str, list[int]]:
    """Bytes that each of the threads reads to stay in each cache and not in the one before.

    Sizes double from twice a thread's share of the cache before to half of its share of this one:
    what else lies in a cache (stack, code, other lanes) needs room too.
    """
    sizes: dict[str, list[int]] = {}
    before = SMALLEST_BYTES // 2
    for cache in caches:
        users = max(1, min(cache.cpus_each, -(-threads // cache.instances)))
        most = cache.each_bytes // users // 2
        fitting = [size for power in range(64) if 2 * before <= (size := KIB << power) <= most]
        if fitting:
            sizes[cache.name] = fitting
        before = max(before, cache.each_bytes // users)
    return sizes


def measure_caches(caches: Sequence[CacheFacts], *, threads: int, budget_s: float, quick: bool) -> tuple[Cache, ...]:
    """Every cache that an array fits, read by so many threads; quick takes one size for each."""
    sizes = {name: ([fitting[-1]] if quick else fitting) for name, fitting in cache_sizes(caches, threads).items()}
    every = sorted({size for fitting in sizes.values() for size in fitting})
    if not every:
        return ()
    with Readers(threads) as readers:
        taken = time_each({size: readers.call(size) for size in every}, budget_s=budget_s, sampler=readers.sampler)
    timings = {size: summarise(seconds) for size, seconds in taken.items()}
    return tuple(
        _cache(facts, {size: timings[size] for size in sizes[facts.name]}, threads)
        for facts in caches
        if facts.name in sizes
    )


def _cache(facts: CacheFacts, timings: dict[int, Timing], threads: int) -> Cache:
    instances = min(facts.instances, threads)
    capacity = Figure(
        value=float(instances * facts.each_bytes),
        source=Source.MEASURED,
        note=f"{instances} of {format_bytes(facts.each_bytes)}, as the system lists them",
    )
    figures = {
        size: timing.rate(threads * bytes_of_call(size), f"{counted(threads, 'thread')}, {format_bytes(size)} each")
        for size, timing in timings.items()
    }
    values = [figure.value for figure in figures.values()]
    largest = figures[max(figures)]
    if max(values) > (1 + BENT) * min(values):
        curve = tuple((float(threads * size), figure.value) for size, figure in figures.items())
        largest = replace(largest, curve=curve)
    best = max(figures.values(), key=lambda figure: figure.value)
    return Cache(name=facts.name, capacity_bytes=capacity, read_bytes_per_s=Rate(ceiling=best, achieved=largest))


def bytes_of_call(size: int) -> int:
    """Bytes that one call of a thread reads: whole arrays, about 32 MiB of them."""
    return max(1, BYTES_A_CALL // size) * size


@final
class Readers:
    """Threads, one for each core, that read arrays of their own at the same time."""

    def __init__(self, threads: int) -> None:
        """Start them; use it in a `with` statement, which ends them."""
        self._threads = threads
        self._together = Barrier(threads)
        cpus = cycle(one_of_each_core_first(allowed_cpus()))
        self._pool = ThreadPoolExecutor(threads, initializer=lambda: _pin(next(cpus)))
        self._arrays: dict[tuple[int, int], Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._together.abort()
        self._pool.shutdown(cancel_futures=True)

    def call(self, size: int) -> Call:
        """One call of every thread over arrays of so many bytes; to be timed by `sampler`."""
        return lambda: size

    def sampler(self, call: Call, calls: int) -> float:
        """Seconds of a thread for so many calls, as the mean over the threads."""
        size: Any = call()
        waiting = [self._pool.submit(self._read, index, size, calls) for index in range(self._threads)]
        return mean(done.result() for done in waiting)

    def _read(self, index: int, size: int, calls: int) -> float:
        read = self._array(index, size)
        self._together.wait()
        start_s = time.perf_counter()
        for _ in range(calls):
            np.maximum.reduce(read, axis=1)
        return time.perf_counter() - start_s

    def _array(self, index: int, size: int) -> Any:
        """A thread's array, seen as a matrix whose rows are all the same."""
        if (index, size) not in self._arrays:
            random = np.random.default_rng(index)
            tile = random.integers(0, 2**31, min(size, TILE_BYTES) // 4, dtype=np.int32)
            row = np.resize(tile, size // 4)
            shape = (bytes_of_call(size) // size, len(row))
            self._arrays[index, size] = as_strided(row, shape, (0, row.itemsize), writeable=False)
        return self._arrays[index, size]


def _pin(cpu: int) -> None:
    """Keep the calling thread on one hardware thread, where the system lets it."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cpu})  # 0 is the calling thread, not the process
