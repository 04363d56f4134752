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
_MARKER: Final = 8.0
_CROSSED: Final = 2.0
_OWN: Final = 0.5
_ALIKE: Final = 7.0  # one of its kind between a line and its label misleads
_CLUTTER: Final = 20.0
_SHORTER: Final = 2.5
_LATER: Final = 0.05


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a label may go: an anchor in pixels, and how the text lies around it."""

    x: float
    y: float
    rotation: float = 0.0
    ha: str = "left"
    va: str = "bottom"


def corners(text: Any) -> NDArray[np.float64]:
    """The four corners in pixels of a drawn text's box, turned as the text is."""
    renderer = text.get_figure(root=True).canvas.get_renderer()
    angle, anchor = text.get_rotation(), text.get_transform().transform(text.get_position())
    text.set_rotation(0.0)
    box = text.get_window_extent(renderer)
    text.set_rotation(angle)
    if text.get_rotation_mode() != "anchor":
        if angle:
            box = text.get_window_extent(renderer)
        return np.array([[box.x0, box.y0], [box.x1, box.y0], [box.x1, box.y1], [box.x0, box.y1]])
    flat = np.array([[box.x0, box.y0], [box.x1, box.y0], [box.x1, box.y1], [box.x0, box.y1]])
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return (flat - anchor) @ np.array([[cos, sin], [-sin, cos]]) + anchor


def overlap(one: NDArray[np.float64], other: NDArray[np.float64], *, gap: float = 0.0) -> bool:
    """Whether two convex quadrilaterals come closer than `gap` pixels (separating axes)."""
    for quad in (one, other):
        edges = np.roll(quad, -1, axis=0) - quad
        lengths = np.linalg.norm(edges, axis=1, keepdims=True)
        sides = lengths[:, 0] > 1e-9  # a line has but two
        normals = (np.stack([-edges[:, 1], edges[:, 0]], axis=1) / np.maximum(lengths, 1e-9))[sides]
        first, second = one @ normals.T, other @ normals.T
        apart = (first.max(axis=0) + gap <= second.min(axis=0)) | (
            second.max(axis=0) + gap <= first.min(axis=0)
        )
        if apart.any():
            return False
    return True


