"""Closed-form job throughput of every candidate of a grid."""

from typing import Final

import numpy as np
from numpy.typing import NDArray

from hrm.closed_form import DecodeStep, Point, batch_seconds, seconds_of_batches
from hrm.numeric import maximum
from hrm.policy import Policy, ScheduleName
from hrm.search.grid import Grid
from hrm.search.space import Space

FEW: Final = 4000  # candidates, all of which are scored
FIRST: Final = 64  # of more, those of which the best says what is worth it


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


def scored(space: Space, grid: Grid, margin: float, least: float = 0.0) -> tuple[Grid, NDArray[np.float64]]:
    """The candidates with their scores, without those that are not within a factor of `margin` of the best.

    Nor are those left that have no more than `least`. In grids of few, all are.
    """
    if least and not grid.kind.gpu_ffn and len(grid) > FEW:
        grid = grid.take(np.flatnonzero(_most(space, grid, _cpu_seconds(space, grid)) > least))
    if len(grid) <= FEW:
        return grid, scores(space, grid)
    most = _most(space, grid, _least_seconds(space, grid))
    first = grid.take(np.argpartition(most, -FIRST)[-FIRST:])
    least = max(least, scores(space, first).max() / margin)
    grid = grid.take(np.flatnonzero(most > least))
    return grid, scores(space, grid)


def _most(space: Space, grid: Grid, least_seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    return tokens_per_batch(space, grid.batch_size) / np.maximum(least_seconds, 1e-12)


def _least_seconds(space: Space, grid: Grid) -> NDArray[np.float64]:
    """Seconds that a batch takes at least: of decode all over the first context, and of prefill the CPU's experts."""
    workload, seconds = space.workload, np.zeros(len(grid))
    if workload.decode_steps:
        step = DecodeStep.of_point(space.costs, grid.point(space), space.schedule, workload.active_share)
        seconds += workload.decode_steps * maximum(*step.terms(workload.prompt_len + 1))
    return seconds if grid.kind.gpu_ffn else seconds + _cpu_prefill_seconds(space, grid)


def _cpu_seconds(space: Space, grid: Grid) -> NDArray[np.float64]:
    """Seconds that the CPU's experts take for a batch in both phases, where the CPU computes some."""
    spec, workload = space.spec, space.workload
    tokens = workload.active_share * grid.batch_size / grid.num_micro_batches
    of_layer = space.costs.cpu_experts(tokens, _in_a_layer(space, grid))
    of_step = of_layer * grid.num_micro_batches * spec.num_expert_layers
    return workload.decode_steps * of_step + _cpu_prefill_seconds(space, grid)


def _cpu_prefill_seconds(space: Space, grid: Grid) -> NDArray[np.float64]:
    spec, seconds = space.spec, np.zeros(len(grid))
    on_cpu = np.flatnonzero(grid.gpu_prefill_ffn == 0)
    if len(on_cpu):
        tokens = grid.batch_size[on_cpu] * space.workload.prompt_len
        of_layer = space.costs.cpu_experts(tokens, _in_a_layer(space, grid)[on_cpu])
        seconds[on_cpu] = of_layer * (spec.num_expert_layers - 1)  # the last may have less to do
    return seconds


def _in_a_layer(space: Space, grid: Grid) -> NDArray[np.float64]:
    """Experts that are not resident, as a mean over the layers that have experts."""
    return space.spec.num_experts - grid.resident_total / space.spec.num_expert_layers


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
