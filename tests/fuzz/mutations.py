"""Inputs for the fuzz tests: valid files with values, keys and bytes changed, as hypothesis draws.

An example is plain integers and names, so that hypothesis shrinks it: fewer changes, earlier places
and simpler values first.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from typing import Any, Final, NamedTuple

import yaml
from hypothesis import strategies as st

# What is put in place of a value; the simplest first.
VALUES: Final[tuple[Any, ...]] = (
    0,
    1,
    -1,
    2,
    True,
    None,
    "",
    "x",
    [],
    {},
    0.5,
    -0.0,
    1e308,
    5e-324,
    3,
    7,
    1000,
    10**9,
    2**31,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**19,
    10**40,
    10**400,
    float("inf"),
    float("nan"),
    "0",
    "yes",
    "2e9",
    "1e999",
    ".inf",
    "[/x]",
    "[bold]",
    "\x1b[31m\x07",
    "\ud800",
    "a\nb",
    "é" * 3,
    "\0",
    "<x>",
    "../../x",
    "/etc/passwd",
    "x" * 5000,
    "9" * 5000,
    "{{ 9**9 }}",
    [[]],
    [0],
    [1, 2, 3],
    [None],
    {"name": "x"},
    {"value": 1},
    {"": 0},
    [[1.0, 2.0]],
    ["a", 1],
    1.5,
    64,
    128.0,
    "float16",
    "bfloat16",
    "cpu",
    "gpu",
)
# What is put into a text.
TEXTS: Final = (
    b"",
    b" ",
    b"\n",
    b"0",
    b",",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b"'",
    b":",
    b"- ",
    b"#",
    b"\\",
    b"\t",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b"\r\n",
    b"\x1b[0m",
    b"\\ud800",
    b"[" * 100,
    b'{"a":' * 100,
    b"[" * 40_000,
    b'{"a":' * 10_000,
    b"!!int _",
    b"!!python/object:os.x ",
    b"!!timestamp x",
    b"&a ",
    b"*a",
    b"<<: ",
    b"? ",
    b"---\n",
    b"...\n",
    b"%YAML 9.9\n",
    b".nan",
    b"-.inf",
    b"1e999",
    b"NaN",
    b"Infinity",
    b"9" * 5000,
    b"0x",
    b"1_0",
    b"1:30",
    b"2001-01-01",
    b'"name": 1, ',
    b"name: 1\n",
    b"{%",
    b"%}",
    b"{{",
    b"}}",
    b"{% for i in range(9999) %}",
    b"{% endfor %}",
    b"** 9 ** 9",
    b" * 'x'",
    b"| join",
    b" ~ x",
    b"\xe2\x80\xa8",
    b"null",
    b"true",
)
TREE_CHANGES: Final = ("set", "set", *["scale"] * 8, "drop", "rename", "copy", "nest", "repeat")
TEXT_CHANGES: Final = ("insert", "cut", "flip", "end", "double")
FACTORS: Final = (2, 0.5, -1, 1000, 1e-3, 1e6, 1e-9, 1e12, 3)


class Change(NamedTuple):
    """One change: of which place (counted round), which kind, with which value or text."""

    place: int
    kind: str
    what: int


class Example(NamedTuple):
    """A valid file, by number, and what is changed in it, first as values, then as bytes."""

    base: int
    tree: tuple[Change, ...]
    text: tuple[Change, ...]


def examples(num_bases: int, *, has_values: bool = True) -> st.SearchStrategy[Example]:
    """Examples of one of so many valid files, of bytes only if the files have no values."""
    tree = st.builds(Change, st.integers(0, 4000), st.sampled_from(TREE_CHANGES), st.integers(0, len(VALUES) - 1))
    text = st.builds(Change, st.integers(0, 10**5), st.sampled_from(TEXT_CHANGES), st.integers(0, len(TEXTS) - 1))
    few = st.lists(text, max_size=2).map(tuple)
    return st.builds(
        Example,
        st.integers(0, num_bases - 1),
        st.one_of(tree.map(lambda change: (change,)), st.lists(tree, max_size=4).map(tuple))
        if has_values
        else st.just(()),
        # What is no longer JSON or YAML is refused early: mostly let values come through.
        st.one_of(st.just(()), st.just(()), st.just(()), few) if has_values else few,
    )


def content_of(example: Example, bases: list[Any], dump: Callable[[Any], bytes]) -> bytes:
    """The bytes of an example."""
    base = bases[example.base]
    if example.tree:
        base = deepcopy(base)
        for change in example.tree:
            base = _changed_tree(base, change)
    content = base if isinstance(base, bytes) else dump(base)
    for change in example.text:
        content = _changed_text(content, change)
    return content


def as_json(plain: Any) -> bytes:
    """One JSON document."""
    return json.dumps(plain).encode()


def as_yaml(plain: Any) -> bytes:
    """One YAML document; what YAML cannot write is written as JSON, which is YAML too."""
    try:
        return yaml.dump(plain, Dumper=yaml.CSafeDumper, sort_keys=False).encode()
    except (yaml.YAMLError, UnicodeEncodeError):
        return as_json(plain)


def as_lines(plain: Any) -> bytes:
    """JSON lines, of a list."""
    lines = plain if isinstance(plain, list) else [plain]
    return b"".join(as_json(line) + b"\n" for line in lines)


def _places(node: Any) -> list[tuple[Any, Any]]:
    """Every container with each of its keys, breadth first."""
    places: list[tuple[Any, Any]] = []
    waiting = [node]
    for outer in waiting:
        keys = list(outer) if isinstance(outer, dict) else range(len(outer))
        for key in keys:
            places.append((outer, key))
            if isinstance(outer[key], dict | list):
                waiting.append(outer[key])
    return places


def _is_scalable(value: Any) -> bool:
    return type(value) in {int, float} and abs(value) < 1e290


def _changed_tree(node: Any, change: Change) -> Any:
    places = _places(node) if isinstance(node, dict | list) else []
    value = deepcopy(VALUES[change.what])
    if not places:
        return value
    if change.kind == "scale":
        places = [(outer, key) for outer, key in places if _is_scalable(outer[key])] or places
    outer, key = places[change.place % len(places)]
    match change.kind:
        case "set":
            outer[key] = value
        case "scale" if _is_scalable(outer[key]):
            now = outer[key]
            factor = FACTORS[change.what % len(FACTORS)]
            outer[key] = type(now)(now * factor)
        case "drop":
            del outer[key]
        case "rename" if isinstance(outer, dict):
            outer[str(value)] = outer.pop(key)
        case "copy":
            other, other_key = places[(change.place + change.what) % len(places)]
            outer[key] = deepcopy(other[other_key])
        case "nest":
            outer[key] = [outer[key]] if change.what % 2 else {"name": outer[key]}
        case "repeat" if isinstance(outer, list):
            outer.extend(deepcopy(outer[key]) for _ in range(change.what % 5))
        case _:
            outer[key] = value
    return node


def _changed_text(content: bytes, change: Change) -> bytes:
    at = change.place % (len(content) + 1)
    text = TEXTS[change.what]
    match change.kind:
        case "insert":
            return content[:at] + text + content[at:]
        case "cut":
            return content[:at] + content[at + change.what + 1 :]
        case "flip":
            return content[:at] + bytes(b ^ (1 << change.what % 8) for b in content[at : at + 1]) + content[at + 1 :]
        case "end":
            return content[:at] + text
        case _:
            return content[: at + 1 + change.what] + content[at:]
