"""What each lane did or is predicted to do over time (MoE-Lightning, arXiv 2411.11217, Fig. 6)."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from hrm.acts import decode, prefill
from hrm.errors import TraceError
from hrm.plots import style
from hrm.plots.labels import Labels, Spot
from hrm.tasks import Act, Lane, Phase
from hrm.trace import Span, Trace
from hrm.units import format_seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_LAYER_LINES: Final = 80
MAX_LETTERED: Final = 400
THIN: Final = 300  # a bar this part of the time axis is 1.5 points wide


@dataclass(frozen=True, slots=True)
class TaskLook:
    """How a kind of task is drawn: in words, as a colour, and as a hatch in `line`'s colour."""

    words: str
    colour: str
    hatch: str = ""
    line: str = "white"


# Within a lane, kinds differ in how light they are or in their hatch, and so survive greyscale.
LOOKS: Final = {
    "LOAD_PAGE": TaskLook("weight page in", style.SKY),
    "STAGE_PAGE": TaskLook("weight page to pinned memory", style.SKY, "////"),
    "LOAD_PART": TaskLook("part of experts in", style.SKY, "xxxx"),
    "LOAD_HIDDEN": TaskLook("hidden states in", style.BLACK, line=style.BLACK),
    "LOAD_KV": TaskLook("KV cache in", style.YELLOW, "....", style.GREY),
    "LOAD_EXPERT_OUTPUT": TaskLook("experts' output in", style.RED, "||||"),
    "EMBED": TaskLook("embeddings in", style.GREY),
    "PRE_ATTENTION": TaskLook("projections", style.GREEN, "////"),
    "ATTENTION": TaskLook("attention", style.ORANGE),
    "OUTPUT_PROJECTION": TaskLook("output projection of a rank", style.GREEN, "oooo"),
    "PREFILL_ATTENTION": TaskLook("prefill of a rank up to the output projection", style.GREEN, "++++"),
    "POST_ATTENTION": TaskLook("rest of the layer, with experts", style.BLUE),
    "PART_EXPERTS": TaskLook("part of experts", style.BLUE, "xxxx"),
    "PREFILL_LAYER": TaskLook("prefill of a layer", style.BLUE),
    "CPU_EXPERTS": TaskLook("experts on the CPU", style.RED, "xxxx"),
    "REDUCE_HIDDEN": TaskLook("summed up over ranks, before a layer", style.PURPLE, "||||"),
    "REDUCE_ATTENTION": TaskLook("summed up over ranks, after attention", style.PURPLE, "\\\\"),
    "REDUCE_LAST": TaskLook("summed up over ranks, after the last layer", style.PURPLE, "----"),
    "SAMPLE": TaskLook("LM head, next token", style.PURPLE, "...."),
    "OFFLOAD_QKV": TaskLook("queries, keys, values out", style.BLACK, line=style.BLACK),
    "OFFLOAD_TOKENS": TaskLook("tokens out", style.RED, "||||"),
    "STORE_KV": TaskLook("new keys, values out", style.YELLOW, "....", style.GREY),
    "STORE_HIDDEN": TaskLook("hidden states out", style.GREY),
}
# What ends a layer in either phase: with experts on the CPU their output comes last, in parts the last of them.
_ENDS: Final = {
    decode.POST_ATTENTION,
    decode.PART_EXPERTS,
    decode.LOAD_EXPERT_OUTPUT,
    prefill.PREFILL_LAYER,
    prefill.PART_EXPERTS,
    prefill.CPU_EXPERTS,
}


def look_of(name: str) -> TaskLook:
    """How tasks of that name are drawn; grey and under their own name if nobody chose a look for them."""
    return LOOKS.get(name) or TaskLook(name.lower().replace("_", " "), style.GREY, "////")


def layer_ends(trace: Trace) -> dict[tuple[int, int], float]:
    """When every (step, layer) had been computed, in seconds of the trace's clock."""
    ends: dict[tuple[int, int], float] = defaultdict(float)
    for span in trace.spans:
        if span.id.act in _ENDS:
            where = (span.id.step, span.id.layer)
            ends[where] = max(ends[where], span.end_s)
    return dict(ends)


def step_ends(trace: Trace) -> dict[int, float]:
    """When every step's last token had been chosen."""
    ends: dict[int, float] = defaultdict(float)
    for span in trace.spans:
        if span.id.act.ends_step:
            ends[span.id.step] = max(ends[span.id.step], span.end_s)
    return dict(ends)


