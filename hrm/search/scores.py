"""Closed-form job throughput of every candidate of a grid."""

import numpy as np
from numpy.typing import NDArray

from hrm.closed_form import batch_seconds
from hrm.costs import Costs
from hrm.search.space import Grid, Space


def tokens_per_batch(space: Space, batch_size: NDArray[np.int64]) -> NDArray[np.float64]:
    """Tokens that a full batch contributes to the job, on average over its batches.

    A job of a given length wastes what its last batch leaves empty.
    """
    requests = space.workload.num_requests
    batch = batch_size.astype(float)
    useful = batch if requests is None else requests / np.ceil(requests / batch)
    return useful * space.workload.gen_len


def scores(space: Space, costs: Costs, grid: Grid) -> NDArray[np.float64]:
    """Closed-form tokens a second of every candidate, whether or not it fits."""
    if not len(grid):
        return np.zeros(0)
    prefill_s, decode_s = batch_seconds(costs, grid.point(space), space.schedule, space.workload)
    return tokens_per_batch(space, grid.batch_size) / (prefill_s + decode_s)
