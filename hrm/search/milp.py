"""The search as mixed-integer linear programs, solved by HiGHS through `scipy.optimize.milp`.

A program picks one of many boxes (micro-batch size, number of micro-batches, chunk, placement of the
projections and of prefill's experts: a binary each) and in it the integers of residency and KV placement. Bytes at both
levels are linear in them, and so is, within a box, every term of which a batch's time is the
longest: a lane's work, a chain of tasks. Nothing is assumed about which residency is best.

Throughput is a ratio: tokens over seconds. With λ the best that is known, Dinkelbach's function is
the maximum of tokens - λ·seconds, and λ is the best of all where that is 0. A box's tokens are a
constant, so that dividing its part by them keeps it linear, and what is minimised is the sum of
(λ·seconds/tokens - 1)·chosen over the boxes. Its minimum, λ/best - 1, needs no further iteration.

Boxes are taken in the order of their ceilings, and those below λ are never put into a program.
"""

from dataclasses import dataclass, replace
from math import inf
from typing import Any, ClassVar, Final, final

import numpy as np

from hrm.errors import PolicyError
from hrm.memory import plan_memory
from hrm.search.boxes import Boxes, BoxMaker, Floats
from hrm.search.choose import Candidate, choose
from hrm.search.constraints import allowed_s, meets
from hrm.search.fit import Ints, Weights
from hrm.search.grid import ALL_THAT_FIT, Grid, make_grid
from hrm.search.lattice import REACHES, ChunkRange, around, chunk_ranges, chunks_of, coarse, pairs_of, places_of, whole
from hrm.search.longest import with_longest_chunks
from hrm.search.scores import scores
from hrm.search.solver import Found, Solver
from hrm.search.space import Kind, KvPlace, Space

BETTER: Final = 1 + 1e-9  # what is not better by this is equal
FIRST_PROGRAM: Final = 8  # boxes; the best of them prunes most of the others
LARGEST_PROGRAM: Final = 256
# HiGHS stops at a gap of 1e-6, which then is 1e-9 of the throughput.
OBJECTIVE_SCALE: Final = 1000.0
INFEASIBLE: Final = 2  # SciPy's status


@final
@dataclass(frozen=True)
class Milp(Solver):
    """Searches the same integers as the exhaustive search, but every residency and KV placement."""

    name: ClassVar[str] = "milp"
    evaluates: ClassVar[str] = "corners of boxes in closed form"

    def find(self, space: Space) -> Found:
        """The best of each kind that may win, simulated."""
        ranges = chunk_ranges(space)
        return choose(space, [ProgramsOfKind(space, kind, chunks) for kind in space.kinds() for chunks in ranges])


