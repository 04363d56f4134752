"""Memory, its caches and its nodes: what is read, by how many threads, and in which sizes."""

import os
import threading

import pytest
import torch

from hrm.profiling import caches
from hrm.profiling.caches import Readers, bytes_of_call, cache_sizes, measure_caches
from hrm.profiling.memory import array_bytes, measure_device_memory, measure_memory
from hrm.profiling.numa import describe_numa, measure_numa, on_cpus
from hrm.profiling.timing import clock_sampler
from hrm.profiling.topology import CacheFacts, allowed_cpus
from hrm.units import GB, GIB, KIB, MIB

SERVER = (
    CacheFacts(level=1, each_bytes=32 * KIB, instances=16, cpus_each=2),
    CacheFacts(level=2, each_bytes=MIB, instances=16, cpus_each=2),
    CacheFacts(level=3, each_bytes=32 * MIB, instances=2, cpus_each=16),
)


def test_arrays_exceed_the_cache_or_say_so():
    assert array_bytes(32 * MIB, 10 * GB, quick=False) == 128 * MIB
    assert array_bytes(2 * GIB, 10**12, quick=False) == 4 * GIB
    assert array_bytes(2 * GIB, 10**12, quick=True) == 3 * GIB // 2
    assert array_bytes(32 * MIB, 80 * MIB, quick=False) == 10 * MIB
    assert array_bytes(64 * MIB + 1, 10**12, quick=True) >= 4 * (64 * MIB + 1)
    rates = measure_memory(num_bytes=4 * MIB, last_level_cache_bytes=2 * MIB, threads=[1], budget_s=0.01)
    assert "part may be cached" in rates.note
    assert set(rates.read) == set(rates.copy) == {1}


def test_every_number_of_threads_is_measured_and_then_as_before():
    before = torch.get_num_threads()
    rates = measure_memory(num_bytes=2 * MIB, last_level_cache_bytes=0, threads=[2, 1, 2], budget_s=0.05)
    assert torch.get_num_threads() == before
    assert list(rates.read) == [1, 2]
    assert "cached" not in rates.note


def test_a_copy_counts_each_byte_once():
    """Every call takes a second: reading goes through both arrays, copying through one."""

    def second(call, calls):
        call()
        return float(calls)

    rates = measure_device_memory("cpu", num_bytes=MIB, budget_s=0.0, sampler=second)
    assert rates.read.median_s == pytest.approx(1.0)
    assert rates.copy.median_s == pytest.approx(2.0)
    rates = measure_device_memory("cpu", num_bytes=MIB, budget_s=0.0, sampler=clock_sampler())
    assert min(rates.read.samples, rates.copy.samples) >= 3


# ------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("threads", [1, 4, 16, 32])
def test_arrays_fit_their_cache_and_none_before_it(threads):
    sizes = cache_sizes(SERVER, threads)
    assert set(sizes) == {"L1", "L2", "L3"}
    users = {cache.name: -(-threads // cache.instances) for cache in SERVER}
    share = {cache.name: cache.each_bytes // users[cache.name] for cache in SERVER}
    for name, fitting in sizes.items():
        assert max(fitting) <= share[name] / 2
        assert fitting == sorted(set(fitting))
    assert min(sizes["L2"]) >= 2 * share["L1"]
    assert min(sizes["L3"]) >= 2 * share["L2"]


def test_a_cache_no_larger_than_the_one_before_is_left_out():
    small = (SERVER[0], SERVER[1], CacheFacts(level=3, each_bytes=2 * MIB, instances=1, cpus_each=4))
    assert set(cache_sizes(small, 4)) == {"L1", "L2"}
    assert cache_sizes((), 4) == {}
    assert measure_caches((), threads=2, budget_s=0.1, quick=True) == ()


@pytest.mark.parametrize("quick", [True, False])
def test_caches_as_levels(monkeypatch, quick):
    monkeypatch.setattr(caches, "BYTES_A_CALL", 256 * KIB)
    facts = (
        CacheFacts(level=1, each_bytes=32 * KIB, instances=2, cpus_each=1),
        CacheFacts(level=2, each_bytes=512 * KIB, instances=2, cpus_each=1),
    )
    first, second = measure_caches(facts, threads=2, budget_s=0.05, quick=quick)
    assert (first.name, second.name) == ("L1", "L2")
    assert first.capacity_bytes.value == 2 * 32 * KIB
    assert first.read_bytes_per_s.planned.note.startswith("2 threads, 16.4 kB each")
    for cache in (first, second):
        rate = cache.read_bytes_per_s
        assert rate.ceiling is not None
        assert rate.ceiling.value >= rate.planned.value > 0
        sizes = [size for size, _ in rate.planned.curve]
        assert sizes == sorted(sizes)
        assert not (quick and sizes)


def test_rates_are_those_of_all_threads_together(monkeypatch):
    """Every thread takes a second a call, so the rate is what all of them read."""
    monkeypatch.setattr(Readers, "sampler", lambda self, call, calls: float(calls))
    facts = (CacheFacts(level=1, each_bytes=64 * KIB, instances=4, cpus_each=1),)
    (cache,) = measure_caches(facts, threads=4, budget_s=1.0, quick=True)
    assert cache.read_bytes_per_s.at() == pytest.approx(4 * bytes_of_call(32 * KIB), rel=1e-4)
    (cache,) = measure_caches(facts, threads=2, budget_s=1.0, quick=True)
    assert cache.capacity_bytes.value == 2 * 64 * KIB, "caches of idle cores do not count"


def test_readers_end_their_threads_and_stay_on_their_cores():
    before = threading.active_count()
    affinity = os.sched_getaffinity(0)
    with Readers(2) as readers:
        assert readers.sampler(readers.call(8 * KIB), 1) > 0
    assert threading.active_count() == before
    assert os.sched_getaffinity(0) == affinity


# --------------------------------------------------------------------------------- nodes


def test_nodes_read_their_own_memory_and_the_others():
    cpus = allowed_cpus()
    nodes = {0: cpus, 3: frozenset([min(cpus)])}
    reads = measure_numa(nodes, num_bytes=MIB, budget_s=0.05)
    assert [(read.cores_of, read.memory_of) for read in reads] == [(0, 0), (0, 3), (3, 0), (3, 3)]
    assert all(read.bytes_per_s > 0 for read in reads)
    assert [read.is_local for read in reads] == [True, False, False, True]
    text = describe_numa(reads)
    assert text.startswith("cores of node 0 read their own memory at ")
    assert "; cores of node 0 read that of node 3 at " in text


def test_a_thread_is_kept_on_its_cpus_and_others_are_not():
    affinity = os.sched_getaffinity(0)
    one = frozenset([max(affinity)])
    assert on_cpus(one, lambda: os.sched_getaffinity(0)) == one
    assert os.sched_getaffinity(0) == affinity
    with pytest.raises(ZeroDivisionError):
        on_cpus(one, lambda: 1 / 0)
