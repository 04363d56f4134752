"""Closed-form job throughput of every candidate of a grid."""

import numpy as np
from numpy.typing import NDArray

from hrm.closed_form import Point, batch_seconds, seconds_of_batches
from hrm.policy import Policy, ScheduleName
from hrm.search.grid import Grid
from hrm.search.space import Space


def tokens_per_batch(space: Space, batch_size: NDArray[np.int64]) -> NDArray[np.float64]:
    """Tokens that a full batch contributes to the job, on average over its batches.

    A job of a given length wastes what its last batch leaves empty.
    """
    requests = space.workload.num_requests
    batch = batch_size.astype(float)
    useful = batch if requests is None else requests / np.ceil(requests / batch)
    return useful * space.workload.generated_tokens


def scores(space: Space, grid: Grid) -> NDArray[np.float64]:
    """Closed-form tokens a second of every candidate, whether or not it fits."""
    if not len(grid):
        return np.zeros(0)
    seconds = seconds_of_batches(space.costs, grid.point(space), space.schedule, space.workload)
    return tokens_per_batch(space, grid.batch_size) / seconds


def scored(space: Space, grid: Grid, margin: float) -> tuple[Grid, NDArray[np.float64]]:
    """The candidates with their scores, without those whose experts take too long in prefill on the CPU alone.

    So long that they are not within a factor of `margin` of the best of the others.
    """
    others, on_cpu = (grid.take(np.flatnonzero(grid.gpu_prefill_ffn == device)) for device in (1, 0))
    found = scores(space, others)
    if not len(on_cpu):
        return others, found
    spec = space.spec
    in_a_layer = spec.num_experts - on_cpu.resident_total / spec.num_expert_layers
    seconds = space.costs.cpu_experts(on_cpu.batch_size * space.workload.prompt_len, in_a_layer)
    seconds = seconds * (spec.num_expert_layers - 1)  # the last may have less to do
    enough = found.max(initial=0.0) / margin
    promising = on_cpu.take(np.flatnonzero(tokens_per_batch(space, on_cpu.batch_size) > enough * seconds))
    return others.and_also(promising), np.concatenate([found, scores(space, promising)])


def score_of(space: Space, policy: Policy) -> float:
    """Closed-form tokens a second of one policy, as `scores` has it."""
    tokens = float(tokens_per_batch(space, np.array(policy.batch_size)))
    return tokens / _seconds_of_batch(space, policy, space.schedule)


def bound_of(space: Space, policy: Policy) -> float:
    """Tokens a second of full batches if a schedule overlapped all that can be overlapped."""
    tokens = policy.batch_size * space.workload.generated_tokens
    return tokens / _seconds_of_batch(space, policy, ScheduleName.CGOPIPE)


def _seconds_of_batch(space: Space, policy: Policy, schedule: ScheduleName) -> float:
    point = Point.of_policy(policy, space.spec)
    return sum(batch_seconds(space.costs, point, schedule, space.workload))
