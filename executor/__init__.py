"""Runs mixture-of-experts models whose weights do not fit the memory of the device that runs them.

From the bottom up:

- `checkpoint` reads safetensors; `families` know the names and quirks of a model family;
- `model` is the maths, pure functions on tensors; `backends` allocate, copy and synchronise;
- `weight_pages`, `kv_cache`, `lanes`, `batching` and `sampling` are what a run is made of;
- `handlers` turn a task kind into a callable, and `engine` submits a task graph of `hrm.schedules`;
- `generate` runs a batch, `job` a file of requests, and `cli` is thin.

Importing the package loads nothing heavy.
"""
