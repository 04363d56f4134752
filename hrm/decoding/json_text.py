"""JSON, decoded strictly: no key twice, no number out of bounds, no half characters."""

import json
import re
from typing import Any, Final, NoReturn, cast

from hrm.decoding.limits import MAX_DEPTH, Malformed, brief, decode_text, integer, number

# Numbers that may break a bound; without any, the decoder need not look at each of them.
_LONG_NUMBER: Final = re.compile(rb"[0-9]{20}|[0-9.][eE][+]?[0-9]{3}")
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")


def decode_json(data: bytes) -> Any:
    """The value of one JSON document in UTF-8.

    Raises Malformed if it is no JSON, is nested deeper than 64, has a key twice in one object,
    holds NaN, an infinite number or an integer of over 40 digits, or half a surrogate pair.
    """
    text = decode_text(data)
    decoder = _BOUNDED if _LONG_NUMBER.search(data) else _PLAIN
    try:
        value = decoder.decode(text)
    except RecursionError as error:
        raise _too_deep() from error
    except json.JSONDecodeError as error:
        at = f"line {error.lineno}, column {error.colno}"
        raise Malformed(f"{at}: {error.msg[:1].lower()}{error.msg[1:]}") from error
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    if _SURROGATE.search(data):
        _check_characters(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise Malformed(f"has the key {brief(twice)!r} twice in one object")
    return content


def _constant(name: str) -> NoReturn:
    raise Malformed(f"holds {name}, which is no JSON number")


_PLAIN: Final = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
_BOUNDED: Final = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_constant, parse_int=integer, parse_float=number
)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return
    raise _too_deep()


def _inside(value: Any) -> list[Any]:
    """What is in an object or a list; nothing is in other values."""
    if isinstance(value, dict):
        return list(cast("dict[str, Any]", value).values())
    return cast("list[Any]", value) if isinstance(value, list) else []


def _too_deep() -> Malformed:
    return Malformed(f"is nested deeper than {MAX_DEPTH} lists and objects")


def _check_characters(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Malformed("holds half of a pair of surrogates, which is no character") from error
