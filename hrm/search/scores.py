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
