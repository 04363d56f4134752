"""Exhaustive search: a small space whole; of a large one a grid, and integers around its best."""

import time
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hrm.costs import Costs
from hrm.hardware import HardwareProfile
from hrm.latency import NO_LIMITS, LatencyLimits
from hrm.model_spec import ModelSpec
from hrm.policy import ScheduleName
from hrm.search.choose import Candidate, choose
from hrm.search.constraints import meets
from hrm.search.fit import Ints
from hrm.search.grid import Grid, make_grid
from hrm.search.lattice import REACHES, ChunkRange, around, chunk_ranges, coarse, counted_up, whole
from hrm.search.polish import polished
from hrm.search.result import Outcome, SearchResult
from hrm.search.scores import scores
from hrm.search.space import Kind, Space
from hrm.search.ties import smallest_first
from hrm.search.ways import search_ways
from hrm.tasks import Device
from hrm.workload import Workload

RUNNER_UPS: Final = 2
CANDIDATES: Final = 10  # of a kind, that may be simulated
BEAM: Final = 8
# How much higher than on the coarse grid the best of a kind may be.
COARSE_MARGIN: Final = 1.25


def search(
    spec: ModelSpec,
    profile: HardwareProfile,
    workload: Workload,
    *,
    dtype: str = "bfloat16",
    schedule: ScheduleName = ScheduleName.CGOPIPE,
    staging: bool = False,
    attention: Device | None = None,
    ffn: Device | None = None,
    runner_ups: int = RUNNER_UPS,
    limits: LatencyLimits = NO_LIMITS,
) -> SearchResult:
    """The policy with the highest closed-form job throughput that fits, simulated to be sure.

    The best of each kind that may win are simulated, and the one with the highest simulated
    throughput is chosen. Policies whose requests would wait longer than `limits` are left out.
    Of those that are as fast to a thousandth, the one with the smallest batch is chosen.
    """
    space = Space(
        spec=spec,
        profile=profile,
        workload=workload,
        dtype=dtype,
        schedule=schedule,
        staging=staging,
        attention=attention,
        ffn=ffn,
        limits=limits,
    )
    return search_ways(space, lambda part: search_space(part, runner_ups=runner_ups))


def search_space(space: Space, *, runner_ups: int = RUNNER_UPS) -> SearchResult:
    """`search`, with the space given."""
    started_s = time.perf_counter()
    costs = Costs(space.spec, space.profile, space.formats)
    kinds = grids(space, costs)
    choice = choose(space, list(kinds), runner_ups=runner_ups)
    estimates = polished(space, costs, choice.ranked, choice.greatest_tokens_per_s)
    estimates = smallest_first(space, costs, estimates)
    return SearchResult(
        solver="exhaustive",
        outcome=Outcome.BEST_FOUND if estimates else Outcome.INFEASIBLE,
        best=estimates[0] if estimates else None,
        runner_ups=estimates[1 : runner_ups + 1],
        greatest_tokens_per_s=choice.greatest_tokens_per_s,
        evaluations=sum(kind.evaluations for kind in kinds),
        seconds=time.perf_counter() - started_s,
        simulated=len(estimates),
        overshoot=choice.overshoot,
    )


def greatest(space: Space) -> float:
    """The greatest closed-form throughput of a space, as far as this search finds it."""
    best, costs = 0.0, Costs(space.spec, space.profile, space.formats)
    kinds = grids(space, costs)
    for kind in sorted(kinds, key=lambda kind: -kind.ceiling()):
        if kind.ceiling() > best:
            best = max([best, *(candidate.tokens_per_s for candidate in kind.solve())])
    return best


def grids(space: Space, costs: Costs) -> list["GridOfKind"]:
    """Every kind, with chunks that hold the longest prompt and with those that split it."""
    ranges = chunk_ranges(space)
    return [GridOfKind(space, costs, kind, chunks) for kind in space.kinds() for chunks in ranges]


class GridOfKind:
    """The candidates of one kind that have been tried and fit, with their scores."""

    def __init__(self, space: Space, costs: Costs, kind: Kind, chunks: ChunkRange) -> None:
        self.space, self.costs, self.kind, self.chunks = space, costs, kind, chunks
        self.evaluations = 0
        places = whole(space, kind, chunks)
        self.whole = places is not None
        self.grid, self.scores = self._try(coarse(space, kind, chunks) if places is None else places)

    def ceiling(self) -> float:
        """The best score and somewhat more, for what lies between those that were tried."""
        return float(self.scores.max(initial=0.0)) * COARSE_MARGIN

    def solve(self, above: float = 0.0, *, count: int = CANDIDATES) -> list[Candidate]:
        """The best candidates, each of another form, the integers around tried.

        A simulation may prefer what the closed form does not tell apart: half of them differ in
        their number of micro-batches, the others in chunks and in where projections lie. Of equals,
        the one with the fewest micro-batches is better.
        """
        del above  # a grid that has been tried has all of them
        self._refine()
        return [
            Candidate(self.grid.policy(self.space, index), float(self.scores[index])) for index in self._unlike(count)
        ]

    def _refine(self) -> None:
        """Try the integers around the best few, nearer and nearer."""
        for reach in REACHES:
            best = np.array(self._best(BEAM), np.int64)
            if not len(best):
                return
            near = self.grid.take(best).places()
            grid, found = self._try(around(self.space, self.kind, self.chunks, near, reach))
            self.grid = self.grid.and_also(grid)
            self.scores = np.concatenate([self.scores, found])

    def _try(self, places: Ints) -> tuple[Grid, NDArray[np.float64]]:
        grid = make_grid(self.space, self.kind, places)
        if self.whole and not self.kind.gpu_ffn:
            grid = self._with_every_residency(grid)
        self.evaluations += len(grid)
        grid = grid.take(np.flatnonzero(grid.fits))
        grid = grid.take(np.flatnonzero(meets(self.space, self.costs, grid)))
        return grid, scores(self.space, self.costs, grid)

    def _with_every_residency(self, grid: Grid) -> Grid:
        counts = grid.most_residents + 1
        rows, totals = counted_up(np.arange(len(grid)), counts)
        return grid.take(rows).with_residents(self.space, totals - 1)

    def _unlike(self, count: int) -> list[int]:
        """Positions of the best, half of them of unlike numbers, half of unlike chunks."""
        grid = self.grid
        half_octaves = (2 * np.log2(grid.num_micro_batches)).round().astype(np.int64)
        octaves = np.log2(grid.chunk_tokens).round().astype(np.int64)
        found = self._best(-(-count // 2), half_octaves)
        others = self._best(count, 2 * octaves + grid.resident_dense)
        return list(dict.fromkeys([*found, *others]))[:count]

    def _best(self, count: int, forms: Ints | None = None) -> list[int]:
        """Positions of the best, each of another form: by default, number of micro-batches."""
        left, numbers, found = self.scores.copy(), self.grid.num_micro_batches, list[int]()
        forms = numbers if forms is None else forms
        while len(found) < count and (best := left.max(initial=0.0)) > 0:
            equals = np.flatnonzero(left == best)
            order = 2 * numbers[equals] - self.grid.resident_dense[equals]
            found.append(int(equals[np.argmin(order)]))
            left[forms == forms[found[-1]]] = 0.0
        return found
