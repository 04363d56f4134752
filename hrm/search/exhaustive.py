"""Exhaustive search: a small space whole; of a large one a grid, and integers around its best."""

from dataclasses import dataclass
from typing import ClassVar, Final, final

import numpy as np
from numpy.typing import NDArray

from hrm.latency import NO_LIMITS
from hrm.search.choose import Candidate, choose
from hrm.search.constraints import meets
from hrm.search.fit import Ints
from hrm.search.grid import Grid, make_grid
from hrm.search.lattice import REACHES, ChunkRange, around, chunk_ranges, coarse, counted_up, whole
from hrm.search.longest import with_longest_chunks
from hrm.search.scores import scored
from hrm.search.solver import Found, Solver
from hrm.search.space import Kind, Space

CANDIDATES: Final = 10  # of a kind, that may be simulated
BEAM: Final = 8
ROUGH_NUMBERS: Final = 4  # of micro-batches, tried to see which spaces are worth a search
KEPT: Final = 2.0  # candidates that are worse than the best of the kind by this factor are not kept
# How much higher the best of a kind may be than what was found on the coarse grid, and after each round around that.
MARGINS: Final = (1.25, 1.09, 1.05, 1.025, 1.01, 1.005, 1.0)


@final
@dataclass(frozen=True, slots=True)
class Exhaustive(Solver):
    """The highest closed form on grids of all kinds; the best of each kind that may win are simulated."""

    name: ClassVar[str] = "exhaustive"
    evaluates: ClassVar[str] = "policies in closed form"

    def find(self, space: Space) -> Found:
        """The best of each kind that may win, simulated."""
        return choose(space, grids(space))


def greatest(space: Space) -> float:
    """The greatest closed-form throughput of a space, as far as this search finds it."""
    best, kinds = 0.0, grids(space)
    while (kind := max(kinds, key=GridOfKind.ceiling)).ceiling() > best:
        if kind.solve(best) is not None:
            best = max(best, kind.best)
    return best


def rough(space: Space, *, all_kinds: bool = False) -> float:
    """About the greatest closed-form throughput of a space, by few policies that split no prompt.

    The CPU computes no experts, where that is left open, unless `all_kinds` are asked for: it seldom wins.
    """
    best, chunks, kinds = 0.0, chunk_ranges(space)[0], space.kinds()
    for kind in kinds if all_kinds else [kind for kind in kinds if kind.gpu_ffn] or kinds:
        grid = make_grid(space, kind, coarse(space, kind, chunks, ROUGH_NUMBERS))
        _, found = scored(space, grid.take(np.flatnonzero(grid.fits)), KEPT, best)
        best = max(best, float(found.max(initial=0.0)))
    return best


def grids(space: Space) -> list["GridOfKind"]:
    """Every kind, with chunks that hold the longest prompt and with those that split it."""
    found: list[GridOfKind] = []
    for kind in sorted(space.kinds(), key=lambda kind: -kind.gpu_ffn):  # the CPU's experts seldom win
        for chunks in chunk_ranges(space):
            best = max((one.best for one in found), default=0.0)
            found.append(GridOfKind(space, kind, chunks, best / KEPT))
    return found


class GridOfKind:
    """The candidates of one kind that have been tried and fit, with their scores, if they may be above `least`."""

    def __init__(self, space: Space, kind: Kind, chunks: ChunkRange, least: float = 0.0) -> None:
        self.space, self.kind, self.chunks, self.least = space, kind, chunks, least
        self.evaluations = self.rounds = 0
        places = whole(space, kind, chunks)
        self.whole = places is not None
        self.grid, self.scores = self._try(coarse(space, kind, chunks) if places is None else places)

    @property
    def best(self) -> float:
        """The best score."""
        return float(self.scores.max(initial=0.0))

    def ceiling(self) -> float:
        """The best score and somewhat more, for what lies between those that were tried."""
        return self.best * MARGINS[self.rounds]

    def solve(self, above: float = 0.0) -> list[Candidate] | None:
        """The best candidates, each of another form; None if integers nearer around the best are to be tried first.

        That is only done if they may be above. A simulation may prefer what the closed form does not tell apart: half
        of them differ in their number of micro-batches, the others in chunks, in where projections lie and in where
        prefill computes experts. Of equals, the one with the fewest micro-batches is better.
        """
        if self.rounds < len(REACHES) and self.ceiling() > above:
            self.rounds += 1
            self._refine(REACHES[self.rounds - 1])
            return None
        chosen = self._unlike(CANDIDATES)
        return [Candidate(self.grid.policy(self.space, index), float(self.scores[index])) for index in chosen]

    def _refine(self, reach: float) -> None:
        """Try the integers around the best few, up to a share of `reach` away."""
        best = list(dict.fromkeys([*self._best(BEAM), *self._best(BEAM // 2, self._forms())]))
        if best:
            near = self.grid.take(np.array(best)).places()
            grid, found = self._try(around(self.space, self.kind, self.chunks, near, reach))
            self.grid = self.grid.and_also(grid)
            self.scores = np.concatenate([self.scores, found])

    def _try(self, places: Ints) -> tuple[Grid, NDArray[np.float64]]:
        grid = make_grid(self.space, self.kind, places)
        if self.whole and not self.rounds and not self.kind.gpu_ffn:
            grid = self._with_every_residency(grid)
        else:
            grid = grid.and_also(with_longest_chunks(self.space, self.kind, self.chunks, places))
        self.evaluations += len(grid)
        grid = grid.take(np.flatnonzero(grid.fits))
        if self.space.limits != NO_LIMITS:
            grid = grid.take(np.flatnonzero(meets(self.space, grid)))
        return scored(self.space, grid, KEPT, self.least)

    def _with_every_residency(self, grid: Grid) -> Grid:
        counts = grid.most_residents + 1
        rows, totals = counted_up(np.arange(len(grid)), counts)
        return grid.take(rows).with_residents(self.space, totals - 1)

    def _unlike(self, count: int) -> list[int]:
        """Positions of the best, half of them of unlike numbers, half of unlike chunks."""
        found = self._best(-(-count // 2), self.grid.half_octaves)
        return list(dict.fromkeys([*found, *self._best(count, self._forms())]))[:count]

    def _forms(self) -> Ints:
        """What tells candidates apart besides their numbers of micro-batches."""
        octaves = np.log2(self.grid.chunk_tokens).round().astype(np.int64)
        return 4 * octaves + 2 * self.grid.gpu_prefill_ffn + self.grid.resident_dense

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
