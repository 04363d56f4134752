"""Throughput of the best policy against what is swept."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hrm.causes import Cause
from hrm.plots import style
from hrm.plots.columns import axis_of, require_columns
from hrm.plots.labels import Labels

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_LIMITED_BY: Final = dict(zip(map(str, Cause), "o8.sph^vd<>DPH+*X", strict=True))
_Y, _BOUND = "tokens_per_s", "bound_tokens_per_s"
_LOGARITHMIC_FROM: Final = 20.0  # of the greatest to the least value of an axis


def plot_sweep(
    frame: "pd.DataFrame", path: Path | None = None, *, x: str, title: str = "", here: float | None = None
) -> "Figure":
    """Draw the throughput over `x`, one line a schedule, and the batch size under it.

    The table is `hrm.analysis.sweep`'s: `x` is the swept column, `bottleneck` decides the markers,
    the bound is drawn dotted, and rows without throughput do not fit (crosses on the axis); of these
    columns and `batch_size`, those that are missing are not drawn. `here` marks a value of `x`.
    Returns the figure, also written to `path` if there is one (HrmError if it cannot be).
    """
    require_columns(frame, [x, _Y, "schedule"], "plot_sweep")
    style.check_path(path)
    with_sizes = "batch_size" in frame.columns
    table: Any = frame.sort_values(x)
    parts = {name: table[table["schedule"] == name] for name in frame["schedule"].unique()}
    over = axis_of(x, frame[x])
    with style.look():
        figure = style.new_figure(4.6 if with_sizes else 3.6, title)
        ratios = [2.6, 1] if with_sizes else [1]
        rows = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        axes = rows[0]
        for index, part in enumerate(parts.values()):
            _draw(axes, part, index, x=x, unit_size=over.unit_size)
            if with_sizes:
                _draw_sizes(rows[1], part, index, x=x, unit_size=over.unit_size)
        if here is not None:
            dashed: dict[str, Any] = {"linewidth": 0.8, "linestyle": (0, (4, 2)), "zorder": 0.5}
            for each in rows:
                each.axvline(here / over.unit_size, color=style.GREY, gid="here", **dashed)
        if frame[x].max() / frame[x].min() >= _LOGARITHMIC_FROM:
            style.set_logarithmic(axes, "x")
        axes.set_ylim(bottom=0)
        axes.set_ylabel(axis_of(_Y, frame[_Y]).label)
        axes.grid(visible=True, axis="y")
        if with_sizes:
            style.set_logarithmic(rows[1], "y")
            rows[1].set_ylabel("batch size N")
            rows[1].grid(visible=True, axis="y")
        rows[-1].set_xlabel(over.label)
        # Room for the names of the lines, at their right ends.
        axes.margins(x=0.04)
        if len(parts) > 1:
            axes.set_xlim(right=_stretched(axes, 0.18))
        _legend(figure, frame)
        style.hold_still(figure)
        _label(axes, parts, x=x, unit_size=over.unit_size, here=here)
        return style.finish(figure, path)


def _draw(axes: Any, part: Any, index: int, *, x: str, unit_size: float) -> None:
    colour = style.SERIES[index % len(style.SERIES)]
    line = style.LINES[index % len(style.LINES)]
    fits = part[part[_Y].notna()]
    xs, ys = fits[x].to_numpy(dtype=float) / unit_size, fits[_Y].to_numpy(dtype=float)
    axes.plot(xs, ys, linestyle=line, color=colour, zorder=3, gid=f"line {index}")
    if _BOUND in part.columns:
        bound = fits[_BOUND].to_numpy(dtype=float)
        axes.plot(xs, bound, ":", color=colour, linewidth=0.9, zorder=2, gid=f"bound {index}")
    shapes = fits["bottleneck"] if "bottleneck" in part.columns else [Cause.GPU_COMPUTE] * len(fits)
    for px, py, shape in zip(xs, ys, shapes, strict=True):
        axes.plot(
            [px],
            [py],
            _LIMITED_BY.get(str(shape), "o"),
            color=colour,
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.4,
            zorder=4,
            gid=f"point {index}",
        )
    misfits = part[part[_Y].isna()]
    if len(misfits):
        at = misfits[x].to_numpy(dtype=float) / unit_size
        axes.plot(
            at,
            [0.0] * len(at),
            "x",
            color=style.ink(colour),
            clip_on=False,
            zorder=4,
            markersize=5,
            gid=f"misfit {index}",
        )


def _draw_sizes(axes: Any, part: Any, index: int, *, x: str, unit_size: float) -> None:
    known = part[part["batch_size"].notna()]
    axes.plot(
        known[x].to_numpy(dtype=float) / unit_size,
        known["batch_size"].to_numpy(dtype=float),
        linestyle=style.LINES[index % len(style.LINES)],
        color=style.SERIES[index % len(style.SERIES)],
        gid=f"sizes {index}",
    )


def _stretched(axes: Any, share: float) -> float:
    low, high = axes.get_xlim()
    if axes.get_xscale() == "log":
        return high * (high / low) ** share
    return high + share * (high - low)


def _label(axes: Any, parts: dict[Any, Any], *, x: str, unit_size: float, here: float | None) -> None:
    labels = Labels(axes)
    for line in axes.get_lines():
        if str(line.get_gid()).startswith(("line", "bound")):
            labels.avoid_line(line.get_xdata(), line.get_ydata())
    ends: list[tuple[float, float, str, str]] = []
    for index, (name, part) in enumerate(parts.items()):
        fits = part[part[_Y].notna()]
        if len(parts) > 1 and len(fits):
            end = fits.iloc[-1]
            colour = style.SERIES[index % len(style.SERIES)]
            ends.append((float(end[x]) / unit_size, float(end[_Y]), str(name), colour))
    for px, py, name, colour in sorted(ends, key=lambda end: -end[1]):
        labels.place([name], labels.beside(px, py), colour=colour, inside=False)
    if here is not None:
        top = axes.get_ylim()[1]
        spots = labels.near(here / unit_size, top * 0.02) + labels.near(here / unit_size, top * 0.5)
        labels.place(["as it is"], spots, colour=style.GREY)


def _legend(figure: Any, frame: Any) -> None:
    from matplotlib.lines import Line2D

    def entry(label: str, marker: str = "none", line: Any = "none") -> Line2D:
        return Line2D([], [], marker=marker, linestyle=line, color=style.BLACK, label=label, markersize=4.5)

    handles: list[Line2D] = []
    if "bottleneck" in frame.columns:
        seen = frame["bottleneck"].dropna().unique()
        first = "mostly limited by: "
        for name, marker in _LIMITED_BY.items():
            if name in seen:
                handles.append(entry(first + name, marker))
                first = ""
    if _BOUND in frame.columns and frame[_BOUND].notna().any():
        handles.append(entry("bound, without bubbles", line=":"))
    if frame[_Y].isna().any():
        handles.append(entry("no policy fits", "x"))
    style.put_legend(figure, handles)