def window(trace: Trace, *, first: int = 0, last: int | None = None, step: int = 0) -> Trace:
    """What all lanes did from the end of layer `first` - 1 of a step to the end of layer `last`.

    Spans are cut at both ends. Without `last`, everything after the beginning is kept. Raises
    TraceError if the trace has no such layers.
    """
    ends = layer_ends(trace)
    layers = [layer for at, layer in ends if at == step]
    if first not in layers:
        rule = f"must be one of the {len(layers)} layers, which are counted from 0"
        raise TraceError("--from-layer", first, rule, "choose an earlier one")
    if last is not None and not first <= last < len(layers):
        rule = f"must be at least 1 and at most {len(layers) - first}, as many as there are from layer {first} on"
        raise TraceError("--layers", last - first + 1, rule, "choose another number")
    begin_s = ends[step, first - 1] if first else min(span.start_s for span in trace.spans)
    end_s = ends[step, last] if last is not None else max(span.end_s for span in trace.spans)
    return Trace(
        tuple(
            span._replace(start_s=max(span.start_s, begin_s), end_s=min(span.end_s, end_s))
            for span in trace.spans
            if span.end_s > begin_s and span.start_s < end_s
        )
    )


def plot_timeline(traces: Mapping[str, Trace], path: Path | None = None, *, title: str = "") -> "Figure":
    """Draw one chart a trace, named as in `traces`, one under the other on one time axis from 0.

    Every chart has the same lanes; at the right is the share of the time shown that each is busy.
    Dashed lines are ends of layers and solid ones of steps. Bars that are wide enough carry the
    task's letter, layer and micro-batch. Returns the figure, also written to `path` if there is
    one (HrmError if it cannot be). Raises TraceError if a trace is empty.
    """
    style.check_path(path)
    for name, trace in traces.items():
        if not trace.spans:
            raise TraceError(name, "<empty>", "must hold tasks to be drawn", "choose more layers")
    lanes = [lane for lane in Lane if any(s.lane is lane for t in traces.values() for s in t.spans)]
    longest_s = max(trace.makespan_s for trace in traces.values())
    unit, factor = ("s", 1.0) if longest_s >= 2 else ("ms", 1e3)
    with style.look():
        figure = style.new_figure(0.95 + len(traces) * (0.55 + 0.3 * len(lanes)), title)
        all_axes: Any = figure.subplots(len(traces), 1, squeeze=False, sharex=True)[:, 0]
        for axes, (name, trace) in zip(all_axes, traces.items(), strict=True):
            _draw(axes, trace, lanes, factor, thin_s=longest_s / THIN)
            axes.set_title(f"{name}: {format_seconds(trace.makespan_s)}", pad=13)
        all_axes[-1].set_xlim(0, longest_s * factor)
        all_axes[-1].set_xlabel(unit)
        _legend(figure, {span.id.act.name: span.id.act.letter for trace in traces.values() for span in trace.spans})
        style.hold_still(figure)
        for axes, trace in zip(all_axes, traces.values(), strict=True):
            labels = Labels(axes)
            _label_boundaries(labels, trace, factor)
            _label_bars(labels, trace, lanes, factor)
        return style.finish(figure, path)


