"""Which resource is worth more of: the change of throughput for each, as bars."""

from math import isclose, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hrm.plots import style
from hrm.plots.columns import require_columns
from hrm.plots.labels import Labels, Spot

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def plot_what_if(frame: "pd.DataFrame", path: Path | None = None, *, title: str = "") -> "Figure":
    """Draw how much more throughput some more of every resource brings, the greatest on top.

    Columns: `resource` its name, `factor` how much of it there is then (1.1 is 10 % more), `change`
    the share by which tokens/s grow with the policy that is then best (0.05 is 5 %); where most
    factors are the same and others its inverse, their rows say `less` (or `more`); optionally
    `same_policy_change`, the share without changing the policy, drawn hatched under it. A missing
    change is drawn as a gap that says so. Returns the figure, also written to `path` if there is
    one (HrmError if it cannot be).
    """
    require_columns(frame, ["resource", "factor", "change"], "plot_what_if")
    style.check_path(path)
    both = "same_policy_change" in frame.columns
    ordered = frame.sort_values("change", ascending=False, na_position="last")
    first = float(frame["factor"].mode().iloc[0])
    one_factor = all(isclose(max(f, 1 / f), max(first, 1 / first)) for f in ordered["factor"])
    with style.look():
        figure = style.new_figure(1.1 + (0.42 if both else 0.3) * len(ordered), title)
        axes: Any = figure.subplots()
        values = _draw(axes, ordered, both=both)
        named = (
            _name(row, first) if one_factor else f"{row['resource']} × {row['factor']:g}"
            for _, row in ordered.iterrows()
        )
        axes.set_yticks(range(len(ordered)), list(named))
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.axvline(0, color=style.BLACK, linewidth=0.6)
        more = f" for {first - 1:+.0%} of one resource" if one_factor else ""
        axes.set_xlabel(f"change of tokens generated a second{more} (%)")
        axes.margins(x=0.14)
        if both:
            style.put_legend(figure, list(axes.containers))
        style.hold_still(figure)
        _label(axes, values)
        return style.finish(figure, path)


def _draw(axes: Any, ordered: Any, *, both: bool) -> list[tuple[float, float]]:
    """Draw the bars; returns where each is and what it says."""
    thick, shift = (0.36, 0.19) if both else (0.6, 0.0)
    series = [("change", -shift, style.BLUE, "", "best policy for each machine")]
    if both:
        series.append(("same_policy_change", shift, style.ORANGE, "////", "policy as it is"))
    values: list[tuple[float, float]] = []
    for name, offset, colour, hatch, words in series:
        shares = ordered[name].to_numpy(dtype=float) * 100
        axes.barh(
            [row + offset for row in range(len(ordered))],
            [0 if isnan(v) else v for v in shares],
            height=thick,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=words,
            gid=name,
        )
        values += [(row + offset, value) for row, value in enumerate(shares)]
    return values


def _label(axes: Any, values: list[tuple[float, float]]) -> None:
    """Write what each bar says beside its end."""
    labels = Labels(axes)
    for row, value in values:
        missing = isnan(value)
        x, y = axes.transData.transform((0 if missing else value, row))
        left = not missing and value < -0.005
        step = labels.pixels(3) * (-1 if left else 1)
        spot = Spot(float(x + step), float(y), ha="right" if left else "left", va="center")
        words = "no policy fits" if missing else f"{value:+.1f}"
        labels.place([words], [spot], colour=style.BLACK, inside=False)


def _name(row: Any, factor: float) -> str:
    """The resource, and whether there is less of it while there is more of the others."""
    if (row["factor"] > 1) == (factor > 1):
        return str(row["resource"])
    return f"{'less' if row['factor'] < 1 else 'more'} {row['resource']}"
