"""Exhaustive search: the whole space on a grid, then every integer around the best of it."""

import time
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hrm.closed_form import batch_seconds
from hrm.costs import Costs
from hrm.estimate import Estimate, estimate
from hrm.hardware import HardwareProfile
from hrm.model_spec import ModelSpec
from hrm.policy import Policy, ScheduleName
from hrm.schedules import SCHEDULES
from hrm.search.result import Outcome, SearchResult
from hrm.search.space import Grid, Ints, Space, make_grid
from hrm.tasks import Device
from hrm.units import format_bytes
from hrm.workload import Workload

MAX_MICRO_BATCH: Final = 4096
MAX_MICRO_BATCHES: Final = 1024
COARSE_CHUNKS: Final = [1, 4, 16]
FINE_CHUNKS: Final = [1, 2, 4, 8, 16]
REFINEMENTS: Final = 2
RUNNER_UPS: Final = 3
MAX_SIMULATED: Final = 8


def search(
    spec: ModelSpec, profile: HardwareProfile, workload: Workload, *, dtype: str = "bfloat16",
    schedule: ScheduleName = ScheduleName.CGOPIPE, staging: bool = False,
    attention: Device | None = None, ffn: Device | None = None,
) -> SearchResult:  # fmt: skip
    """The policy with the highest closed-form job throughput that fits, simulated to be sure.

    The grid's spacing is a few per cent; around the best policies all integers are tried. The best
    of each kind are simulated, and the one with the highest simulated throughput is chosen.
    """
    started_s = time.perf_counter()
    space = Space(
        spec=spec, profile=profile, workload=workload, dtype=dtype, schedule=schedule,
        staging=staging, attention=attention, ffn=ffn,
    )  # fmt: skip
    costs = Costs(spec, profile, dtype)
    grid = make_grid(
        space, _coarse_pairs(space), kv_shares=space.kv_shares(3), chunk_factors=COARSE_CHUNKS
    )
    scores = _scores(space, costs, grid)
    evaluations = len(grid)
    if not grid.fits.any():
        return SearchResult(
            solver="exhaustive",
            outcome=Outcome.INFEASIBLE,
            best=None,
            runner_ups=(),
            evaluations=evaluations,
            seconds=time.perf_counter() - started_s,
            gap=0.0,
            simulated=0,
            certified=True,
            remedy=_remedy(space),
        )
    for _ in range(REFINEMENTS):
        around = _neighbours(space, grid, _best_of_each_kind(grid, scores, count=1))
        finer = make_grid(space, around, kv_shares=space.kv_shares(5), chunk_factors=FINE_CHUNKS)
        evaluations += len(finer)
        grid, scores = _merge(grid, scores, finer, _scores(space, costs, finer))
    simulated, unseen = _simulate_the_best(space, grid, scores)
    best, *others = sorted(simulated, key=lambda pair: -pair[1].tokens_per_s)
    highest = float(scores.max())
    return SearchResult(
        solver="exhaustive",
        outcome=Outcome.OPTIMAL,
        best=best[1],
        runner_ups=tuple(estimated for _, estimated in others[:RUNNER_UPS]),
        evaluations=evaluations,
        seconds=time.perf_counter() - started_s,
        gap=max(0.0, 1 - float(scores[best[0]]) / highest),
        simulated=len(simulated),
        certified=unseen <= best[1].tokens_per_s,
    )


def _simulate_the_best(
    space: Space, grid: Grid, scores: NDArray[np.float64]
) -> tuple[list[tuple[int, Estimate]], float]:
    """Candidates with their estimates, and the greatest closed form of a kind left unsimulated.

    The best of each kind are simulated in the order of their closed form until none that is left
    can do better by its own; then as many more as make runner-ups, the best of their kind first.
    """
    of_each_kind = _best_of_each_kind(grid, scores, count=1)
    ranked = _best_of_each_kind(grid, scores, count=RUNNER_UPS)
    queue = of_each_kind + [index for index in ranked if index not in of_each_kind]
    simulated: list[tuple[int, Estimate]] = []
    seen: set[Policy] = set()
    for position, index in enumerate(queue):
        best = max((estimated.tokens_per_s for _, estimated in simulated), default=0.0)
        enough = len(simulated) > RUNNER_UPS and (
            position >= len(of_each_kind) or scores[index] <= best
        )
        if enough or len(simulated) >= MAX_SIMULATED:
            left = max((float(scores[i]) for i in queue[position : len(of_each_kind)]), default=0.0)
            return simulated, left
        policy = grid.policy(space, index)
        if policy not in seen:
            seen.add(policy)
            predicted = estimate(space.spec, policy, space.profile, space.workload)
            simulated.append((index, predicted))
    return simulated, 0.0


