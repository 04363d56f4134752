"""Measures this machine: one benchmark a file, one timing discipline for all of them.

`environment`, `topology` and `nvml` say what the machine is, `timing` and `fit` how anything is
timed and what a line through it says, `passes` how several measurements become one; `gemm`,
`memory`, `caches`, `numa`, `link`, `gpu_link`, `attention`, `launch`, `disk`, `contention` and
`settle` measure one thing each, `gpu` is what they need of CUDA, and `machine` makes a profile of
it all. The benchmarks import torch, this file does not.
"""

from hrm.profiling.machine import (
    EMULATED_LINK_BYTES_PER_S,
    ProfileOptions,
    ProfilingInterrupted,
    partial_path,
    profile_machine,
)

__all__ = ["EMULATED_LINK_BYTES_PER_S", "ProfileOptions", "ProfilingInterrupted", "partial_path", "profile_machine"]
