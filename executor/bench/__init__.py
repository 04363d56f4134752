"""Benchmarks of the executor: policies and schedules, on prompts of random tokens."""

from executor.bench.plan import BenchOptions
from executor.bench.row import BenchRow
from executor.bench.run import Bench, BenchRun

__all__ = ["Bench", "BenchOptions", "BenchRow", "BenchRun"]