class ProgramsOfKind:
    """All boxes of one kind, and the programs that find the best policy in them."""

    def __init__(self, space: Space, kind: Kind, chunks: ChunkRange) -> None:
        self.space, self.kind, self.chunks = space, kind, chunks
        self.evaluations = 0
        places = whole(space, kind, chunks)
        places = coarse(space, kind, chunks) if places is None else places
        self.boxes = self._boxes_of(pairs_of(places), chunks_of(places))

    def ceiling(self) -> float:
        """The highest bound of any box."""
        return 0.0 if self.boxes is None else float(self.boxes[1].ceiling.max(initial=0.0))

    def solve(self, above: float) -> list[Candidate]:
        """The best policy, if it is better than `above`; otherwise it is proved that none is."""
        best = None if self.boxes is None else self._best_of(*self.boxes, above)
        for reach in () if best is None else REACHES:
            assert best is not None
            policy = best.policy
            place = np.array(
                [
                    [
                        policy.micro_batch_size,
                        policy.num_micro_batches,
                        policy.gpu_kv_micro_batches,
                        ALL_THAT_FIT,
                        policy.prefill_chunk_tokens,
                    ]
                ]
            )
            near = around(self.space, self.kind, self.chunks, place, reach)
            boxes = self._boxes_of(pairs_of(near), chunks_of(near))
            if boxes is not None:
                best = self._best_of(*boxes, best.tokens_per_s) or best
        return [] if best is None else [best]

    def _boxes_of(self, pairs: Ints, chunks: list[int]) -> tuple[BoxMaker, Boxes] | None:
        if not len(pairs):
            return None
        places = places_of(self.kind, pairs, chunks, (0.0,))
        rows = make_grid(self.space, self.kind, places)
        rows = rows.and_also(with_longest_chunks(self.space, self.kind, self.chunks, places))
        if not len(rows):  # a single micro-batch has no part of its cache on the GPU
            return None
        columns = rows.micro_batch_size, rows.num_micro_batches, rows.chunk_tokens, rows.gpu_prefill_ffn
        _, first = np.unique(np.stack([*columns, rows.resident_dense]), axis=1, return_index=True)
        rows = rows.take(first)
        bounder = BoxMaker(self.space, rows)
        low = rows.gpu_kv_micro_batches
        high = rows.num_micro_batches - 1 if self.kind.kv is KvPlace.SOME else low
        boxes = bounder.whole(low, high)
        self.evaluations += bounder.evaluations
        return bounder, boxes

    def _best_of(self, bounder: BoxMaker, boxes: Boxes, above: float) -> Candidate | None:
        """The best policy in the boxes that is better than `above`; None if it is proved not so."""
        best: Candidate | None = None
        size = FIRST_PROGRAM
        while True:
            boxes = boxes.take(boxes.ceiling > above * BETTER)
            if not len(boxes):
                return best
            order = np.argsort(-boxes.ceiling, kind="stable")
            chosen, boxes = boxes.take(order[:size]), boxes.take(order[size:])
            if not chosen.is_plane.all():
                divided = bounder.divide(chosen.take(~chosen.is_plane))
                boxes = boxes.and_also(divided).and_also(chosen.take(chosen.is_plane))
                continue
            size = min(2 * size, LARGEST_PROGRAM)
            while (found := best_in_program(bounder, chosen, above)) is not None:
                box, experts, on_gpu = found
                candidate = self._candidate(bounder.rows, int(chosen.rows[box]), experts, on_gpu)
                if candidate is None:  # a little too much: within the solver's tolerance
                    chosen = bounder.without(chosen, box, experts, on_gpu)
                    continue
                if candidate.tokens_per_s > above * BETTER:
                    best, above = candidate, candidate.tokens_per_s
                break

    def _candidate(self, rows: Grid, row: int, experts: int, on_gpu: int) -> Candidate | None:
        """The policy with its closed form as it is scored everywhere; None if it does not fit.

        Nor does it if it misses a limit on waiting times.
        """
        grid = replace(
            rows.take(np.array([row])), resident_total=np.array([experts]), gpu_kv_micro_batches=np.array([on_gpu])
        )
        policy = grid.policy(self.space, 0)
        try:
            plan_memory(self.space.spec, policy, self.space.profile).check_fits()
        except PolicyError:
            return None
        return Candidate(policy, float(scores(self.space, grid)[0])) if meets(self.space, grid).all() else None


def best_in_program(bounder: BoxMaker, boxes: Boxes, above: float) -> tuple[int, int, int] | None:
    """(box, resident experts, micro-batches with KV on the GPU) of the best policy in the boxes.

    None if none is better than `above`, or if none fits.
    """
    values = _Program(bounder, boxes).solve(above)
    if values is None or not values[0].any():
        return None
    box = int(values[0].argmax())
    return box, int(boxes.low[box] + values[1, box]), int(boxes.kv_low[box] + values[2, box])


