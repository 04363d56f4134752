"""The stages of `tests.bench.first_gpu_run`, and what they share."""
