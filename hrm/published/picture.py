"""Predicted over measured throughput of published runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from hrm.plots import style
from hrm.published.compare import ComparedRun
from hrm.published.data import System

_COLOURS: Final = {
    System.MOE_LIGHTNING: style.BLUE,
    System.FLEXGEN: style.ORANGE,
    System.FLEXGEN_C: style.GREEN,
    System.DEEPSPEED: style.RED,
}
_MARKERS: Final = "osD^v<>P"
BAND: Final = 1.25  # factor above and below the diagonal that is shaded


def plot_published(comparisons: Sequence[ComparedRun], path: Path, *, title: str) -> None:
    """One point a run on logarithmic axes: a colour a system, a marker a workload and setup.

    On the diagonal the prediction is what was measured; within the band it is less than 25 % off.
    Raises HrmError if the picture cannot be written.
    """
    style.check_path(path)
    with style.look():
        figure = style.new_figure(5.4)
        _draw(figure.subplots(), comparisons, title)
        style.finish(figure, path)


def _draw(axes: Any, comparisons: Sequence[ComparedRun], title: str) -> None:
    measured = [comparison.run.tokens_per_s for comparison in comparisons]
    ends = [0.6 * min(measured), 1.7 * max(measured)]
    axes.plot(ends, ends, color=style.GREY, linewidth=1)
    axes.fill_between(
        ends,
        [x / BAND for x in ends],
        [x * BAND for x in ends],
        color=style.GREY,
        alpha=0.12,
        linewidth=0,
        label=f"within {BAND - 1:.0%}",
    )
    columns = list(dict.fromkeys(comparison.run.column for comparison in comparisons))
    for comparison in comparisons:
        run = comparison.run
        axes.scatter(
            run.tokens_per_s,
            comparison.predicted.tokens_per_s,
            s=48,
            zorder=3,
            color=_COLOURS[run.system],
            marker=_MARKERS[columns.index(run.column) % len(_MARKERS)],
            edgecolor="white",
            linewidth=0.6,
        )
    for system in dict.fromkeys(comparison.run.system for comparison in comparisons):
        axes.scatter([], [], s=48, color=_COLOURS[system], label=system.value)
    for index, column in enumerate(columns):
        marker = _MARKERS[index % len(_MARKERS)]
        axes.scatter([], [], s=36, color=style.GREY, marker=marker, label=column)
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, aspect="equal")
    axes.set_xlabel("measured tokens/s (published)")
    axes.set_ylabel("predicted tokens/s")
    axes.set_title(title, loc="left")
    axes.grid(visible=True, which="major", linewidth=0.4, alpha=0.5)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
