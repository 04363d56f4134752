"""What each lane did, or was predicted to do, over time."""

from pathlib import Path
from typing import Any, Final

from hrm.plots import style
from hrm.tasks import Lane, TaskKind
from hrm.trace import Trace

_COLOURS: Final = {
    TaskKind.LOAD_PAGE: style.SKY, TaskKind.STAGE_PAGE: style.SKY,
    TaskKind.PRE_ATTENTION: style.GREEN, TaskKind.POST_ATTENTION: style.BLUE,
    TaskKind.PREFILL_LAYER: style.BLUE, TaskKind.SAMPLE: style.PURPLE,
    TaskKind.ATTENTION: style.ORANGE, TaskKind.CPU_EXPERTS: style.RED,
}  # fmt: skip


def plot_timeline(traces: dict[str, Trace], path: Path, *, title: str) -> None:
    """One row a lane, one group of rows a trace, on a common time axis from 0."""
    lanes = [lane for lane in Lane if any(s.lane is lane for t in traces.values() for s in t.spans)]
    rows = [(name, lane) for name in traces for lane in lanes]
    figure, axes = style.new_figure(11, 1.2 + 0.5 * len(rows))
    kinds: set[TaskKind] = set()
    for row, (name, lane) in enumerate(rows):
        spans = [span for span in traces[name].spans if span.lane is lane]
        start_s = min((span.start_s for span in traces[name].spans), default=0.0)
        kinds |= {span.id.kind for span in spans}
        axes.broken_barh(
            [((span.start_s - start_s) * 1e3, span.seconds * 1e3) for span in spans],
            (row - 0.4, 0.8),
            facecolors=[_COLOURS.get(span.id.kind, style.GREY) for span in spans],
            edgecolor="white", linewidth=0.2,
        )  # fmt: skip
    labels = [f"{lane.value}  {name}" if len(traces) > 1 else lane.value for name, lane in rows]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_title(title, loc="left")
    _legend(axes, kinds)
    style.save_figure(figure, path)


def _legend(axes: Any, kinds: set[TaskKind]) -> None:
    from matplotlib.patches import Patch

    named = {kind: colour for kind, colour in _COLOURS.items() if kind in kinds}
    patches = [
        Patch(color=colour, label=kind.name.lower().replace("_", " "))
        for kind, colour in named.items()
    ]
    if kinds - set(named):
        patches.append(Patch(color=style.GREY, label="small transfers"))
    axes.legend(handles=patches, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8,
                frameon=False)  # fmt: skip
