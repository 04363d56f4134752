"""What the tests of pictures share: ink on paper, lines by name, files of each format."""

from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


def texts(figure: Figure) -> list[Any]:
    """All texts that are really drawn; ticks beyond an axis' ends exist, but are not."""
    drawn: list[Any] = []
    draw = Text.draw

    def note(text: Any, renderer: Any) -> None:
        if text.get_visible() and text.get_text():
            drawn.append(text)
        draw(text, renderer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", note)
        figure.canvas.draw()
    return drawn


def assert_texts_apart(figure: Figure) -> None:
    """No two texts put ink on the same pixel, and none leaves the paper."""
    renderer: Any = figure.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue]
    drawn = texts(figure)
    assert len(drawn) > 5
    width, height = figure.canvas.get_width_height()
    owner = np.full((height, width), -1)
    for index, text in enumerate(drawn):
        text.set_path_effects([])
        renderer.clear()
        text.draw(renderer)
        ink = np.asarray(renderer.buffer_rgba())[:, :, 3] > 64
        over = owner[ink].max(initial=-1)
        assert over < 0, f"{text.get_text()!r} over {drawn[over].get_text()!r}"
        owner[ink] = index
        box = text.get_window_extent(renderer)
        inside = min(box.x0, box.y0) > -2 and box.x1 < width + 2 and box.y1 < height + 2
        assert inside, f"{text.get_text()!r} leaves the paper"


def named(axes: Any, prefix: str) -> list[Any]:
    """Lines of a chart whose name begins so."""
    return [line for line in axes.get_lines() if str(line.get_gid()).startswith(prefix)]


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in texts(figure)]


def lightness(colour: str) -> float:
    """CIE L* from 0 to 100, by the book: how light a colour is in greyscale."""
    from matplotlib.colors import to_rgb

    def linear(c: float) -> float:
        return c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4

    red, green, blue = map(linear, to_rgb(colour))
    y = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y
