"""The machine as the kernel tells it: quotas of containers, cores, caches and nodes."""

import os

import pytest

from hrm.profiling import environment, topology
from hrm.profiling.environment import Others, available_ram_bytes, host_facts, usable_cores
from hrm.profiling.topology import CacheFacts, cpu_list
from hrm.units import KIB, MIB


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """A folder of control groups; `cgroups({"a/cpu.max": "…"}, own="/a")` puts us in one."""
    own = tmp_path / "own"
    monkeypatch.setattr("hrm.profiling.environment._CGROUP", tmp_path / "fs")
    monkeypatch.setattr("hrm.profiling.environment._OWN_CGROUP", own)
    monkeypatch.setattr("hrm.profiling.topology.allowed_cpus", lambda: frozenset(range(16)))

    def write(files, own_lines="0::/\n"):
        own.write_text(own_lines)
        for name, text in files.items():
            path = tmp_path / "fs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


@pytest.mark.parametrize(
    ("files", "own", "quota", "cores"),
    [
        ({"cpu.max": "150000 100000\n"}, "0::/\n", 1.5, 1),
        ({"cpu.max": "400000 100000\n"}, "0::/\n", 4.0, 4),
        ({"cpu.max": "max 100000\n"}, "0::/\n", None, 16),
        ({"cpu.max": "50000 100000\n"}, "0::/\n", 0.5, 1),
        ({"cpu.max": "3200000 100000\n"}, "0::/\n", 32.0, 16),
        ({"pod/cpu.max": "200000 100000\n", "pod/box/cpu.max": "max 100000\n"}, "0::/pod/box\n", 2.0, 2),
        ({"cpu/box/cpu.cfs_quota_us": "300000\n", "cpu/box/cpu.cfs_period_us": "100000\n"}, "4:cpu:/box\n", 3.0, 3),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "4:cpu:/\n", None, 16),
        ({"cpu.max": "nonsense\n"}, "no colons at all\n", None, 16),
    ],
)
def test_the_quota_counts_not_the_host(cgroups, files, own, quota, cores):
    cgroups(files, own)
    facts = host_facts()
    assert facts.quota_cores == quota
    assert facts.usable_cores == usable_cores() == cores
    assert facts.compute_threads <= cores
    assert facts.describe().get("cgroup_cpu_quota") == (f"{quota:g} cores" if quota else None)


def test_the_memory_limit_counts(cgroups):
    cgroups({"memory.max": "1073741824\n"})
    assert host_facts().usable_ram_bytes == 2**30
    assert host_facts().describe()["cgroup_memory_limit"] == "1.07 GB"
    cgroups({"memory.max": "max\n"})
    assert host_facts().usable_ram_bytes == host_facts().ram_bytes
    assert host_facts().ram_limit_bytes is None


def test_what_a_limit_leaves_is_available(cgroups):
    cgroups(
        {
            "memory.max": "max\n",
            "pod/memory.max": "1073741824\n",
            "pod/memory.current": "805306368\n",
            "pod/memory.stat": "anon 5\nactive_file 7\ninactive_file 268435456\n",
        },
        "0::/pod\n",
    )
    assert available_ram_bytes() == 2**29
    cgroups({"pod/memory.current": "2147483648\n"}, "0::/pod\n")
    assert available_ram_bytes() == 0
    cgroups(
        {
            "memory/box/memory.limit_in_bytes": "1073741824\n",
            "memory/box/memory.usage_in_bytes": "536870912\n",
            "memory/box/memory.stat": "inactive_file 3\ntotal_inactive_file 134217728\n",
        },
        "4:memory:/box\n",
    )
    assert available_ram_bytes() == 2**29 + 2**27
    cgroups({}, "0::/\n")
    assert available_ram_bytes() > 2**30


def test_time_that_the_quota_took_is_told(cgroups, monkeypatch):
    cgroups({"cpu.stat": "usage_usec 5\nthrottled_usec 1000000\n"})
    others = Others()
    assert "quota" not in others.describe()
    cgroups({"cpu.stat": "usage_usec 9\nthrottled_usec 3500000\n"})
    assert others.describe().endswith("the CPU quota stopped this process for 2.5 s")


