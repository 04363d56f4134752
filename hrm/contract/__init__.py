"""What the planner knows of how the executor works inside; the executor takes it from here too.

Tests of the same names in `tests/executor/contract` compare it with what runs.

`families` says which families are run, `rings` how many turns each ring of buffers has, `rows` what
numbers lie beside hidden states and in what blocks the KV cache is kept, `temporaries` how much
memory a layer needs while it is computed, and `launches` how many operators a task issues.
`quantising` names the formats that `executor quantise` writes.
`lane_threads`, `openmp` and `libraries` say which resources computing may take, `host_kernels` what
computes on the host if that is not torch, and `pacing` is the link of the emulated accelerator: runs
and measurements use the same ones.
"""
