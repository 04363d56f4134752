"""Labels beside what they name, placed so that no two overlap."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from hrm.plots import style

_OUTSIDE: Final = 50.0
_OVERLAP: Final = 100.0
_MARKER: Final = 12.0
_CROSSED: Final = 2.0
_OWN: Final = 0.5
_ALIKE: Final = 7.0  # one of its kind between a line and its label misleads
_CLUTTER: Final = 20.0
_SHORTER: Final = 2.5
_LATER: Final = 0.05


Quad = NDArray[np.float64]
Corner = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a label may go: an anchor in pixels, and how the text lies around it."""

    x: float
    y: float
    rotation: float = 0.0
    ha: str = "left"
    va: str = "bottom"


def quad(low: Corner, high: Corner, spot: Spot) -> Quad:
    """Four corners of a box given around the origin, turned and moved to where a spot is."""
    (x0, y0), (x1, y1) = low, high
    cos, sin = np.cos(np.radians(spot.rotation)), np.sin(np.radians(spot.rotation))
    flat = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
    return flat @ np.array([[cos, sin], [-sin, cos]]) + np.array([spot.x, spot.y])


def overlaps(one: Quad, others: Quad, *, gap: float = 0.0) -> NDArray[np.bool_]:
    """Which of many convex quadrilaterals come closer to one than `gap` pixels.

    `others` has the shape (count, 4, 2). Two that some line separates are apart, and if there is
    such a line, there is one along an edge. Quadrilaterals may be as thin as a line.
    """
    if not len(others):
        return np.zeros(0, dtype=bool)
    apart = np.zeros(len(others), dtype=bool)
    for normals in (_normals(one)[None], _normals(others)):
        mine = np.einsum("kij,lj->kli", np.broadcast_to(normals, (len(others), 4, 2)), one)
        theirs = np.einsum("kij,klj->kli", np.broadcast_to(normals, (len(others), 4, 2)), others)
        is_edge = np.abs(normals).sum(axis=-1) > 0
        before = mine.max(axis=1) + gap <= theirs.min(axis=1)
        after = theirs.max(axis=1) + gap <= mine.min(axis=1)
        apart |= ((before | after) & is_edge).any(axis=1)
    return ~apart


def _normals(quads: Quad) -> Quad:
    """Unit normals of the edges; 0 for an edge without length, as a line has two."""
    edges = np.roll(quads, -1, axis=-2) - quads
    lengths = np.linalg.norm(edges, axis=-1, keepdims=True)
    turned = np.stack([-edges[..., 1], edges[..., 0]], axis=-1)
    return np.where(lengths > 1e-9, turned / np.maximum(lengths, 1e-9), 0.0)


