"""A machine without an accelerator: one level."""

from hrm.hardware import CPU, HardwareProfile
from hrm.profiling.machine.levels import host_level, ram_of
from hrm.profiling.machine.run import Run


def profile_cpu(run: Run) -> HardwareProfile:
    """One level: the host's memory and all cores that may be used."""
    threads = run.host.usable_cores
    run.add_processor(CPU, threads)
    run.add_host_memory([threads])
    results = run.steps.run()
    return HardwareProfile(
        name=f"{run.host.cpu_name}, {threads} cores",
        accelerator="cpu",
        levels=(host_level(results, run, CPU, threads, *ram_of(run.host)),),
    )
