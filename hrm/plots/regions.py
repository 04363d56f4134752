"""Which kind of policy is best where: regions over two swept numbers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from hrm.errors import HrmError
from hrm.plots import style
from hrm.plots.columns import axis_of, require_columns
from hrm.plots.labels import Labels, Spot
from hrm.units import format_number

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

NOTHING: Final = "no policy fits"


def plot_map(
    frame: "pd.DataFrame",
    path: Path | None = None,
    *,
    x: str,
    y: str,
    region: str,
    value: str | None = None,
    title: str = "",
) -> "Figure":
    """Draw which `region` each cell of a grid belongs to, outlined and named in place.

    One row a cell: `x` and `y` are numbers that together form a whole grid, `region` a word or
    several ("attention on the CPU"), missing where no policy fits, and `value` a number of which
    contour lines are drawn (MoE-Lightning, arXiv 2411.11217, Fig. 10). Axes are logarithmic where
    the points are evenly spaced in the logarithm. Regions too small for their name are in the
    legend. Returns the figure, also written to `path` if there is one (HrmError if it cannot be,
    or if the cells are no grid).
    """
    require_columns(frame, [x, y, region, value], "plot_map")
    style.check_path(path)
    over, up = axis_of(x, frame[x]), axis_of(y, frame[y])
    cells, xs, ys = _cells(frame, x, y)
    words = cells[region].astype(object).where(cells[region].notna(), NOTHING).astype(str)
    names = [name for name in dict.fromkeys(words) if name != NOTHING]
    names += [NOTHING] if NOTHING in set(words) else []
    index = {name: number for number, name in enumerate(names)}
    grid = np.array([index[word] for word in words]).reshape(len(ys), len(xs))
    x_edges, y_edges = _edges(xs / over.unit_size), _edges(ys / up.unit_size)
    with style.look():
        figure = style.new_figure(4.6, title)
        axes: Any = figure.subplots()
        axes.set(xlim=(x_edges[0], x_edges[-1]), ylim=(y_edges[0], y_edges[-1]))
        for which, values in (("x", xs), ("y", ys)):
            if _is_logarithmic(values):
                style.set_logarithmic(axes, which)
        for number, name in enumerate(names):
            _fill(axes, grid == number, x_edges, y_edges, number, name)
        _outline(axes, grid, x_edges, y_edges)
        contours = None
        if value is not None:
            heights = cells[value].to_numpy(dtype=float).reshape(len(ys), len(xs))
            look: dict[str, Any] = {"colors": style.BLACK, "linewidths": 0.7, "linestyles": "--"}
            contours = axes.contour(xs / over.unit_size, ys / up.unit_size, heights, levels=6, **look)
        axes.set_xlabel(over.label)
        axes.set_ylabel(up.label)
        _legend(figure, names, value)
        style.hold_still(figure)
        labels = Labels(axes)
        for number, name in enumerate(names):
            _name_region(labels, grid == number, x_edges, y_edges, name)
        if contours is not None:
            _name_contours(labels, contours)
        return style.finish(figure, path)


def _cells(frame: Any, x: str, y: str) -> tuple[Any, NDArray[np.float64], NDArray[np.float64]]:
    """The rows of a grid in its order, and the values along both of its sides; HrmError if it is none."""
    xs = np.unique(frame[x].to_numpy(dtype=float))
    ys = np.unique(frame[y].to_numpy(dtype=float))
    whole = len(frame) == len(xs) * len(ys) and not frame.duplicated([x, y]).any()
    if not whole or min(len(xs), len(ys)) < 2:
        raise HrmError(
            "plot_map",
            f"<{len(frame)} cells>",
            f"must be a grid of {len(xs)} x {len(ys)} cells, two or more each way",
            "give one row for every pair",
        )
    return frame.sort_values([y, x]), xs, ys


def _is_logarithmic(values: NDArray[np.float64]) -> bool:
    """Whether the values are more evenly spaced in the logarithm."""
    if len(values) < 3:
        return False
    steps, ratios = np.diff(values), np.diff(np.log(values))
    return bool(np.ptp(ratios) / ratios.mean() < np.ptp(steps) / steps.mean())


def _edges(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Borders between cells whose middles are `values`, none of which has a part below 0 if they are above."""
    logarithmic = _is_logarithmic(values)
    at = np.log(values) if logarithmic else values
    middles = (at[1:] + at[:-1]) / 2
    edges = np.concatenate([[2 * at[0] - middles[0]], middles, [2 * at[-1] - middles[-1]]])
    if logarithmic:
        return np.exp(edges)
    return np.maximum(edges, 0) if values[0] > 0 else edges


