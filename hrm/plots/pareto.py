"""What can be had for what it costs: points, and the front that no other point is better than."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hrm.plots import style
from hrm.plots.columns import axis_of, require_columns
from hrm.plots.labels import Labels

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def on_front(costs: Any, gains: Any) -> Any:
    """Which points are not dominated, as an array of truths.

    A point is dominated by another that costs no more and gains no less, and differs in one of the
    two. Missing values are never on the front.
    """
    import numpy as np

    costs, gains = np.asarray(costs, dtype=float), np.asarray(gains, dtype=float)
    front = np.isfinite(costs) & np.isfinite(gains)
    best = -np.inf
    cheapest_of_best = -np.inf
    for index in np.lexsort((-gains, costs)):
        if not front[index]:
            continue
        as_good = gains[index] == best and costs[index] == cheapest_of_best
        front[index] = gains[index] > best or as_good
        if gains[index] > best:
            best, cheapest_of_best = gains[index], costs[index]
    return front


def plot_pareto(
    frame: "pd.DataFrame", path: Path | None = None, *, x: str, group: str | None = None, title: str = ""
) -> "Figure":
    """Draw points of a cost `x` and the throughput, and their front: what is best for each cost.

    Columns are `x`, what is paid (bytes of CPU memory, seconds of latency, GPUs), `tokens_per_s`, what
    is had for it, and `group`, if there is one, whose front is drawn on its own. Dominated points are
    grey and hollow; a step of the line says what can be had up to the next cost (MoE-Lightning, arXiv
    2411.11217, Fig. 1). Returns the figure, also written to `path` if there is one (HrmError if it cannot be).
    """
    y = "tokens_per_s"
    require_columns(frame, [x, y, group], "plot_pareto")
    style.check_path(path)
    table: Any = frame
    names: list[Any] = list(table[group].unique()) if group else [None]
    over = axis_of(x, frame[x])
    up = axis_of(y, frame[y])
    with style.look():
        figure = style.new_figure(3.8, title)
        axes: Any = figure.subplots()
        fronts: dict[Any, Any] = {}
        most = float(table[x].max())
        for index, name in enumerate(names):
            part = table if name is None else table[table[group] == name]
            chosen = on_front(part[x], part[y])
            fronts[name] = part[chosen].sort_values([x, y])
            _draw(axes, part[~chosen], fronts[name], index, x=(x, over.unit_size), y=(y, up.unit_size), most=most)
        axes.set_xlabel(over.label)
        axes.set_ylabel(up.label)
        axes.margins(x=0.05)
        axes.set_ylim(bottom=0)
        axes.grid(visible=True)
        high, low = axes.get_xlim()[1], axes.get_xlim()[0]
        axes.set_xlim(right=high + 0.14 * (high - low))
        _legend(figure)
        style.hold_still(figure)
        _label(axes, fronts, (x, over.unit_size), (y, up.unit_size), most)
        return style.finish(figure, path)


def _draw(
    axes: Any, others: Any, front: Any, index: int, *, x: tuple[str, float], y: tuple[str, float], most: float
) -> None:
    colour = style.SERIES[index % len(style.SERIES)]
    marker = style.MARKERS[index % len(style.MARKERS)]
    axes.plot(
        others[x[0]] / x[1],
        others[y[0]] / y[1],
        marker,
        linestyle="none",
        markersize=4,
        markerfacecolor="white",
        markeredgecolor=style.LIGHT,
        zorder=2,
        gid=f"dominated {index}",
    )
    if len(front):  # what is had for less is still had for more
        xs = [*front[x[0]] / x[1], most / x[1]]
        ys = [*front[y[0]] / y[1], front[y[0]].iloc[-1] / y[1]]
        axes.step(
            xs,
            ys,
            where="post",
            color=colour,
            zorder=3,
            gid=f"front {index}",
            linestyle=style.LINES[index % len(style.LINES)],
        )
    axes.plot(
        front[x[0]] / x[1], front[y[0]] / y[1], marker, linestyle="none", color=colour, zorder=4, gid=f"chosen {index}"
    )


def _label(axes: Any, fronts: dict[Any, Any], x: tuple[str, float], y: tuple[str, float], most: float) -> None:
    labels = Labels(axes)
    for line in axes.get_lines():
        name = str(line.get_gid())
        if name.startswith("front"):
            labels.avoid_line(line.get_xdata(), line.get_ydata())
        else:
            for px, py in zip(line.get_xdata(), line.get_ydata(), strict=True):
                labels.avoid_point(px, py)
    ends: list[tuple[float, float, str, str]] = []
    for index, (name, front) in enumerate(fronts.items()):
        if name is not None and len(front):
            end, colour = front.iloc[-1], style.SERIES[index % len(style.SERIES)]
            ends.append((most / x[1], float(end[y[0]]) / y[1], str(name), colour))
    for px, py, name, colour in sorted(ends, key=lambda end: -end[1]):
        labels.place([name], labels.beside(px, py), colour=colour, inside=False)


def _legend(figure: Any) -> None:
    from matplotlib.lines import Line2D

    plain: dict[str, Any] = {"linestyle": "none", "marker": "o"}
    handles = [
        Line2D([], [], label="on the front", color=style.BLACK, **plain),
        Line2D(
            [],
            [],
            label="as much or more can be had for less",
            markerfacecolor="white",
            markeredgecolor=style.LIGHT,
            **plain,
        ),
    ]
    style.put_legend(figure, handles)