class Labels:
    """Places labels in a figure whose layout is final, each at the best of its spots.

    Best is, in this order: over no other label, inside the figure or the axes, off the markers,
    across few lines, early in the list of spots.
    """

    def __init__(self, axes: Any) -> None:
        self.axes = axes
        self.taken: list[NDArray[np.float64]] = []
        self.markers: list[NDArray[np.float64]] = []
        self.lines: list[tuple[NDArray[np.float64], str]] = []

    def avoid_line(self, xs: Sequence[float], ys: Sequence[float], *, of: str = "") -> None:
        """Cross that line, in data coordinates, only if need be; labels `of` the same rather so."""
        points = self.axes.transData.transform(np.column_stack([xs, ys]))
        for a, b in pairwise(points):
            self.lines.append((np.array([a, b, b, a]), of))

    def avoid_point(self, x: float, y: float, *, points: float = 4.0) -> None:
        """Keep off a marker of that size."""
        half = self.pixels(points) / 2
        px, py = self.axes.transData.transform((x, y))
        signs = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
        self.markers.append(np.array([px, py]) + half * signs)

    def pixels(self, points: float) -> float:
        """Points of 1/72 inch as pixels of the figure."""
        return points * self.axes.figure.dpi / 72

    def near(self, x: float, y: float, *, points: float = 4.0) -> list[Spot]:
        """Spots around a point in data coordinates, right of it first."""
        px, py = self.axes.transData.transform((x, y))
        step = self.pixels(points)
        around = [
            (1, -0.6, "left", "top"), (1, 0.6, "left", "bottom"),
            (-1, 0.6, "right", "bottom"), (-1, -0.6, "right", "top"),
            (0, -1.4, "center", "top"), (0, 1.4, "center", "bottom"),
        ]  # fmt: skip
        return [
            Spot(px + far * dx * step, py + far * dy * step, 0.0, ha, va)
            for far in (1.0, 2.5, 4.0)
            for dx, dy, ha, va in around
        ]

    def beside(self, x: float, y: float, *, points: float = 5.0) -> list[Spot]:
        """Spots right of a point in data coordinates, at its height and a little over or under."""
        px, py = self.axes.transData.transform((x, y))
        steps = sorted(range(-6, 7), key=abs)
        return [
            Spot(px + self.pixels(points), py + self.pixels(5 * step), ha="left", va="center")
            for step in steps
        ]

    def along(
        self, start: tuple[float, float], end: tuple[float, float], shares: Iterable[float],
        *, points: float = 4.0, ha: str = "left",
    ) -> list[Spot]:  # fmt: skip
        """Spots over and under a straight line in data coordinates, at shares of its length."""
        first, last = self.axes.transData.transform([start, end])
        angle = float(np.degrees(np.arctan2(last[1] - first[1], last[0] - first[0])))
        normal = np.array([-(last - first)[1], (last - first)[0]]) / np.linalg.norm(last - first)
        spots: list[Spot] = []
        for share in shares:
            for side, va in ((1, "bottom"), (-1, "top")):
                x, y = first + share * (last - first) + side * self.pixels(points) * normal
                spots.append(Spot(float(x), float(y), angle, ha, va))
        return spots

    def place(
        self, wordings: Sequence[str], spots: Sequence[Spot], *, colour: str,
        of: str = "", required: bool = True, inside: bool = True,
    ) -> Any:  # fmt: skip
        """Draw a label at its best spot, in the first wording, or a shorter one if that is better.

        Without `required`, it is not drawn at all where it would only add to the clutter. Returns
        the text, or None.
        """
        text = self.axes.text(
            0, 0, "", transform=None, color=style.ink(colour), fontsize=style.SMALL_POINTS,
            rotation_mode="anchor", path_effects=style.halo(), clip_on=False, zorder=10,
        )  # fmt: skip
        text.set_in_layout(False)
        best = (math.inf, wordings[0], spots[0])
        for shorter, wording in enumerate(wordings):
            text.set_text(wording)
            for index, spot in enumerate(spots):
                score = (
                    self._score(text, spot, of, inside=inside) + 0.05 * index + _SHORTER * shorter
                )
                if score < best[0]:
                    best = (score, wording, spot)
        score, wording, spot = best
        if score >= _CLUTTER and not required:
            text.remove()
            return None
        text.set_text(wording)
        _move(text, spot)
        self.taken.append(corners(text))
        return _fix_to(text, self.axes)

    def _score(self, text: Any, spot: Spot, of: str, *, inside: bool) -> float:
        _move(text, spot)
        box = corners(text)
        frame = (self.axes if inside else self.axes.figure).get_window_extent()
        low, high = box.min(axis=0), box.max(axis=0)
        score = 0.0
        if low[0] < frame.x0 or low[1] < frame.y0 or high[0] > frame.x1 or high[1] > frame.y1:
            score += _OUTSIDE
        score += _OVERLAP * sum(overlap(box, other, gap=1.5) for other in self.taken)
        score += _MARKER * sum(overlap(box, marker, gap=1.0) for marker in self.markers)
        for line, name in self.lines:
            if overlap(box, line):
                score += _OWN if name == of else _ALIKE if _alike(name, of) else _CROSSED
        return score


def _alike(one: str, other: str) -> bool:
    return bool(one) and one.partition(" ")[0] == other.partition(" ")[0]


def _move(text: Any, spot: Spot) -> None:
    text.set(x=spot.x, y=spot.y, rotation=spot.rotation, ha=spot.ha, va=spot.va)


def _fix_to(text: Any, axes: Any) -> Any:
    """Pixels depend on the resolution, so the text is tied to the axes instead."""
    x, y = axes.transAxes.inverted().transform(text.get_position())
    text.set(x=float(x), y=float(y), transform=axes.transAxes)
    return text