def test_others_are_what_is_not_ours(monkeypatch):
    """8 busy seconds of which 3 are ours, and 1 stolen, in 10 on 2 hardware threads."""
    seconds = iter([(100.0, 50.0, 2.0, 0.0), (110.0, 55.0, 3.0, 0.0), (110.0, 55.0, 3.0, 0.0)])
    monkeypatch.setattr(environment, "_cpu_seconds", lambda: next(seconds))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    others = Others()
    assert others.share() == pytest.approx(0.3)
    assert others.describe() == ("others kept 25.0% of the hardware threads busy, the hypervisor took 5.0%")


# ------------------------------------------------------------------------------------ /sys


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Two sockets of two cores with two hyper-threads each; CPU n and n+4 share a core."""
    monkeypatch.setattr(topology, "SYSTEM", tmp_path)

    def write(path, text):
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"{text}\n")

    for cpu in range(8):
        core, socket = cpu % 4, cpu % 4 // 2
        write(f"cpu/cpu{cpu}/topology/core_id", core % 2)
        write(f"cpu/cpu{cpu}/topology/physical_package_id", socket)
        of_core, first = f"{core},{core + 4}", 2 * socket
        of_socket = f"{first}-{first + 1},{first + 4}-{first + 5}"
        caches = (
            {"level": 1, "type": "Data", "size": "48K", "shared_cpu_list": of_core},
            {"level": 1, "type": "Instruction", "size": "32K", "shared_cpu_list": of_core},
            {"level": 2, "type": "Unified", "size": "2048K", "shared_cpu_list": of_core},
            {"level": 3, "type": "Unified", "size": "32M", "shared_cpu_list": of_socket},
        )
        for index, cache in enumerate(caches):
            for name, text in cache.items():
                write(f"cpu/cpu{cpu}/cache/index{index}/{name}", text)
    write("node/node0/cpulist", "0-1,4-5")
    write("node/node1/cpulist", "2-3,6-7")
    write("node/node2/cpulist", "")  # memory without cores
    return tmp_path


def test_hyper_threads_are_no_cores(system):
    assert topology.physical_cores(range(8)) == 4
    assert topology.physical_cores([0, 4]) == 1
    assert topology.physical_cores([0, 2]) == 2, "the same core number in another socket"
    assert topology.one_of_each_core_first([0, 1, 4, 5, 6]) == [0, 1, 6, 4, 5]


def test_caches_are_counted_once_for_each_that_shares_them(system):
    assert topology.caches(range(8)) == (
        CacheFacts(level=1, each_bytes=48 * KIB, instances=4, cpus_each=2),
        CacheFacts(level=2, each_bytes=2 * MIB, instances=4, cpus_each=2),
        CacheFacts(level=3, each_bytes=32 * MIB, instances=2, cpus_each=4),
    )
    first, _, last = topology.caches([0, 1])
    assert (first.instances, first.cpus_each) == (2, 1)
    assert (last.instances, last.cpus_each) == (1, 2)


def test_nodes_hold_what_may_be_used(system):
    assert topology.numa_nodes(range(8)) == {0: {0, 1, 4, 5}, 1: {2, 3, 6, 7}}
    assert topology.numa_nodes([2]) == {1: {2}}


def test_a_silent_kernel_is_one_node_of_cores_without_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(topology, "SYSTEM", tmp_path)
    assert topology.physical_cores([3, 4]) == 2
    assert topology.caches([0, 1]) == ()
    assert topology.numa_nodes([0, 1]) == {0: {0, 1}}
    assert host_facts().last_level_cache_bytes == 0


def test_facts_of_such_a_host(system, monkeypatch):
    monkeypatch.setattr(topology, "allowed_cpus", lambda: frozenset(range(8)))
    facts = host_facts()
    assert facts.usable_physical_cores == 4
    assert facts.compute_threads == min(4, facts.usable_cores)
    assert facts.last_level_cache_bytes == min(2, facts.usable_cores) * 32 * MIB


@pytest.mark.parametrize(("text", "cpus"), [("0-3,8", {0, 1, 2, 3, 8}), ("", set()), ("7", {7}), ("x,2", {2})])
def test_lists_of_cpus(text, cpus):
    assert cpu_list(text) == cpus
