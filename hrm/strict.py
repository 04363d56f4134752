"""Files decoded strictly: every key known, every value of its type, every error at its path.

Values are what `hrm.decoding` returns: plain, finite and of bounded depth. They become frozen
dataclasses from the inside out, so that an error of any of them is told where it stands.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Final, Literal, TypeVar, cast, get_args, get_origin, get_type_hints

from hrm.errors import HrmError, ProfileError, brief_value, meant

_T = TypeVar("_T")
_S = TypeVar("_S")
_OLDER: Final[dict[type, tuple[str, type, Callable[[Any], Any]]]] = {}
_SMALLEST: Final = -(2**63)
_LARGEST: Final = 2**63 - 1
# Kinds of files that users have at hand, by keys that no other kind has.
_OURS: Final = {
    "a policy file, which goes with --policy": {"policy", "memory_budget_bytes"},
    "a machine, which goes with --profile": {"levels", "accelerator"},
    "a run.json, whose folder hrm validate takes": {"outcome", "versions"},
    "a model's config.json, which goes with --model": {"architectures", "model_type"},
}
_WORDS: Final = {
    str: "a text",
    bool: "true or false",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
    NoneType: "null",
}


def decode_strictly(plain: Any, kind: type[_T], file: str, *, other_keys: bool = False, remedy: str = "") -> _T:
    """What was read from a YAML or JSON `file` as a dataclass.

    Raises ProfileError naming the file and field if a key is unknown or missing, a value has
    another type, or the dataclass refuses it. With `other_keys`, keys that are no fields are passed
    over, for files of which only a part is read. Another kind of file of ours is told as what it is.
    A `remedy` is for all mistakes of which is not known what was meant.
    """
    if not other_keys and (words := file_kind(plain, {item.name for item in fields(cast("Any", kind))})):
        rule = f"must be a file with {', '.join(item.name for item in fields(cast('Any', kind)))}"
        raise ProfileError(file, f"<{words}>", rule, "name another file")
    return _Reader(file, other_keys, remedy).read(plain, kind, "")


def file_kind(plain: object, but_with: Collection[str] = ()) -> str | None:
    """What kind of file of ours this was read from, in words; None if it is none that has not these keys."""
    if not isinstance(plain, dict):
        return None
    return next((words for words, keys in _OURS.items() if keys <= plain.keys() and not keys <= {*but_with}), None)


def also_read(kind: type[_T], older: type[_S], key: str, convert: Callable[[_S], _T]) -> None:
    """Have `kind` be read from older files too, which tell it by another dataclass, with that key."""
    _OLDER[kind] = (key, older, convert)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Turns plain values into what type hints say; `path` is where in the file a value stands."""

    file: str
    other_keys: bool
    remedy: str

    def read(self, plain: Any, kind: Any, path: str) -> Any:
        """The value as `kind`; ProfileError if it is none."""
        if kind is Any:
            return plain
        origin, arguments = get_origin(kind) or kind, get_args(kind)
        if origin is UnionType:
            (inner,) = (choice for choice in arguments if choice is not NoneType)
            return None if plain is None else self.read(plain, inner, path)
        if _is_enum(kind):
            return self._member(plain, kind, path)
        if origin is Literal:
            return self._choice(plain, {value: value for value in arguments}, path)
        if origin in {int, float}:
            return self._number(plain, kind, path)
        if is_dataclass(origin):
            return self._dataclass(plain, kind, path)
        if variants := getattr(kind, "variants", None):
            return self._variant(plain, variants, path)
        self._check_type(plain, list if origin is tuple else origin, path)
        if origin is dict:
            return self._mapping(plain, arguments[1], path)
        if origin in {list, tuple}:
            return self._items(plain, origin, arguments, path)
        return plain

    def _refusal(
        self, path: str, value: Any, rule: str, otherwise: str, *, word: str = "", known: Iterable[str] = ()
    ) -> ProfileError:
        """The mistake; the remedy is the known word that was meant, what goes with the file, or `otherwise`."""
        remedy = meant(word, known, self.remedy or otherwise)
        shown = "<a mapping>" if isinstance(value, dict) else value
        if not path:
            shown = f"<{'no mapping' if 'mapping' in rule else brief_value(shown)}>"
        return ProfileError(f"{self.file}: {path}" if path else self.file, shown, rule, remedy)

    def _check_type(self, plain: Any, kind: type, path: str) -> None:
        if type(plain) is not kind:
            raise self._refusal(path, plain, f"must be {_WORDS[kind]}", "correct the value")

    def _choice(self, plain: Any, choices: dict[Any, Any], path: str) -> Any:
        if isinstance(plain, str | int) and plain in choices:
            return choices[plain]
        known, word = [str(choice) for choice in choices], plain if isinstance(plain, str) else ""
        raise self._refusal(
            path, plain, f"must be one of {', '.join(known)}", "correct the value", word=word, known=known
        )

    def _member(self, plain: Any, kind: type[Enum], path: str) -> Enum:
        """The member of that value, which may be one that was added to those that are listed."""
        try:
            return kind(plain)
        except ValueError:
            return self._choice(plain, {member.value: member for member in kind}, path)

    def _number(self, plain: Any, kind: type[int] | type[float], path: str) -> int | float:
        is_integer = isinstance(plain, int) and not isinstance(plain, bool)
        if kind is float and (is_integer or isinstance(plain, float)):
            return float(plain)
        if not is_integer:
            rule = "must be an integer" if kind is int else "must be a number"
            raise self._refusal(path, plain, rule, "correct the value")
        if not _SMALLEST <= plain <= _LARGEST:
            raise self._refusal(path, plain, "must fit 64 bits", "correct the value")
        return plain

    def _mapping(self, plain: dict[Any, Any], kind: Any, path: str) -> dict[str, Any]:
        for key, value in plain.items():
            if not isinstance(key, str):
                raise self._refusal(
                    f"{path}.{key}", value, "must stand under a key that is a text", f'write it as "{key}"'
                )
        return {key: self.read(value, kind, f"{path}.{key}") for key, value in plain.items()}

    def _items(self, plain: list[Any], origin: type, kinds: tuple[Any, ...], path: str) -> Any:
        if origin is tuple and kinds[-1] is not Ellipsis:
            if len(plain) != len(kinds):
                raise self._refusal(path, plain, f"must be a list of {len(kinds)} values", "correct the value")
        else:
            kinds = (kinds[0],) * len(plain)
        values = [
            self.read(item, kind, f"{path}[{_label(item, index)}]")
            for index, (item, kind) in enumerate(zip(plain, kinds, strict=True))
        ]
        return tuple(values) if origin is tuple else values

    def _variant(self, plain: Any, variants: dict[str, type], path: str) -> Any:
        """One of several dataclasses, which the key `block` tells."""
        if not isinstance(plain, dict):
            raise self._refusal(path, plain, "must be a mapping with block", "correct the value")
        name = cast("dict[Any, Any]", plain).get("block", "<missing>")
        return self.read(plain, self._choice(name, variants, _under(path, "block")), path)

    def _dataclass(self, plain: Any, kind: type, path: str) -> Any:
        if not isinstance(plain, dict):
            raise self._refusal(
                path,
                plain,
                f"must be a mapping with {', '.join(f.name for f in fields(kind))}",
                "see the files that come with hrm",
            )
        given = cast("dict[Any, Any]", plain)
        key, form, convert = _OLDER.get(kind, ("", kind, None))
        if key not in given:
            form, convert = kind, None
        hints = _hints(form)
        self._check_fields(given, form, path)
        values = {key: self.read(value, hints[key], _under(path, key)) for key, value in given.items() if key in hints}
        try:
            value = form(**values)
            return convert(value) if convert else value
        except HrmError as error:
            raise self._located(error, given, path) from error

    def _check_fields(self, plain: dict[Any, Any], kind: type, path: str) -> None:
        known = {item.name: item for item in fields(kind)}
        retired: frozenset[str] = getattr(kind, "RETIRED", frozenset())
        all_known = f"{kind.__name__} ({', '.join(known)})"
        for key, value in plain.items():
            if key not in known and key not in retired and not self.other_keys:
                raise self._refusal(
                    _under(path, key),
                    value,
                    f"is no field of {all_known}",
                    "remove or correct it",
                    word=str(key),
                    known=known,
                )
        for name, item in known.items():
            required = item.default is MISSING and item.default_factory is MISSING
            if required and name not in plain:
                raise self._refusal(
                    _under(path, name), "<missing>", "must be given", "add it as in the files that come with hrm"
                )

    def _located(self, error: HrmError, plain: Mapping[Any, Any], path: str) -> ProfileError:
        """The same error at its place in the file instead of under the name of what is there."""
        where, name = error.where, plain.get("name")
        if isinstance(name, str) and name and where.startswith(name):
            where = where.removeprefix(name).lstrip(".: ")
        where = where.removeprefix(f"{path.rpartition('.')[2]}: ")  # which a policy says of itself
        at = f"{self.file}: {_under(path, where)}" if where or path else self.file
        return ProfileError(at, error.value, error.rule, self.remedy or error.remedy)


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _label(item: Any, index: int) -> Any:
    """What an item of a list is called in a path: its name, if it has one, or its index."""
    name = cast("dict[Any, Any]", item).get("name") if isinstance(item, dict) else None
    return name if isinstance(name, str) else index


def _under(path: str, key: Any) -> str:
    return f"{path}.{key}" if path and key else f"{path}{key}"
