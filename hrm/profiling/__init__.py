"""Measures this machine: one benchmark a file, one timing discipline for all of them.

`environment` says what the machine is, `timing` how anything is timed; `gemm`, `memory`, `link`,
`attention`, `launch` and `contention` measure one thing each, and `machine` makes a profile of it
all. `pacing` is the link of the emulated accelerator. The benchmarks import torch, this does not.
"""

from hrm.profiling.machine import (
    EMULATED_LINK_BYTES_PER_S,
    ProfilingInterrupted,
    partial_path,
    profile_machine,
)

__all__ = ["EMULATED_LINK_BYTES_PER_S", "ProfilingInterrupted", "partial_path", "profile_machine"]
