"""The steps of `tests.bench.gpu_suite`, one file each, and what they share."""
