"""A machine without an accelerator: one level."""

from dataclasses import replace

from hrm.hardware import CPU, HardwareProfile
from hrm.profiling.machine.host import CACHES, TASKS, add_disk, add_host_memory, add_processor, add_tasks, host_facts_of
from hrm.profiling.machine.levels import host_level, ram_of
from hrm.profiling.machine.run import Run


def profile_cpu(run: Run) -> HardwareProfile:
    """One level: the host's memory and all cores that may be used."""
    threads = run.threads
    add_processor(run, CPU, threads)
    add_host_memory(run, [threads])
    add_tasks(run)
    add_disk(run)
    results = run.steps.run()
    disk, facts = host_facts_of(results)
    level = host_level(results, run, CPU, threads, *ram_of(run.host))
    return HardwareProfile(
        name=f"{run.host.cpu_name}, {threads} cores",
        accelerator="cpu",
        levels=(replace(level, caches=results[CACHES]),),
        lane_threads=results.get(TASKS),
        disk=disk,
        environment=facts,
    )