def _look(number: int, name: str) -> dict[str, Any]:
    if name == NOTHING:
        return {"facecolor": "white", "hatch": "xx", "edgecolor": style.LIGHT}
    from matplotlib.colors import to_hex, to_rgb

    colour = style.SERIES[number % len(style.SERIES)]
    red, green, blue = (0.45 + 0.55 * channel for channel in to_rgb(colour))
    hatch = style.HATCHES[number % len(style.HATCHES)]
    return {"facecolor": to_hex((red, green, blue)), "hatch": hatch, "edgecolor": "white"}


def _fill(
    axes: Any,
    member: NDArray[np.bool_],
    x_edges: NDArray[np.float64],
    y_edges: NDArray[np.float64],
    number: int,
    name: str,
) -> None:
    """One area a run of cells in a row, in a collection of its own."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    boxes: list[Rectangle] = []
    for row, of_row in enumerate(member):
        changes = np.flatnonzero(np.diff(np.concatenate([[False], of_row, [False]]).astype(int)))
        low, high = float(y_edges[row]), float(y_edges[row + 1])
        for left, right in x_edges[changes].reshape(-1, 2).tolist():
            boxes.append(Rectangle((left, low), right - left, high - low))
    axes.add_collection(PatchCollection(boxes, linewidth=0, gid=f"region {name}", **_look(number, name)))


def _outline(axes: Any, grid: NDArray[np.int64], x_edges: NDArray[np.float64], y_edges: NDArray[np.float64]) -> None:
    """Lines wherever neighbouring cells belong to different regions."""
    from matplotlib.collections import LineCollection

    lines: list[Any] = []
    for row, column in np.argwhere(grid[:, 1:] != grid[:, :-1]):
        at = x_edges[column + 1]
        lines.append([(at, y_edges[row]), (at, y_edges[row + 1])])
    for row, column in np.argwhere(grid[1:] != grid[:-1]):
        at = y_edges[row + 1]
        lines.append([(x_edges[column], at), (x_edges[column + 1], at)])
    axes.add_collection(LineCollection(lines, colors=style.BLACK, linewidths=1.2, gid="outline", capstyle="round"))


def _name_region(
    labels: Labels, member: NDArray[np.bool_], x_edges: NDArray[np.float64], y_edges: NDArray[np.float64], name: str
) -> None:
    """The name where the region is widest, on up to three lines, if it fits there."""
    axes = labels.axes
    left, right = (
        axes.transData.transform([(x, y_edges[0]) for x in edges])[:, 0] for edges in (x_edges[:-1], x_edges[1:])
    )
    low, high = (
        axes.transData.transform([(x_edges[0], y) for y in edges])[:, 1] for edges in (y_edges[:-1], y_edges[1:])
    )
    middles = np.argwhere(member)
    spots = [
        Spot((left[column] + right[column]) / 2, (low[row] + high[row]) / 2, ha="center", va="center")
        for row, column in middles
    ]

    def room(box: NDArray[np.float64]) -> bool:
        """Whether all cells under the text are the region's."""
        (x0, y0), (x1, y1) = box.min(axis=0), box.max(axis=0)
        columns = (right > x0) & (left < x1)
        rows = (high > y0) & (low < y1)
        inside = x0 >= left[0] and x1 <= right[-1] and y0 >= low[0] and y1 <= high[-1]
        return bool(inside and member[np.ix_(rows, columns)].all())

    for wording in _wrapped(name):
        text = labels.text(wording)
        fitting = [spot for spot in spots if room(labels.box(text, spot))]
        text.remove()
        if fitting:
            # In the middle of all the places where it fits.
            x, y = np.mean([(spot.x, spot.y) for spot in fitting], axis=0)
            fitting.sort(key=lambda spot: (spot.x - x) ** 2 + (spot.y - y) ** 2)
            labels.place([wording], fitting, colour=style.BLACK)
            return


def _wrapped(name: str) -> list[str]:
    """The name on one line, on two and on three."""
    words = name.split(" ")
    wordings = [name]
    for count in (2, 3):
        if len(words) >= count:
            lines = np.array_split(words, count)
            wordings.append("\n".join(" ".join(line) for line in lines))
    return wordings


def _name_contours(labels: Labels, contours: Any) -> None:
    """Values on their contour lines, where they cover no name."""
    for level, segments in zip(contours.levels, contours.allsegs, strict=True):
        points = max(segments, key=len, default=np.empty((0, 2)))
        if len(points) < 2:
            continue
        chosen = points[np.linspace(0, len(points) - 1, 9).astype(int)]
        pixels = labels.axes.transData.transform(chosen)
        spots = [Spot(float(x), float(y), ha="center", va="center") for x, y in pixels]
        labels.place([format_number(level)], spots, colour=style.BLACK, required=False)


def _legend(figure: Any, names: list[str], value: str | None) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(label=name, linewidth=0, **_look(number, name)) for number, name in enumerate(names)]
    if value is not None:
        label = axis_of(value, [1.0]).label
        handles.append(Line2D([], [], color=style.BLACK, linestyle="--", linewidth=0.7, label=label))
    style.put_legend(figure, handles)
