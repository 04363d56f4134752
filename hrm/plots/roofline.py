"""The hierarchical roofline of a machine as a chart (arXiv 2411.11217, Figs 4 and 5)."""

from pathlib import Path
from typing import Any, Final

from hrm.hardware import HardwareProfile, MemoryLevel
from hrm.model_spec import ModelSpec
from hrm.plots import style
from hrm.roofline import TurningPoints, attention_turning_points, ffn_turning_points

INTENSITIES: Final = (0.25, 32768.0)


def plot_roofline(
    profile: HardwareProfile, path: Path, *, spec: ModelSpec | None, dtype: str,
    context: float = 512, micro_batch_size: int = 128,
    batch_sizes: tuple[int, ...] = (32, 128, 512, 2048, 8192),
) -> None:  # fmt: skip
    """Draw the roofs of every level and of the link; with a model, attention and FFN on them.

    Solid roofs are what plans are made with, dotted ones the data sheet. Vertical lines stand at
    the FLOPs a byte of what lies on the host. Triangles mark P1 and P2: a line left of its P1 is
    faster on the CPU, one left of its P2 is limited by the link.
    """
    figure, axes = style.new_figure(9.5, 5.8)
    top, host = profile.top, profile.host
    _draw_level(axes, top, dtype, style.BLUE, "GPU" if profile.has_accelerator else "CPU")
    if profile.has_accelerator:
        _draw_level(axes, host, dtype, style.ORANGE, "CPU")
        link = profile.h2d.bandwidth_bytes_per_s
        _draw_slope(axes, link.at(), top.processor.flops_per_s(dtype), style.GREEN,
                    f"link {link.at() / 1e9:.3g} GB/s")  # fmt: skip
        if spec is not None:
            attention = attention_turning_points(profile, spec, dtype, context=context)
            _draw_operator(axes, attention, f"attention, context {context:g}", style.RED)
            ffns = {
                batch_size: ffn_turning_points(
                    profile, spec, dtype, batch_size=batch_size,
                    micro_batch_size=min(micro_batch_size, batch_size),
                )
                for batch_size in batch_sizes
            }  # fmt: skip
            for batch_size, ffn in ffns.items():
                _draw_operator(axes, ffn, f"FFN, N = {batch_size}", style.PURPLE)
            # The FFN's P1 and P2 grow with the batch, up to these.
            _mark_turning_points(axes, attention, "attention", style.RED, row=1)
            _mark_turning_points(axes, ffns[max(ffns)], "FFN", style.PURPLE, row=0)
    axes.set(xscale="log", yscale="log", xlim=INTENSITIES)
    axes.set_xlabel("operational intensity: FLOPs a byte of what lies on the host")
    axes.set_ylabel("attainable FLOP/s")
    kind = {"catalog": "catalog figures", "emulated": "emulated accelerator"}
    title = f"{profile.name}, {dtype}"
    if profile.accelerator in kind:
        title += f" ({kind[profile.accelerator]})"
    axes.set_title(title, loc="left")
    axes.grid(visible=True, which="major", linewidth=0.4, alpha=0.5)
    axes.legend(loc="lower right", fontsize=8, bbox_to_anchor=(1.0, 0.13), framealpha=0.9,
                edgecolor="none")  # fmt: skip
    style.save_figure(figure, path)


def _draw_level(axes: Any, level: MemoryLevel, dtype: str, colour: str, word: str) -> None:
    flops = level.processor.flops_per_s(dtype)
    read = level.read_bytes_per_s
    name = f"{word} {flops / 1e12:.3g} TFLOP/s, {read.at() / 1e9:.4g} GB/s"
    _draw_slope(axes, read.at(), flops, colour, name)
    rate = level.processor.compute_flops_per_s.get(dtype)
    if rate is not None and rate.datasheet is not None and read.datasheet is not None:
        _draw_slope(
            axes, read.datasheet.value, rate.datasheet.value, colour, f"{word}, data sheet", ":"
        )


def _draw_slope(
    axes: Any, bytes_per_s: float, flops_per_s: float, colour: str, label: str, line: str = "-"
) -> None:
    ridge = flops_per_s / bytes_per_s
    left, right = INTENSITIES
    xs = sorted({left, min(max(ridge, left), right), right})
    ys = [min(x * bytes_per_s, flops_per_s) for x in xs]
    axes.plot(xs, ys, line, color=colour, linewidth=1 if line == ":" else 2, label=label)


def _draw_operator(axes: Any, point: TurningPoints, label: str, colour: str) -> None:
    axes.axvline(point.intensity, color=colour, linewidth=0.9, linestyle="--")
    axes.annotate(
        label, (point.intensity, 1.0), xycoords=("data", "axes fraction"), rotation=90,
        fontsize=8, color=colour, ha="right", va="top",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
    )  # fmt: skip


def _mark_turning_points(
    axes: Any, point: TurningPoints, name: str, colour: str, *, row: int
) -> None:
    """P1 and P2 on a line of their own above the axis, the lower ones in row 0."""
    height = 0.03 + 0.055 * row
    left, right = INTENSITIES
    for word, where, marker, side in (("P1", point.p1, "v", -1), ("P2", point.p2, "^", 1)):
        if left <= where <= right:
            axes.plot([where], [height], marker=marker, color=colour, markersize=7,
                      transform=axes.get_xaxis_transform())  # fmt: skip
            axes.annotate(
                f"{word} {name}", (where, height), xycoords=("data", "axes fraction"), fontsize=8,
                color=colour, ha="left" if side > 0 else "right", va="center",
                xytext=(7 * side, 0), textcoords="offset points",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
            )  # fmt: skip
