"""One look for all pictures: the Okabe–Ito colours, which colour-blind readers tell apart."""

from pathlib import Path
from typing import Any, Final

from hrm.errors import HrmError

BLUE: Final = "#0072B2"
ORANGE: Final = "#E69F00"
GREEN: Final = "#009E73"
RED: Final = "#D55E00"
PURPLE: Final = "#CC79A7"
SKY: Final = "#56B4E9"
GREY: Final = "#666666"

FORMATS: Final = (".png", ".svg", ".pdf")


def new_figure(width_inches: float, height_inches: float) -> tuple[Any, Any]:
    """A figure and its axes, drawn without a display."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width_inches, height_inches), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    """Write PNG, SVG or PDF by the path's ending; HrmError for another or an unwritable one."""
    import matplotlib.pyplot as plt

    if path.suffix.lower() not in FORMATS:
        raise HrmError(
            "--out", str(path), f"must end in {', '.join(FORMATS)}", "choose one of these formats"
        )
    try:
        figure.savefig(path, dpi=160)
    except OSError as error:
        raise HrmError(
            "--out", str(path), f"must be writable ({error.strerror})", "choose another path"
        ) from error
    plt.close(figure)