class Labels:
    """Places labels in a figure whose layout is final, each at the best of its spots.

    Best is, in this order: over no other label, inside the figure or the axes, off the markers,
    across few lines, early in the list of spots.
    """

    def __init__(self, axes: Any) -> None:
        self.axes = axes
        self.taken: list[Quad] = []
        self.markers: list[Quad] = []
        self.lines: list[Quad] = []
        self.line_names: list[str] = []
        self.sizes: dict[tuple[str, str, str], tuple[Corner, Corner]] = {}

    def avoid_line(self, xs: Sequence[float], ys: Sequence[float], *, of: str = "") -> None:
        """Cross that line, in data coordinates, only if need be; labels `of` the same rather so."""
        points = self.axes.transData.transform(np.column_stack([xs, ys]))
        for a, b in pairwise(points):
            self.lines.append(np.array([a, b, b, a]))
            self.line_names.append(of)

    def avoid_point(self, x: float, y: float) -> None:
        """Keep off a marker."""
        half = self.pixels(4) / 2
        px, py = self.axes.transData.transform((x, y))
        signs = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
        self.markers.append(np.array([px, py]) + half * signs)

    def pixels(self, points: float) -> float:
        """Points of 1/72 inch as pixels of the figure."""
        return points * self.axes.figure.dpi / 72

    def near(self, x: float, y: float) -> list[Spot]:
        """Spots around a point in data coordinates, right of it first."""
        px, py = self.axes.transData.transform((x, y))
        step = self.pixels(4)
        around = [
            (1, -0.6, "left", "top"),
            (1, 0.6, "left", "bottom"),
            (-1, 0.6, "right", "bottom"),
            (-1, -0.6, "right", "top"),
            (0, -1.4, "center", "top"),
            (0, 1.4, "center", "bottom"),
        ]
        return [
            Spot(px + far * dx * step, py + far * dy * step, 0.0, ha, va)
            for far in (1.0, 2.5, 4.0)
            for dx, dy, ha, va in around
        ]

    def beside(self, x: float, y: float) -> list[Spot]:
        """Spots right of a point in data coordinates, at its height and a little over or under."""
        px, py = self.axes.transData.transform((x, y))
        steps = sorted(range(-6, 7), key=abs)
        return [Spot(px + self.pixels(5), py + self.pixels(5 * step), ha="left", va="center") for step in steps]

    def along(
        self, start: tuple[float, float], end: tuple[float, float], shares: Iterable[float], *, ha: str = "left"
    ) -> list[Spot]:
        """Spots over and under a straight line in data coordinates, at shares of its length."""
        first, last = self.axes.transData.transform([start, end])
        angle = float(np.degrees(np.arctan2(last[1] - first[1], last[0] - first[0])))
        normal = np.array([-(last - first)[1], (last - first)[0]]) / np.linalg.norm(last - first)
        spots: list[Spot] = []
        for share in shares:
            for side, va in ((1, "bottom"), (-1, "top")):
                x, y = first + share * (last - first) + side * self.pixels(4) * normal
                spots.append(Spot(float(x), float(y), angle, ha, va))
        return spots

    def place(
        self,
        wordings: Sequence[str],
        spots: Sequence[Spot],
        *,
        colour: str,
        of: str = "",
        required: bool = True,
        inside: bool = True,
    ) -> Any:
        """Draw a label at its best spot, in the first wording, or a shorter one if that is better.

        Without `required`, it is not drawn at all where it would only add to the clutter. Returns
        the text, or None.
        """
        text = self.text(wordings[0], colour)
        lines, markers, taken = (np.array(quads).reshape(-1, 4, 2) for quads in (self.lines, self.markers, self.taken))
        weights = np.array([_weight(name, of) for name in self.line_names])
        frame = (self.axes if inside else self.axes.figure).get_window_extent()
        best, best_score, best_box = (wordings[0], spots[0]), math.inf, np.zeros((4, 2))
        for shorter, wording in enumerate(wordings):
            text.set_text(wording)
            for index, spot in enumerate(spots):
                box = self.box(text, spot)
                (x0, y0), (x1, y1) = box.min(axis=0), box.max(axis=0)
                score = _SHORTER * shorter + _LATER * index
                if x0 < frame.x0 or y0 < frame.y0 or x1 > frame.x1 or y1 > frame.y1:
                    score += _OUTSIDE
                score += _OVERLAP * np.count_nonzero(overlaps(box, taken, gap=1.5))
                score += _MARKER * np.count_nonzero(overlaps(box, markers, gap=1.0))
                if score < best_score and len(lines):
                    score += float(weights[overlaps(box, lines)].sum())
                if score < best_score:
                    best, best_score, best_box = (wording, spot), score, box
        if best_score >= _CLUTTER and not required:
            text.remove()
            return None
        wording, spot = best
        # Pixels depend on the resolution, so the text is tied to the axes instead.
        x, y = self.axes.transAxes.inverted().transform((spot.x, spot.y))
        text.set(
            text=wording,
            x=float(x),
            y=float(y),
            transform=self.axes.transAxes,
            rotation=spot.rotation,
            ha=spot.ha,
            va=spot.va,
        )
        self.taken.append(best_box)
        return text

    def text(self, wording: str, colour: str = style.BLACK) -> Any:
        """A text of the axes that takes no part in the layout, to be measured and placed."""
        text = self.axes.text(
            0,
            0,
            wording,
            transform=None,
            color=style.ink(colour),
            fontsize=style.SMALL_POINTS,
            rotation_mode="anchor",
            path_effects=style.halo(),
            clip_on=False,
            zorder=10,
        )
        text.set_in_layout(False)
        return text

    def box(self, text: Any, spot: Spot) -> Quad:
        """Where a text of `self.text` would be, as its four corners."""
        key = (text.get_text(), spot.ha, spot.va)
        if key not in self.sizes:
            text.set(ha=spot.ha, va=spot.va)
            box = text.get_window_extent(self.axes.figure.canvas.get_renderer())
            self.sizes[key] = ((box.x0, box.y0), (box.x1, box.y1))
        return quad(*self.sizes[key], spot)


def _weight(name: str, of: str) -> float:
    """How bad it is that a label `of` something crosses the line of that name."""
    if name == of:
        return _OWN
    alike = bool(name) and name.partition(" ")[0] == of.partition(" ")[0]
    return _ALIKE if alike else _CROSSED
