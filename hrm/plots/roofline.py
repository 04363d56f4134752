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
    the FLOPs a byte of what lies on the host; P1 and P2 are marked where a line meets them.
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
            for batch_size in batch_sizes:
                ffn = ffn_turning_points(
                    profile, spec, dtype, batch_size=batch_size,
                    micro_batch_size=min(micro_batch_size, batch_size),
                )  # fmt: skip
                _draw_operator(axes, ffn, f"FFN, N = {batch_size}", style.PURPLE)
    axes.set(xscale="log", yscale="log", xlim=INTENSITIES)
    axes.set_xlabel("operational intensity: FLOPs a byte of what lies on the host")
    axes.set_ylabel("attainable FLOP/s")
    kind = {"catalog": "catalog figures", "emulated": "emulated accelerator"}
    title = f"{profile.name}, {dtype}"
    if profile.accelerator in kind:
        title += f" ({kind[profile.accelerator]})"
    axes.set_title(title, loc="left")
    axes.grid(visible=True, which="major", linewidth=0.4, alpha=0.5)
    axes.legend(loc="lower right", fontsize=8, frameon=False)
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
        fontsize=7, color=colour, ha="right", va="top",
    )  # fmt: skip
    if point.intensity < point.p2:
        side = "P1" if point.intensity < point.p1 else "P2"
        where = point.p1 if side == "P1" else point.p2
        axes.plot([where], [0.015], marker="v" if side == "P1" else "^", color=colour,
                  transform=axes.get_xaxis_transform(), markersize=6)  # fmt: skip
        axes.annotate(side, (where, 0.03), xycoords=("data", "axes fraction"), fontsize=7,
                      color=colour, ha="center")  # fmt: skip