def _draw(axes: Any, trace: Trace, lanes: list[Lane], factor: float, *, thin_s: float) -> None:
    start_s = min(span.start_s for span in trace.spans)
    shares = trace.utilisation()
    for row, lane in enumerate(lanes):
        by_act: dict[Act, list[Span]] = defaultdict(list)
        for span in trace.spans:
            if span.lane is lane:
                by_act[span.id.act].append(span)
        for act, spans in by_act.items():
            look = look_of(act.name)
            # An edge would draw a short task longer than it is, and a lane of many as always busy;
            # a hatch would not be seen.
            thin = median(span.seconds for span in spans) < thin_s
            axes.broken_barh(
                [((s.start_s - start_s) * factor, s.seconds * factor) for s in spans],
                (row - 0.38, 0.76),
                facecolor=look.colour,
                linewidth=0.0 if thin else 0.3,
                edgecolor=look.line,
                hatch="" if thin else look.hatch,
                snap=False,
                gid=f"{lane} {act.name}",
            )
        axes.text(
            1.01,
            row,
            f"{shares.get(lane, 0.0):.0%}",
            transform=axes.get_yaxis_transform(),
            va="center",
            gid=f"busy {lane}",
        )
    axes.text(1.01, 1.0, "busy", transform=axes.transAxes, va="bottom", color=style.GREY)
    axes.set_yticks(range(len(lanes)), [lane.value for lane in lanes])
    axes.set_ylim(len(lanes) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    layers = layer_ends(trace)
    for end_s in layers.values() if len(layers) <= MAX_LAYER_LINES else ():
        axes.axvline(
            (end_s - start_s) * factor,
            color=style.GREY,
            linewidth=0.5,
            linestyle=(0, (4, 3)),
            zorder=0.5,
            gid="layer end",
        )
    for end_s in step_ends(trace).values():
        axes.axvline((end_s - start_s) * factor, color=style.BLACK, linewidth=0.9, zorder=3, gid="step end")


def _label_boundaries(labels: Labels, trace: Trace, factor: float) -> None:
    """Steps where they end, and layers between their ends, as far as there is room."""
    start_s = min(span.start_s for span in trace.spans)
    axes, y = labels.axes, labels.axes.bbox.y1 + labels.pixels(2)

    def pixel(seconds: float) -> float:
        return float(axes.transData.transform(((seconds - start_s) * factor, 0))[0])

    steps = step_ends(trace)
    for step, end_s in steps.items():
        spots = [Spot(pixel(end_s), y, ha="right"), Spot(pixel(end_s), y, ha="left")]
        prefill = trace.spans[0].phase is Phase.PREFILL
        words = ["prefill ends"] if prefill else [f"step {step} ends", f"end {step}"]
        labels.place(words, spots, colour=style.BLACK, required=False, inside=False)
    before_s = start_s
    layers = sorted(layer_ends(trace).items(), key=lambda item: item[1])
    if len(layers) > MAX_LAYER_LINES:
        return
    mean_room = (pixel(layers[-1][1]) - pixel(start_s)) / len(layers) if layers else 1.0
    every = next(n for n in (1, 2, 5, 10, 20, 100) if n == 100 or n * mean_room > labels.pixels(15))
    for (_, layer), end_s in layers:
        room, middle = pixel(end_s) - pixel(before_s), (pixel(end_s) + pixel(before_s)) / 2
        wide = [f"layer {layer}"] if room > labels.pixels(34) else []
        if layer % every == 0:
            labels.place(
                [*wide, str(layer)], [Spot(middle, y, ha="center")], colour=style.GREY, required=False, inside=False
            )
        before_s = end_s


def _label_bars(labels: Labels, trace: Trace, lanes: list[Lane], factor: float) -> None:
    """Names of tasks inside their bars, where there is room."""
    from matplotlib.colors import to_hex

    start_s = min(span.start_s for span in trace.spans)
    axes = labels.axes
    points_wide = {span: _points(labels, span.seconds * factor) for span in trace.spans}
    roomy = [span for span, points in points_wide.items() if points > 10][:MAX_LETTERED]
    named: dict[Act, list[bool]] = defaultdict(list)
    for span in roomy:
        fits = points_wide[span] > 5.5 * len(str(span.id._replace(step=0))) + 4
        named[span.id.act].append(fits)
    for span in roomy:
        fits = named[span.id.act]
        letter = span.id.act.letter
        if sum(fits) > len(fits) / 2:  # of one kind, all or none are named in full
            letter = str(span.id._replace(step=0))
            if points_wide[span] <= 5.5 * len(letter) + 4:
                continue
        look = look_of(span.id.act.name)
        dark = style.luminance(to_hex(look.colour)) < 0.3
        middle = ((span.start_s + span.end_s) / 2 - start_s) * factor
        behind = {"facecolor": look.colour, "edgecolor": "none", "pad": 0.6} if look.hatch else None
        axes.text(
            middle,
            lanes.index(span.lane),
            letter,
            ha="center",
            va="center",
            bbox=behind,
            color="white" if dark else "black",
            gid="task",
            in_layout=False,
        )


def _points(labels: Labels, width: float) -> float:
    """How many points wide something is on the time axis."""
    (left, _), (right, _) = labels.axes.transData.transform([(0, 0), (width, 0)])
    return float(right - left) / labels.pixels(1)


def _legend(figure: Any, letters: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(
            facecolor=look.colour,
            edgecolor=look.line,
            hatch=look.hatch,
            linewidth=0.3,
            label=f"{letters[name]}  {look.words}",
        )
        for name in sorted(letters, key=[*LOOKS, *sorted(letters)].index)
        for look in [look_of(name)]
    ]
    style.put_legend(figure, handles)
