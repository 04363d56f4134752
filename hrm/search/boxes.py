"""Ranges of residency and KV placement, with bounds on the throughput of all that lies in them.

For one micro-batch size, number of micro-batches, chunk and placement of the projections, two
integers are left: how many experts are resident, and how many micro-batches have their KV cache on
the GPU. Over a rectangle of these, the terms of which a batch's time is made are evaluated at the
corners and between them, by the functions that score policies. Where they are not planes (a link's
rate bends, a transfer vanishes), the rectangle is divided until they are.
"""

from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hrm.closed_form import batch_terms, stacked
from hrm.schedules import SCHEDULES
from hrm.search.fit import Ints, Weights, gpu_needed, host_purposes, pinned_needed
from hrm.search.grid import Grid
from hrm.search.scores import tokens_per_batch
from hrm.search.space import Space

Floats = NDArray[np.float64]
PLANE_TOLERANCE: Final = 1e-9  # of a phase's time
# Shares of both ranges, and steps from there: corners, middles, and what is next to the corners.
_PROBES: Final = np.array(
    [
        (0, 0, 0, 0),
        (1, 0, 0, 0),
        (0, 1, 0, 0),
        (1, 1, 0, 0),
        (0.5, 0, 0, 0),
        (0, 0.5, 0, 0),
        (0.5, 0.5, 0, 0),
        (0, 0, 1, 0),
        (1, 0, -1, 0),
        (0, 0, 0, 1),
        (0, 1, 0, -1),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Boxes:
    """Rectangles of integers, one an entry of every array.

    `rows` index the candidates that say everything else. Residency goes from `low` to `high` and
    micro-batches with their KV cache on the GPU from `kv_low` to `kv_high`, ends included. No
    policy in a box has a higher closed-form throughput than its `ceiling`, if more residents and
    more of the cache on the GPU change no term both ways. `terms` has three planes: values at the
    low corner, and what one more expert and one more micro-batch add; `is_plane` says whether they
    hold all over the box, and `divide_kv` along which side it is to be divided if not. Bytes at
    both levels have two sets of four planes (`BoxMaker.boxes`).
    """

    rows: Ints
    low: Ints
    high: Ints
    kv_low: Ints
    kv_high: Ints
    ceiling: Floats
    is_plane: NDArray[np.bool_]
    divide_kv: NDArray[np.bool_]
    terms: Floats
    gpu_bytes: Floats
    cpu_bytes: Floats

    def __len__(self) -> int:
        """Number of boxes."""
        return len(self.rows)

    def take(self, chosen: Ints | NDArray[np.bool_]) -> "Boxes":
        """The chosen boxes only."""
        return Boxes(**{name: getattr(self, name)[..., chosen] for name in _FIELDS})

    def and_also(self, other: "Boxes") -> "Boxes":
        """The boxes of both."""
        both = {name: np.concatenate([getattr(self, name), getattr(other, name)], axis=-1) for name in _FIELDS}
        return Boxes(**both)


_FIELDS = tuple(Boxes.__dataclass_fields__)


class BoxMaker:
    """Makes and divides boxes over the candidates of a grid, whose own residency is ignored."""

    def __init__(self, space: Space, rows: Grid) -> None:
        self.space, self.rows = space, rows
        self.evaluations = 0
        one = rows.take(np.zeros(1, np.int64)).point(space)
        phases = batch_terms(space.costs, one, space.schedule, space.workload)
        self.weights = np.concatenate([weights for weights, _ in phases]).ravel()
        of_rows = [len(terms) for weights, terms in phases for _ in weights]
        self.phase_of_term = np.repeat(np.arange(len(of_rows)), of_rows)

    def whole(self, kv_low: Ints, kv_high: Ints) -> Boxes:
        """Boxes of all residencies of every candidate: less than everything, and everything."""
        rows = np.arange(len(self.rows))
        everything = np.full(len(rows), self.space.everything)
        all_resident = self.boxes(rows, everything, everything, kv_low, kv_high)
        if not self.space.profile.has_accelerator:
            return all_resident
        streamed = self.boxes(rows, np.zeros_like(rows), everything - 1, kv_low, kv_high)
        return streamed.and_also(all_resident)

    def boxes(self, rows: Ints, low: Ints, high: Ints, kv_low: Ints, kv_high: Ints) -> Boxes:
        """Boxes with their bounds, without what cannot fit the memories."""
        gpu, cpu = self._bytes(rows, low, kv_low)
        high, kv_high, fits = self._tightened(gpu, cpu, low, high, kv_low, kv_high)
        rows, low, high, kv_low, kv_high = (x[fits] for x in (rows, low, high, kv_low, kv_high))
        flat = bool((kv_low == kv_high).all())
        probes = _PROBES[(_PROBES[:, 1] == 0) & (_PROBES[:, 3] == 0)] if flat else _PROBES
        experts = _between(low, high, probes[:, 0], probes[:, 2])
        on_gpu = _between(kv_low, kv_high, probes[:, 1], probes[:, 3])
        values = self._terms(rows, experts, on_gpu)
        an_expert = (values[:, 1] - values[:, 0]) / np.maximum(high - low, 1)
        a_micro_batch = np.zeros_like(an_expert)
        if not flat:
            a_micro_batch = (values[:, 2] - values[:, 0]) / np.maximum(kv_high - kv_low, 1)
        plane = values[:, :1] + (an_expert[:, None] * (experts - low) + a_micro_batch[:, None] * (on_gpu - kv_low))
        longest = self._longest(values.max(axis=1))
        off = np.abs(values - plane) > PLANE_TOLERANCE * longest[self.phase_of_term][:, None]
        uneven: NDArray[np.bool_] = np.logical_or.reduce(off, axis=0)
        of_experts = (probes[:, 1] == 0) & (probes[:, 3] == 0)
        along_experts: NDArray[np.bool_] = np.logical_or.reduce(uneven[of_experts], axis=0)
        # A phase takes the longest of its terms, and each is least at some corner.
        least_s = self.weights @ self._longest(values.min(axis=1))
        tokens = tokens_per_batch(self.space, self.rows.batch_size[rows])
        return Boxes(
            rows=rows,
            low=low,
            high=high,
            kv_low=kv_low,
            kv_high=kv_high,
            ceiling=tokens / least_s,
            is_plane=~np.logical_or.reduce(uneven, axis=0),
            divide_kv=~along_experts & (kv_high > kv_low),
            terms=np.stack([values[:, 0], an_expert, a_micro_batch]),
            gpu_bytes=gpu[..., fits],
            cpu_bytes=cpu[..., fits],
        )

    def divide(self, boxes: Boxes) -> Boxes:
        """Two boxes for each one, cut where terms are known to bend, or else in the middle."""
        layers, everything = self.space.spec.num_expert_layers, self.space.everything
        cut = (boxes.low + boxes.high) // 2
        for bend in (layers, everything - layers):
            cut = np.where((boxes.low <= bend) & (bend < boxes.high), bend, cut)
        kv_cut = (boxes.kv_low + boxes.kv_high) // 2
        in_kv = boxes.divide_kv
        lower = self.boxes(
            boxes.rows,
            boxes.low,
            np.where(in_kv, boxes.high, cut),
            boxes.kv_low,
            np.where(in_kv, kv_cut, boxes.kv_high),
        )
        upper = self.boxes(
            boxes.rows,
            np.where(in_kv, boxes.low, cut + 1),
            boxes.high,
            np.where(in_kv, kv_cut + 1, boxes.kv_low),
            boxes.kv_high,
        )
        return lower.and_also(upper)

    def without(self, boxes: Boxes, box: int, experts: int, on_gpu: int) -> Boxes:
        """The same boxes with one policy cut out of one of them."""
        row, low, high, kv_low, kv_high = (
            int(x[box]) for x in (boxes.rows, boxes.low, boxes.high, boxes.kv_low, boxes.kv_high)
        )
        parts = np.array(
            [
                (row, low, experts - 1, kv_low, kv_high),
                (row, experts + 1, high, kv_low, kv_high),
                (row, experts, experts, kv_low, on_gpu - 1),
                (row, experts, experts, on_gpu + 1, kv_high),
            ]
        )
        parts = parts[(parts[:, 1] <= parts[:, 2]) & (parts[:, 3] <= parts[:, 4])]
        others = boxes.take(np.arange(len(boxes)) != box)
        return others.and_also(self.boxes(*parts.T)) if len(parts) else others

    def tokens(self, boxes: Boxes) -> Floats:
        """Tokens that a batch of every box contributes to the job."""
        return tokens_per_batch(self.space, self.rows.batch_size[boxes.rows])

    def may_be_longest(self, boxes: Boxes) -> NDArray[np.bool_]:
        """Which terms are the longest of their phase somewhere in a box where all are planes."""
        at_low, an_expert, a_micro_batch = boxes.terms
        sides = (an_expert * (boxes.high - boxes.low), a_micro_batch * (boxes.kv_high - boxes.kv_low))
        least = at_low + sum(np.minimum(side, 0) for side in sides)
        most = at_low + sum(np.maximum(side, 0) for side in sides)
        return most >= self._longest(least)[self.phase_of_term]

    def _longest(self, terms: Floats) -> Floats:
        """The longest of every phase's terms, of shape (phases, boxes)."""
        phases = range(len(self.weights))
        return np.stack([terms[self.phase_of_term == phase].max(axis=0) for phase in phases])

    def _terms(self, rows: Ints, experts: Ints, on_gpu: Ints) -> Floats:
        """Every term's seconds, of shape (terms, probes, boxes)."""
        grid = replace(
            self.rows.take(np.broadcast_to(rows, experts.shape).ravel()),
            resident_total=experts.ravel(),
            gpu_kv_micro_batches=on_gpu.ravel(),
        )
        self.evaluations += len(grid)
        space = self.space
        phases = batch_terms(space.costs, grid.point(space), space.schedule, space.workload)
        values = [
            stacked(terms, (len(weights), len(grid))).swapaxes(0, 1).reshape(len(weights) * len(terms), len(grid))
            for weights, terms in phases
        ]
        return np.concatenate(values).reshape(len(self.phase_of_term), *experts.shape)

    def _bytes(self, rows: Ints, low: Ints, kv_low: Ints) -> tuple[Floats, Floats]:
        """Planes of the bytes at both levels, of shape (2, 4, boxes) or (4, 4, boxes).

        Slots hold the larger of a layer with experts and one without, so there are two of each;
        and two more of the host where not all of it can be pinned.
        The fourth number is what one more resident expert of every layer adds to the first beside
        its own bytes: slots then hold one expert less.
        """
        space, grid, weights = self.space, self.rows.take(rows), Weights(self.space)
        dense, numbers = grid.resident_dense, grid.numbers()
        pages = grid.num_micro_batches if SCHEDULES[space.schedule].paged else 1

        def needed(experts: Ints, on_gpu: Ints, of_every_layer: int) -> Floats:
            there = {**numbers, "gpu_kv_micro_batches": on_gpu}
            resident, on_host = weights.resident(dense, experts), weights.on_host(dense, experts)
            rows = np.zeros((2, 3, len(grid)))
            of_layers = weights.largest_streamed(dense, of_every_layer, grid.gpu_prefill_ffn)
            for row, largest in zip(rows, of_layers, strict=True):
                host = host_purposes(space, grid.kind, there, host_bytes=on_host, page_bytes=largest / pages)
                row[0] = gpu_needed(space, grid.kind, there, resident_bytes=resident, max_streamed_bytes=largest)
                row[1], row[2] = sum(host.values()), pinned_needed(space, grid.kind, there, host)
            return rows

        base = needed(low, kv_low, 0)
        more = (needed(low + 1, kv_low, 0), needed(low, kv_low + 1, 0), needed(low, kv_low, 1))
        planes = np.stack([base, *(other - base for other in more)], axis=2)
        gpu, cpu, pinned = planes[:, 0], planes[:, 1], planes[:, 2]
        if not space.profile.has_accelerator:  # both are one level
            return gpu + cpu, 0 * cpu
        host = space.profile.host
        if host.pinnable_bytes is None:
            return gpu, cpu
        # What must be pinned is a second need of the host, in units of what it holds.
        return gpu, np.concatenate([cpu, pinned * (host.usable_bytes / host.usable_pinned_bytes)])

    def _tightened(
        self, gpu: Floats, cpu: Floats, low: Ints, high: Ints, kv_low: Ints, kv_high: Ints
    ) -> tuple[Ints, Ints, NDArray[np.bool_]]:
        """Upper ends as far as the GPU's memory can allow, and which boxes may fit at all.

        Slots are taken as if experts of a part of the layers shrank them by that part.
        """
        layers = self.space.spec.num_expert_layers
        gpu, cpu = gpu[0], cpu[0]  # of slots for layers with experts; the program has the others
        room = self.space.profile.top.usable_bytes - (gpu[0] + gpu[3] * low / layers)
        an_expert = gpu[1] + gpu[3] / layers
        gained = np.maximum(-an_expert, 0) * (high - low)
        with np.errstate(divide="ignore", invalid="ignore"):
            experts = np.where(an_expert > 0, low + room / an_expert, high)
            on_gpu = np.where(gpu[2] > 0, kv_low + (room + gained) / gpu[2], kv_high)
        slack = 1e-9  # of rounding; the program decides
        high = np.minimum(high, np.floor(experts + slack)).astype(np.int64)
        kv_high = np.minimum(kv_high, np.floor(on_gpu + slack)).astype(np.int64)
        host = self.space.profile.host.usable_bytes
        needed = cpu[0] + cpu[1] * (high - low) + cpu[2] * (kv_high - kv_low)
        needed = needed + cpu[3] * high / layers
        fits = (high >= low) & (kv_high >= kv_low) & (room + gained >= 0)
        return high, kv_high, fits & (needed <= host * (1 + slack))


def _between(low: Ints, high: Ints, shares: Floats, steps: Floats) -> Ints:
    """Integers within every range, of shape (probes, boxes)."""
    values = low + np.rint(np.multiply.outer(shares, high - low)) + steps[:, None]
    return np.clip(values, low, high).astype(np.int64)
