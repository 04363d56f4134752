"""One look for all pictures: the Okabe–Ito colours, which colour-blind readers tell apart.

Colour never speaks alone: lines differ in their style, areas in their hatch, points in their
marker. Figures are as wide as a printed page, so that their 8 points are 8 points on paper.
"""

from contextlib import AbstractContextManager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hrm.errors import HrmError
from hrm.files import check_writable, write_whole
from hrm.units import format_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE: Final = "#0072B2"
ORANGE: Final = "#E69F00"
GREEN: Final = "#009E73"
RED: Final = "#D55E00"
PURPLE: Final = "#CC79A7"
SKY: Final = "#56B4E9"
YELLOW: Final = "#F0E442"
BLACK: Final = "#000000"
GREY: Final = "#666666"
LIGHT: Final = "#BBBBBB"

# For things in a row that have no colour of their own, such as schedules or regions.
SERIES: Final = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW)
MARKERS: Final = ("o", "s", "D", "^", "v", "P", "X")
LINES: Final = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (8, 2)))
HATCHES: Final = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "++++")

PAGE_INCHES: Final = 7.2
SMALL_POINTS: Final = 8
TEXT_POINTS: Final = 9
FORMATS: Final = (".png", ".svg", ".pdf")

_LOOK: Final[dict[str, Any]] = {
    "font.size": SMALL_POINTS,
    "axes.titlesize": TEXT_POINTS,
    "axes.labelsize": SMALL_POINTS,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "figure.titlesize": TEXT_POINTS + 1,
    "grid.linewidth": 0.4,
    "axes.formatter.limits": (-4, 15),  # no powers of ten beside an axis
    "grid.color": "#DDDDDD",
    "hatch.linewidth": 0.5,
    "legend.fontsize": SMALL_POINTS,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
    "svg.hashsalt": "hrm",  # the same picture is the same file
    "xtick.labelsize": SMALL_POINTS,
    "xtick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.labelsize": SMALL_POINTS,
    "ytick.major.width": 0.6,
    "ytick.minor.width": 0.4,
}


def look() -> AbstractContextManager[None]:
    """All that is drawn and saved inside has the house's fonts and lines."""
    import matplotlib as mpl

    typed: Any = mpl
    return typed.rc_context(_LOOK)


def new_figure(height_inches: float, title: str = "") -> Any:
    """A figure with nothing but its title, if there is one; it needs no display and pyplot does not keep it alive."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(PAGE_INCHES, height_inches), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    return figure


def hold_still(figure: Any) -> None:
    """Lay the figure out for good: labels are placed in pixels, so nothing may move from now on."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def finish(figure: Any, path: Path | None) -> "Figure":
    """Write the figure if there is a path, and hand it back."""
    if path is not None:
        save_figure(figure, path)
    return figure


def put_legend(figure: Any, handles: list[Any]) -> None:
    """A legend under the charts, in as few rows as the paper's width allows; none of nothing."""
    for columns in range(len(handles), 0, -1):
        legend = figure.legend(
            handles=handles, loc="outside lower left", ncols=columns, columnspacing=1.2, handletextpad=0.5
        )
        width = legend.get_window_extent(figure.canvas.get_renderer()).width
        if width < figure.bbox.width or columns == 1:
            return
        legend.remove()


def set_logarithmic(axes: Any, which: str) -> None:
    """Make the `x` or the `y` axis logarithmic between its limits, with plain numbers at ticks."""
    from math import log10

    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = getattr(axes, f"get_{which}lim")()
    axes.set(**{f"{which}scale": "log"})
    decades = log10(high / low) if low > 0 else 3.0
    steps = (1,) if decades > 3.5 else (1, 2, 5) if decades > 0.7 else range(1, 10)
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=list(steps)))
    axis.set_major_formatter(FuncFormatter(_plainly))
    axis.set_minor_formatter(NullFormatter())


def _plainly(value: float, _: int) -> str:
    return format_number(value)


def check_path(path: Path | None) -> None:
    """Refuse a path that `save_figure` would refuse, before the work that fills the picture."""
    if path is None:
        return
    if path.suffix.lower() not in FORMATS:
        shown = f"<{path.suffix[:20] or 'no ending'}>"
        raise HrmError(str(path), shown, f"must end in {', '.join(FORMATS)}", "choose one of these formats")
    check_writable(path)


def save_figure(figure: Any, path: Path) -> None:
    """Write PNG, SVG or PDF by the path's ending; HrmError for another or an unwritable one."""
    check_path(path)
    # Files do not say when they were drawn, so that drawing again changes nothing.
    dated = {".svg": "Date", ".pdf": "CreationDate"}.get(path.suffix.lower())
    picture = BytesIO()
    with look():
        figure.savefig(picture, format=path.suffix[1:].lower(), metadata={dated: None} if dated else None)
    write_whole(path, picture.getvalue())


def luminance(colour: str) -> float:
    """Relative luminance of a colour, from 0 for black to 1 for white (WCAG 2)."""
    from matplotlib.colors import to_rgb

    def linear(channel: float) -> float:
        return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(channel) for channel in to_rgb(colour))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def ink(colour: str) -> str:
    """The colour, darkened until it can be read as text on white (contrast of 4.5 to 1)."""
    from matplotlib.colors import to_hex, to_rgb

    red, green, blue = to_rgb(colour)
    while 1.05 / (luminance(to_hex((red, green, blue))) + 0.05) < 4.5:
        red, green, blue = (0.96 * channel for channel in (red, green, blue))
    return to_hex((red, green, blue))


def halo() -> list[Any]:
    """Path effects that keep text readable where it crosses a line."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2.0, foreground="white")]
