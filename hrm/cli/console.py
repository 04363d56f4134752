"""Where reports are printed: names of users may hold anything, and appear as they are."""

import re
import sys
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

_STYLES: Final = {"bold", "dim", "italic", "red", "green", "yellow", "cyan", "default"}
_BRACKET: Final = "\ue000"  # what no style begins with, and Unicode leaves to programs
_TAG: Final = re.compile(r"\[([a-z#/@][^\[]*?)\]")  # what rich takes for one


class PlainConsole(Console):
    """A console with the few styles of our reports, `[bold]…[/]`, and no other markup.

    rich would take `[x]` in a model's name for a style, leave it out, and end with an error at
    `[/x]`. Control characters are shown, not sent to the terminal. Texts of users that go beside
    styles go through `as_is`.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """The text with its styles; rich calls it for whatever is printed."""
        kept = {name: options[name] for name in ("justify", "overflow") if name in options}
        rendered = Text(style=options.get("style", ""), **kept)
        styles: list[str] = []
        end = 0
        for tag in _TAG.finditer(text):
            name = tag[1]
            is_style = set(name.split()) <= _STYLES or (name == "/" and bool(styles))
            rendered.append(_shown(text[end : tag.start()]), _of(styles))
            end = tag.end()
            if not is_style:
                rendered.append(_shown(f"[{name}]"), _of(styles))
            elif name == "/":
                styles.pop()
            else:
                styles.append(name)
        rendered.append(_shown(text[end:]), _of(styles))
        return rendered


def as_is(text: str) -> str:
    """A text whose brackets are no styles, to be printed on a PlainConsole; `[bold]` and `[/]` may be in a name too."""
    return _escaped(text).replace("[", _BRACKET)


def _of(styles: list[str]) -> str:
    return " ".join(styles)


def _shown(text: str) -> str:
    return "[".join(map(_escaped, text.split(_BRACKET)))


def _escaped(text: str) -> str:
    """The text with its control characters as Python writes them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def plain_table(*headers: str | Column, right_from: int | None = None) -> Table:
    """A table without lines, whose columns are aligned right from the one of this number on."""
    table = Table(*headers, box=None, pad_edge=False)
    for column in table.columns[right_from:] if right_from is not None else ():
        column.justify = "right"
    return table


def print_json(content: dict[str, Any]) -> None:
    """Print one JSON object and nothing else."""
    print(msgspec.json.format(msgspec.json.encode(content), indent=2).decode())


# Tables keep their columns when the output goes to a file or a pipe.
console = PlainConsole(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)
