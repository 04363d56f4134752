"""Files decoded strictly: every key known, every value of its type, every error at its path.

msgspec converts to frozen dataclasses; unknown keys, which it lets pass there, are refused first.
"""

import re
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from functools import cache
from types import UnionType
from typing import Any, Final, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from hrm.errors import HrmError, ProfileError

_T = TypeVar("_T")


def decode_strictly(plain: Any, kind: type[_T], file: str) -> _T:
    """What was read from a YAML or JSON `file` as a dataclass.

    Raises ProfileError naming the file and field if a key is unknown or missing, a value has
    another type, or the dataclass refuses it.
    """
    import msgspec

    plain = _check_keys(plain, kind, file, "")
    try:
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as error:
        cause = error.__cause__
        if isinstance(cause, HrmError):
            raise _located(file, cause, plain) from error
        raise _type_error(file, str(error), plain) from error
    except HrmError as error:
        raise _located(file, error, plain) from error


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _check_keys(plain: Any, kind: Any, file: str, path: str) -> Any:
    """`plain` with numbers that YAML took for text (`2e9`) made numbers.

    Raises ProfileError at the first key that is no field of its dataclass, or is missing.
    """
    if kind is float and isinstance(plain, str):
        try:
            return float(plain)
        except ValueError:
            return plain
    allowed = _choices(kind)
    if allowed and plain not in allowed:
        raise ProfileError(
            f"{file}: {path}", "<a mapping>" if isinstance(plain, dict) else plain,
            f"must be one of {', '.join(map(str, allowed))}", "correct the value",
        )  # fmt: skip
    if isinstance(kind, type) and is_dataclass(kind):
        if not isinstance(plain, dict):
            raise ProfileError(
                f"{file}: {path}" if path else file, plain if path else "<no mapping>",
                f"must be a mapping with {', '.join(item.name for item in fields(kind))}",
                "see the files that come with hrm",
            )  # fmt: skip
        given = cast("dict[Any, Any]", plain)
        _check_fields(given, kind, file, path)
        hints = _hints(kind)
        return {
            key: _check_keys(value, hints[key], file, f"{path}.{key}" if path else key)
            for key, value in given.items()
        }
    inner = [arg for arg in get_args(kind) if arg is not type(None)]
    if isinstance(kind, UnionType):
        return plain if plain is None else _check_keys(plain, inner[0], file, path)
    if isinstance(plain, dict) and inner:
        pairs = cast("dict[Any, Any]", plain)
        return {k: _check_keys(v, inner[-1], file, f"{path}.{k}") for k, v in pairs.items()}
    if isinstance(plain, list) and inner:
        items = cast("list[Any]", plain)
        return [
            _check_keys(item, inner[0], file, f"{path}[{_label(item, i)}]")
            for i, item in enumerate(items)
        ]
    return cast("Any", plain)


def _choices(kind: Any) -> list[Any]:
    """The values of an enumeration or a Literal; none for other types."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return [member.value for member in kind]
    return list(get_args(kind)) if get_origin(kind) is Literal else []


def _check_fields(plain: dict[Any, Any], kind: type, file: str, path: str) -> None:
    known: dict[str, Field[Any]] = {item.name: item for item in fields(kind)}
    for key, value in plain.items():
        if key not in known:
            from difflib import get_close_matches

            close = get_close_matches(str(key), known, 1)
            where = f"{path}.{key}" if path else key
            shown = "<a mapping>" if isinstance(value, dict) else value
            raise ProfileError(
                f"{file}: {where}", shown, f"is no field of {kind.__name__} ({', '.join(known)})",
                f"did you mean {close[0]}?" if close else "remove or correct it",
            )  # fmt: skip
    for name, item in known.items():
        required = item.default is MISSING and item.default_factory is MISSING
        if required and name not in plain:
            where = f"{path}.{name}" if path else name
            raise ProfileError(
                f"{file}: {where}",
                "<missing>",
                "must be given",
                "add it as in the files that come with hrm",
            )


def _label(item: Any, index: int) -> Any:
    if isinstance(item, dict):
        return cast("dict[Any, Any]", item).get("name", index)
    return index


_AT: Final = re.compile(r"^(?P<rule>.*?)(?: - at `(?P<path>.*)`)?$", re.DOTALL)


def _type_error(file: str, said: str, plain: Any) -> ProfileError:
    match = _AT.match(said)
    assert match is not None
    where, value = "", plain
    for key, index in re.findall(r"\.(\w+)|\[(\d+)\]", match["path"] or ""):
        if key:
            where += f".{key}" if where else key
            value = cast("dict[str, Any]", value)[key]
        else:
            value = cast("list[Any]", value)[int(index)]
            where += f"[{_label(value, int(index))}]"
    rule = match["rule"].replace("`", "")
    shown: Any = "<a mapping>" if isinstance(value, dict) else value
    return ProfileError(
        f"{file}: {where}" if where else file, shown, rule[:1].lower() + rule[1:],
        "correct the value",
    )  # fmt: skip


def _located(file: str, error: HrmError, plain: Any) -> ProfileError:
    """The same error with the file's name in place of the machine's."""
    name = str(cast("dict[str, Any]", plain).get("name", ""))
    where = error.where.removeprefix(name).lstrip(".: ") if name else error.where
    message = str(error).removeprefix(error.where)
    located = ProfileError(f"{file}: {where}", error.value, error.rule, error.remedy)
    assert str(located).endswith(message)
    return located