class _Program:
    """A program over boxes, each of whose columns has an entry for every box.

    They are: chosen, experts and micro-batches beyond the low corner, experts of every layer, and the phases' seconds
    in units of the least that the box allows.
    """

    def __init__(self, bounder: BoxMaker, boxes: Boxes) -> None:
        self.bounder, self.boxes, self.space = bounder, boxes, bounder.space
        self.columns = np.arange((4 + len(bounder.weights)) * len(boxes)).reshape(-1, len(boxes))
        self.chosen, self.experts, self.on_gpu, self.of_every_layer, *self.seconds = self.columns
        self.unit_s = bounder.tokens(boxes) / boxes.ceiling
        self.rows = _Rows()
        self._stay_in_boxes()
        self._fit_memory()
        self._take_their_time()
        self._meet_limits()

    def _stay_in_boxes(self) -> None:
        rows, boxes, chosen = self.rows, self.boxes, self.chosen
        rows.at_most_zero((self.experts, 1.0), (chosen, boxes.low - boxes.high))
        rows.at_most_zero((self.on_gpu, 1.0), (chosen, boxes.kv_low - boxes.kv_high))
        layers = float(self.space.spec.num_expert_layers)
        rows.at_most_zero((self.of_every_layer, layers), (chosen, -boxes.low), (self.experts, -1.0))

    def _fit_memory(self) -> None:
        unit_bytes, profile = Weights(self.space).expert_bytes, self.space.profile
        for planes, level in ((self.boxes.gpu_bytes, profile.top), (self.boxes.cpu_bytes, profile.host)):
            for at_low, an_expert, a_micro_batch, a_layer in planes / unit_bytes:
                self.rows.at_most_zero(
                    (self.chosen, at_low - level.usable_bytes / unit_bytes),
                    (self.experts, an_expert),
                    (self.on_gpu, a_micro_batch),
                    (self.of_every_layer, a_layer),
                )

    def _take_their_time(self) -> None:
        """A phase takes as long as the longest of its terms."""
        matters = self.bounder.may_be_longest(self.boxes)
        for term, phase in enumerate(self.bounder.phase_of_term):
            of = np.flatnonzero(matters[term])
            at_low, an_expert, a_micro_batch = self.boxes.terms[:, term, of] / self.unit_s[of]
            self.rows.at_most_zero(
                (self.chosen[of], at_low),
                (self.experts[of], an_expert),
                (self.on_gpu[of], a_micro_batch),
                (self.seconds[phase][of], -1.0),
            )

    def _meet_limits(self) -> None:
        first, *later = (weight * self.unit_s for weight in self.bounder.weights)
        most_prefill_s, most_decode_s = allowed_s(self.space)
        if most_prefill_s < inf:
            self.rows.at_most_zero((self.seconds[0], first / most_prefill_s), (self.chosen, -1.0))
        if most_decode_s < inf:
            steps = zip(self.seconds[1:], later, strict=True)
            self.rows.at_most_zero(*((column, each_s / most_decode_s) for column, each_s in steps), (self.chosen, -1.0))

    def solve(self, above: float) -> Ints | None:
        """The columns of the best, all zeros if none is better than `above`; None if nothing fits."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        boxes, shape, size = self.boxes, self.columns.shape, self.columns.size
        known = above if above > 0 else float(boxes.ceiling.max())
        costs = np.zeros(shape)
        costs[0] = -1.0
        costs[4:] = np.multiply.outer(self.bounder.weights, known / boxes.ceiling)
        most = np.full(shape, np.inf)
        experts = np.full(len(boxes), self.space.spec.num_experts)
        most[:4] = np.ones(len(boxes)), boxes.high - boxes.low, boxes.kv_high - boxes.kv_low, experts
        integral = np.zeros(shape, np.int64)
        integral[:4] = 1
        pick = np.zeros(size)
        pick[self.chosen] = 1
        solved: Any = milp(
            OBJECTIVE_SCALE * costs.ravel(),
            integrality=integral.ravel(),
            bounds=Bounds(0.0, most.ravel()),
            constraints=[self.rows.constraint(size), LinearConstraint(pick, 0 if above > 0 else 1, 1)],
            options={"mip_rel_gap": 1e-9},
        )
        if solved.status == INFEASIBLE:
            return None
        assert solved.status == 0, solved.message
        return np.rint(solved.x).reshape(shape).astype(np.int64)


class _Rows:
    """Rows of a program, gathered block by block."""

    def __init__(self) -> None:
        self.rows: list[Ints] = []
        self.columns: list[Ints] = []
        self.values: list[Floats] = []
        self.count = 0

    def at_most_zero(self, *terms: tuple[Ints, Floats | Ints | float]) -> None:
        """One row for every entry of the terms' columns: coefficients × columns are at most 0."""
        number = len(terms[0][0])
        rows = self.count + np.arange(number)
        for columns, values in terms:
            self.rows.append(rows)
            self.columns.append(columns)
            self.values.append(np.broadcast_to(values, number).astype(float))
        self.count += number

    def constraint(self, num_columns: int) -> Any:
        """All rows as SciPy takes them."""
        from scipy.optimize import LinearConstraint
        from scipy.sparse import csr_array

        places = np.concatenate(self.rows), np.concatenate(self.columns)
        shape = self.count, num_columns
        return LinearConstraint(csr_array((np.concatenate(self.values), places), shape), ub=0.0)
