"""The hierarchical roofline of a machine, drawn (MoE-Lightning, arXiv 2411.11217, Figs 4 and 5)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hrm.formats import FORMATS
from hrm.hardware import HardwareProfile, Source
from hrm.model_spec import ModelSpec
from hrm.plots import style
from hrm.plots.labels import Labels, Spot
from hrm.plots.panels import KV, Panel, panels_of
from hrm.plots.roofs import SAME, Evidence, Role
from hrm.units import format_bandwidth, format_flops

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH_SIZES: Final = (32, 128, 512, 2048, 8192)

_COLOURS: Final = {
    Role.GPU: style.BLUE,
    Role.CPU: style.ORANGE,
    Role.LINK: style.GREEN,
    Role.DISK: style.PURPLE,
    Role.CACHE: style.LIGHT,
}
_LINES: Final = {Evidence.ACHIEVED: "-", Evidence.CEILING: "--", Evidence.DATASHEET: ":"}
_WORDS: Final = {Evidence.ACHIEVED: "achieved", Evidence.CEILING: "ceiling", Evidence.DATASHEET: "data sheet"}
_MACHINES: Final = {
    "catalog": "catalog figures, not measured",
    "emulated": "emulated accelerator, measured",
    "cuda": "measured",
    "cpu": "measured",
}
_ROW_POINTS: Final = 11


def plot_roofline(
    profile: HardwareProfile,
    path: Path | None = None,
    *,
    spec: ModelSpec | None = None,
    dtypes: Sequence[str] = ("bfloat16",),
    contexts: Sequence[int] = (512,),
    batch_sizes: Sequence[int] = BATCH_SIZES,
    micro_batch_size: int = 128,
) -> "Figure":
    """Draw the roofs of every level, link, cache and disk; with a model, its operators under them.

    Plans are made with the thick roofs; solid, dashed and dotted say how a rate is known. With a
    model there are two charts, decode attention over its KV cache and the MoE FFN over its weights,
    and vertical lines at their FLOPs a byte of what lies on the host: what the GPU attains with it
    over the link (filled) and the host in place (hollow). P1 and P2 lie where the link's roof
    reaches what the host and the GPU's memory allow: left of P1 the host is faster, left of P2 the
    link is the limit. Of several batch sizes, they are the largest one's.

    Returns the figure, also written to `path` if there is one (HrmError if it cannot be).
    Raises ProfileError if the machine has no rate for one of the dtypes.
    """
    style.check_path(path)
    panels = panels_of(
        profile, spec, tuple(dict.fromkeys(dtypes)), tuple(contexts), tuple(batch_sizes), micro_batch_size
    )
    with style.look():
        title = f"{profile.name} ({_MACHINES[profile.accelerator]})"
        figure = style.new_figure(1.0 + 3.7 * len(panels), title)
        all_axes: Any = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, panel in zip(all_axes, panels, strict=True):
            _draw(axes, panel)
        all_axes[-1].set_xlabel("operational intensity: FLOPs a byte of what lies on the host")
        _legend(figure, panels)
        style.hold_still(figure)
        for axes, panel in zip(all_axes, panels, strict=True):
            _label(axes, panel)
        return style.finish(figure, path)


def _draw(axes: Any, panel: Panel) -> None:
    from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter

    axes.set(xscale="log", yscale="log", xlim=panel.xs, ylim=panel.ys)
    axes.set_ylabel("attainable FLOP/s")
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(_tick))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, which="major")
    rows = len(panel.dtypes) * panel.stagger
    axes.set_title(panel.title, pad=4 + _ROW_POINTS * rows)
    # Host and GPU may be the same processor: the thinner line is then seen on the thicker one.
    thick = {Role.GPU: 2.6, Role.CPU: 1.3, Role.LINK: 1.6, Role.DISK: 1.3, Role.CACHE: 1.0}
    for slope in panel.slopes:
        for evidence, rate in slope.bytes_per_s.items():
            ridge = slope.limit(evidence) / rate
            width = thick[slope.role] if evidence is slope.planned else 0.8
            width = min(width, 1.0) if slope.aside else width
            left = min(panel.xs[0], ridge / 2)
            axes.plot(
                [left, ridge],
                [left * rate, ridge * rate],
                _LINES[evidence],
                linewidth=width,
                color=_COLOURS[slope.role],
                gid=f"slope {slope.name} {evidence}",
            )
    for ceiling in panel.ceilings:
        for evidence, rate in ceiling.flops_per_s.items():
            width = thick[ceiling.role] if evidence is ceiling.planned else 0.8
            axes.plot(
                [rate / ceiling.memory(evidence), max(panel.xs[1], rate / ceiling.memory(evidence))],
                [rate, rate],
                _LINES[evidence],
                linewidth=width,
                color=_COLOURS[ceiling.role],
                gid=f"compute {ceiling.name} {evidence}",
            )
    _draw_curves(axes, panel)
    _draw_marks(axes, panel)


def _tick(intensity: float, _: int) -> str:
    return f"{intensity / 1000:g}k" if intensity >= 1000 else f"{intensity:g}"


def _draw_curves(axes: Any, panel: Panel) -> None:
    """GEMM rates over tokens, at the FLOPs a byte of a GEMM that mostly reads its weights."""
    if panel.row_word == KV:
        return
    for ceiling in panel.ceilings:
        if ceiling.curve_is_known:
            xs = [2 * tokens / FORMATS[ceiling.dtype].bytes_of(1) for tokens, _ in ceiling.curve]
            axes.plot(
                xs,
                [rate for _, rate in ceiling.curve],
                "+",
                markersize=6,
                color=style.ink(_COLOURS[ceiling.role]),
                markeredgewidth=1.0,
                gid=f"curve {ceiling.name}",
            )


def _draw_marks(axes: Any, panel: Panel) -> None:
    for mark in panel.marks:
        shape = style.MARKERS[panel.dtypes.index(mark.dtype) % 3]
        axes.axvline(
            mark.intensity,
            color=style.GREY,
            linewidth=0.6,
            linestyle=(0, (4, 2)),
            zorder=1,
            gid=f"mark {mark.dtype} {mark.label}",
        )
        axes.plot(
            [mark.intensity],
            [mark.in_place],
            shape,
            markerfacecolor="white",
            markeredgecolor=style.BLACK,
            zorder=6,
            gid="in place",
        )
        if mark.fetched is not None:
            axes.plot([mark.intensity], [mark.fetched], shape, color=style.BLACK, zorder=6, gid="fetched")
    for mark in panel.turning:
        assert mark.points is not None
        assert mark.in_gpu_memory is not None
        for where, height, marker, name in (
            (mark.points.p1, mark.in_place, "v", "P1"),
            (mark.points.p2, mark.in_gpu_memory, "^", "P2"),
        ):
            axes.plot(
                [mark.intensity, where],
                [height, height],
                color=style.RED,
                linewidth=0.8,
                linestyle=(0, (1, 1)),
                zorder=5,
                gid=f"{name} at",
            )
            axes.plot([where], [height], marker, color=style.RED, markersize=6, zorder=7, gid=f"{name} {mark.dtype}")
        if panel.shows_balance(mark):
            link = mark.in_gpu_memory / mark.points.p2
            axes.plot(
                [mark.points.balance],
                [link * mark.points.balance],
                "d",
                color=style.RED,
                markersize=6,
                zorder=7,
                gid=f"balance {mark.dtype}",
            )


# --------------------------------------------------------------------------------------- labels


def _label(axes: Any, panel: Panel) -> None:
    labels = Labels(axes)
    for line in axes.get_lines():
        name = str(line.get_gid())
        if name.startswith(("slope", "compute", "P1 at", "P2 at")):
            labels.avoid_line(line.get_xdata(), line.get_ydata(), of=name.rpartition(" ")[0])
        elif not name.startswith("mark"):
            for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True):
                labels.avoid_point(x, y)
    _label_marks(labels, panel)
    _label_turning_points(labels, panel)
    _label_ceilings(labels, panel)
    _label_slopes(labels, panel)


def _label_marks(labels: Labels, panel: Panel) -> None:
    """What the vertical lines are, in rows above the chart: one row or more a dtype."""
    axes = labels.axes
    for number, dtype in enumerate(reversed(panel.dtypes)):
        base = axes.bbox.y1 + labels.pixels(3 + _ROW_POINTS * panel.stagger * number)
        for first, mark in enumerate(m for m in panel.marks if m.dtype == dtype):
            x = axes.transData.transform((mark.intensity, panel.ys[0]))[0]
            rows = [Spot(x, base + labels.pixels(_ROW_POINTS * row), ha="center") for row in range(panel.stagger)]
            prefix = panel.prefix(dtype)
            if not mark.label:  # the dtype says it all
                labels.place([prefix], rows, colour=style.GREY, inside=False)
                continue
            text = labels.place([mark.label], rows, colour=style.GREY, inside=False)
            if not first:
                box = text.get_window_extent()
                before = Spot(box.x0 - labels.pixels(3), base, ha="right")
                labels.place([prefix], [before], colour=style.GREY, inside=False)


def _label_turning_points(labels: Labels, panel: Panel) -> None:
    turning = panel.turning
    for mark in turning:
        assert mark.points is not None
        assert mark.in_gpu_memory is not None
        link = mark.in_gpu_memory / mark.points.p2
        of = f" {mark.dtype}" if len(turning) > 1 else ""
        for name, x in (("P1", mark.points.p1), ("P2", mark.points.p2)):
            labels.place([f"{name}{of}"], labels.near(x, link * x), colour=style.RED)
        if panel.shows_balance(mark):
            x = mark.points.balance
            labels.place([f"balance{of}"], labels.near(x, link * x), colour=style.RED)


def _label_ceilings(labels: Labels, panel: Panel) -> None:
    for names, ceiling in _grouped([(c.name, c, c.flops_per_s[c.planned]) for c in panel.ceilings]):
        rate = ceiling.flops_per_s[ceiling.planned]
        texts = _with_others(f"{names} {format_flops(rate)}", ceiling.flops_per_s, format_flops)
        left = min(max(rate / ceiling.memory(ceiling.planned), panel.xs[0]), panel.xs[1] / 3)
        spots = labels.along((left, rate), (panel.xs[1], rate), (0.99, 0.9, 0.8, 0.7, 0.6), ha="right")
        labels.place(texts, spots, colour=_COLOURS[ceiling.role], of=f"compute {ceiling.name}")


def _label_slopes(labels: Labels, panel: Panel) -> None:
    found = [(s.name, s, s.bytes_per_s[s.planned]) for s in panel.slopes]
    for names, slope in _grouped(found):
        rate = slope.bytes_per_s[slope.planned]
        left = max(panel.xs[0], panel.ys[0] / rate)
        right = min(slope.limit(slope.planned) / rate, panel.xs[1])
        name = f"{names} {format_bandwidth(rate)}"
        shares = [0.02 + 0.06 * step for step in range(14)]
        spots = labels.along((left, left * rate), (right, right * rate), shares)
        labels.place(
            _with_others(name, slope.bytes_per_s, format_bandwidth),
            spots,
            colour=_COLOURS[slope.role],
            of=f"slope {slope.name}",
            required=slope.role is not Role.CACHE and not slope.aside,
        )


def _grouped(found: list[tuple[str, Any, float]]) -> list[tuple[str, Any]]:
    """Roofs of the same kind and rate, named together: `GPU and CPU memory`."""
    groups: list[tuple[list[str], Any, float]] = []
    for name, roof, rate in found:
        for names, _, other in groups:
            same_kind = names[0].partition(" ")[2] == name.partition(" ")[2]
            if same_kind and abs(rate / other - 1) < SAME:
                names.insert(len(names) - 1, name.partition(" ")[0])
                break
        else:
            groups.append(([name], roof, rate))
    named: list[tuple[str, Any]] = []
    for names, roof, _ in groups:
        first, _, rest = names[-1].partition(" ")
        named.append((" and ".join([first, *names[:-1]]) + f" {rest}".rstrip(), roof))
    return named


def _with_others(text: str, rates: dict[Evidence, float], show: Callable[[float], str]) -> list[str]:
    """The label with the rates that are not planned with in brackets, and without them."""
    planned = next(evidence for evidence in Evidence if evidence in rates)
    unit = show(rates[planned]).partition(" ")[2]
    others = [
        f"{_WORDS[evidence]} {show(rates[evidence]).removesuffix(' ' + unit)}"
        for evidence in Evidence
        if evidence in rates and abs(rates[evidence] / rates[planned] - 1) > SAME
    ]
    return [f"{text} ({', '.join(others)})", text] if others else [text]


def _legend(figure: Any, panels: list[Panel]) -> None:
    from matplotlib.lines import Line2D

    def entry(label: str, line: Any = "none", marker: str = "none", **others: Any) -> Line2D:
        return Line2D([], [], linestyle=line, marker=marker, color=style.BLACK, label=label, **others)

    rates = [s.bytes_per_s for p in panels for s in p.slopes]
    rates += [c.flops_per_s for p in panels for c in p.ceilings]
    handles = [
        entry(_WORDS[evidence] + (" (plans use it)" if evidence is Evidence.ACHIEVED else ""), _LINES[evidence])
        for evidence in Evidence
        if any(evidence in of_one for of_one in rates)
    ]
    curves = {c.source for p in panels for c in p.ceilings if c.curve_is_known}
    if curves:
        sources = " and ".join(sorted(curves, key=list(Source).index))
        handles.append(entry(f"GEMM over tokens ({sources})", marker="+"))
    marks = [mark for panel in panels for mark in panel.marks]
    if marks:
        roles = {ceiling.role for panel in panels for ceiling in panel.ceilings}
        where = "CPU" if Role.CPU in roles else "GPU"
        handles.append(entry(f"attained in place, on the {where}", marker="o", markerfacecolor="white"))
    if any(mark.fetched is not None for mark in marks):
        handles.append(entry("attained on the GPU, over the link", marker="o"))
    style.put_legend(figure, handles)