def _coarse_pairs(space: Space) -> NDArray[np.int64]:
    """(micro-batch size, number of micro-batches) over the whole range, a few per cent apart."""
    requests = space.workload.num_requests
    limit = min(MAX_MICRO_BATCH, requests or MAX_MICRO_BATCH)
    if SCHEDULES[space.schedule].single_micro_batch:
        sizes = _spaced(limit, 400)
        return np.stack([sizes, np.ones_like(sizes)], axis=1)
    sizes, numbers = _spaced(limit, 40), _spaced(MAX_MICRO_BATCHES, 48)
    pairs = np.stack([grid.ravel() for grid in np.meshgrid(sizes, numbers)], axis=1)
    return _within_requests(pairs, requests)


def _spaced(limit: int, count: int) -> Ints:
    """About `count` integers from 1 to `limit`, evenly spaced in the logarithm."""
    return np.unique(np.rint(np.geomspace(1, limit, count)).astype(np.int64))


def _within_requests(pairs: NDArray[np.int64], requests: int | None) -> NDArray[np.int64]:
    """Cut batches at the number of requests; a last, smaller micro-batch is allowed."""
    if requests is None:
        return np.unique(pairs, axis=0)
    most = -(-requests // pairs[:, 0])
    cut = np.stack([pairs[:, 0], np.minimum(pairs[:, 1], most)], axis=1)
    return np.unique(cut, axis=0)


def _neighbours(space: Space, grid: Grid, indices: list[int]) -> NDArray[np.int64]:
    """Integers around the chosen policies: all near ones, and some up to 15 % away."""
    single = SCHEDULES[space.schedule].single_micro_batch
    pairs: list[NDArray[np.int64]] = []
    for index in indices:
        sizes = _around(int(grid.micro_batch_size[index]))
        number = int(grid.num_micro_batches[index])
        numbers = np.array([1]) if single else _around(number)
        pairs.append(np.stack([g.ravel() for g in np.meshgrid(sizes, numbers)], axis=1))
    return _within_requests(np.concatenate(pairs), space.workload.num_requests)


def _around(value: int) -> Ints:
    far = np.rint(value * np.linspace(0.85, 1.18, 7)).astype(np.int64)
    return np.unique(np.maximum(np.concatenate([far, value + np.arange(-2, 3)]), 1))


def _scores(space: Space, costs: Costs, grid: Grid) -> NDArray[np.float64]:
    """Closed-form tokens a second of every candidate; -1 where it does not fit."""
    scores = np.full(len(grid), -1.0)
    chosen = np.flatnonzero(grid.fits)
    if len(chosen):
        prefill_s, decode_s = batch_seconds(
            costs, grid.point(space, chosen), space.schedule, space.workload
        )
        batch = grid.batch_size[chosen]
        requests = space.workload.num_requests
        # A job of a given length wastes what its last batch leaves empty.
        tokens = batch if requests is None else requests / np.ceil(requests / batch)
        scores[chosen] = tokens * space.workload.gen_len / (prefill_s + decode_s)
    return scores


def _best_of_each_kind(grid: Grid, scores: NDArray[np.float64], *, count: int) -> list[int]:
    """The best candidates of every kind, each of its own number of micro-batches.

    Kinds differ in their devices and in whether none, some or all of the KV cache lives on the
    GPU. Of equals, the one with the fewest micro-batches is better.
    """
    on_gpu = grid.gpu_kv_micro_batches
    kv = (on_gpu > 0).astype(np.int64) + (on_gpu == grid.num_micro_batches)
    kinds = grid.gpu_attention * 6 + grid.gpu_ffn * 3 + kv
    best: list[int] = []
    for kind in np.unique(kinds):
        members = np.flatnonzero((kinds == kind) & grid.fits)
        members = members[np.lexsort((grid.num_micro_batches[members], -scores[members]))]
        _, first = np.unique(grid.num_micro_batches[members], return_index=True)
        best.extend(int(index) for index in members[np.sort(first)[:count]])
    return sorted(best, key=lambda index: -scores[index])


def _merge(
    grid: Grid, scores: NDArray[np.float64], other: Grid, other_scores: NDArray[np.float64]
) -> tuple[Grid, NDArray[np.float64]]:
    """The fitting candidates of both."""
    kept, other_kept = np.flatnonzero(grid.fits), np.flatnonzero(other.fits)
    merged = {
        name: np.concatenate([getattr(grid, name)[kept], getattr(other, name)[other_kept]])
        for name in Grid.__dataclass_fields__
    }
    return Grid(**merged), np.concatenate([scores[kept], other_scores[other_kept]])


def _remedy(space: Space) -> str:
    layer = format_bytes(space.spec.layer_bytes(space.dtype))
    return (
        f"give it more --gpu-memory or --cpu-memory, shorten --max-prompt-len,"
        f" or add GPUs: {space.spec.name} at {space.dtype} has"
        f" {layer} a layer, two of which must fit the GPU, and all must fit the two levels together"
    )
