"""YAML by its core schema (yaml.org, 1.2.2, §10.3), built from the parser's events.

The events come one by one, so depth, size and expanded aliases are bounded before anything is
built. There are no tags, dates, base-60 numbers or `yes` and `no`: `true`, `12`, `2e9`, `~` and
texts are all.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from hrm.decoding.limits import MAX_DEPTH, MAX_DIGITS, MAX_NODES, Malformed, brief, decode_text, integer, number

_NULL: Final = {"", "~", "null", "Null", "NULL"}
_TRUTH: Final = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER: Final = re.compile(r"[-+]?[0-9]+")
_BASED: Final = re.compile(r"0o([0-7]+)|0x[0-9a-fA-F]+")
_FLOAT: Final = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NO_NUMBER: Final = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")


def decode_yaml(data: bytes) -> Any:
    """The value of the only document of a YAML text in UTF-8; None if it is empty.

    Raises Malformed with the line if it is no YAML, is nested deeper than 64, has more than
    200,000 values once its aliases are followed, a key twice, a tag or a number that is not finite.
    """
    builder = _Builder()
    for event in _events(decode_text(data)):
        try:
            builder.take(event)
        except Malformed as error:
            raise Malformed(f"line {event.start_mark.line + 1}: {error}") from error
    return builder.document


def reads_as_text(text: str) -> bool:
    """Whether YAML reads the text as itself without quotes, not as a number or the like."""
    try:
        return isinstance(_plain(text), str)
    except Malformed:
        return False


def _events(text: str) -> Iterator[Any]:
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        yield from yaml.parse(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark, error.problem or "is no YAML"
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise Malformed(f"{at}{problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an escape beyond Unicode
        raise Malformed(brief(" ".join(str(error).split()))) from error


@dataclass(slots=True)
class _Node:
    """A value with what it costs to walk over it: values inside, and how deep they go."""

    value: Any
    size: int = 1
    height: int = 0


@dataclass(slots=True)
class _Open:
    """A list or mapping whose end has not come yet; `key` is a one-element list if one waits."""

    node: _Node
    anchor: str | None
    key: list[Any] = field(default_factory=list[Any])


class _Builder:
    """Takes events in order; `document` is the value once all have come."""

    def __init__(self) -> None:
        self.document: Any = None
        self._open: list[_Open] = []
        self._anchors: dict[str, _Node] = {}
        self._documents = 0

    def take(self, event: Any) -> None:
        """Add what the event says; Malformed if it breaks a bound."""
        match type(event).__name__:
            case "DocumentStartEvent":
                self._documents += 1
                if self._documents > 1:
                    raise Malformed("must be one document, and another one begins")
            case "ScalarEvent":
                self._add(_Node(_scalar(event)), event.anchor)
            case "AliasEvent":
                self._add(self._aliased(event.anchor), None)
            case "SequenceStartEvent":
                self._begin(event, [])
            case "MappingStartEvent":
                self._begin(event, {})
            case "SequenceEndEvent" | "MappingEndEvent":
                ended = self._open.pop()
                self._add(ended.node, ended.anchor)
            case _:
                pass

    def _begin(self, event: Any, value: "list[Any] | dict[Any, Any]") -> None:
        _refuse_tag(event)
        if len(self._open) == MAX_DEPTH:
            raise _too_deep()
        self._open.append(_Open(_Node(value), event.anchor))

    def _aliased(self, anchor: str) -> _Node:
        node = self._anchors.get(anchor)
        if node is None:
            raise Malformed(f"the alias *{brief(anchor)} has no anchor before it")
        return node

    def _add(self, node: _Node, anchor: str | None) -> None:
        if anchor is not None:
            self._anchors[anchor] = node
        if not self._open:
            self.document = node.value
            return
        outer = self._open[-1]
        outer.node.size += node.size
        outer.node.height = max(outer.node.height, node.height + 1)
        if outer.node.size > MAX_NODES:
            raise Malformed(f"has more than {MAX_NODES:,} values once its aliases are followed")
        if len(self._open) + node.height > MAX_DEPTH:
            raise _too_deep()
        _put(outer, node.value)


def _put(outer: _Open, value: Any) -> None:
    content = outer.node.value
    if isinstance(content, list):
        content.append(value)  # pyright: ignore[reportUnknownMemberType]
    elif not outer.key:
        if isinstance(value, list | dict):
            raise Malformed("a key must be a text, not a list or a mapping")
        if value in content:
            raise Malformed(f"the key {brief(value)!r} comes twice in one mapping")
        outer.key.append(value)
    else:
        content[outer.key.pop()] = value


def _too_deep() -> Malformed:
    return Malformed(f"is nested deeper than {MAX_DEPTH} lists and mappings")


def _refuse_tag(event: Any) -> None:
    if event.tag is not None:
        raise Malformed(f"has the tag {brief(event.tag)}; tags are not read, leave it out")


def _scalar(event: Any) -> Any:
    """The value of a scalar: what is quoted is a text."""
    _refuse_tag(event)
    return event.value if event.style else _plain(event.value)


def _plain(text: str) -> str | int | float | bool | None:
    if text in _NULL:
        return None
    if text in _TRUTH:
        return _TRUTH[text]
    if _INTEGER.fullmatch(text):
        return integer(text)
    if based := _BASED.fullmatch(text):
        return integer(text) if len(text) > MAX_DIGITS else int(text, 8 if based[1] else 16)
    if _FLOAT.fullmatch(text):
        return number(text)
    if _NO_NUMBER.fullmatch(text):
        raise Malformed(f"holds {text}, which is no finite number")
    return text
