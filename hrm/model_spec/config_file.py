"""A `config.json` and its keys, each of the type that is asked for or refused by file and key.

Both packages read configs through `Keys`: `hrm` the sizes that a plan needs, the executor also what
only running needs.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

from hrm.decoding import read_json_object
from hrm.errors import ModelError
from hrm.layers import LARGEST_SIZE

CHECK: Final = "check the config.json"


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ModelError if it is none."""
    return read_json_object(path, "a readable JSON file", ModelError, remedy="download the config again")


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of a JSON object; null mostly means missing.

    Messages name the `file` and, of an object inside of another, the `path` of keys to it.
    """

    values: dict[str, Any]
    file: str
    path: str = ""

    @property
    def where(self) -> str:
        """The file, and the path of keys within it."""
        return f"{self.file}: {self.path}" if self.path else self.file

    def get(self, key: str) -> Any:
        """What is under the key; None if it is missing."""
        return self.values.get(key)

    def is_null(self, key: str) -> bool:
        """Whether the key is there without a value."""
        return key in self.values and self.values[key] is None

    def refusal(self, key: str, rule: str, remedy: str = CHECK) -> ModelError:
        """The error that says what is wrong with a key's value."""
        value = self.get(key)
        shown = "<missing>" if value is None else value
        return ModelError(f"{self.where}: {key}", shown, rule, remedy)

    def integer(self, *keys: str, default: int | None = None, at_least: int = 1, at_most: int = LARGEST_SIZE) -> int:
        """The integer under the keys, which are names of one thing; ModelError if they disagree."""
        given = [key for key in keys if self.get(key) is not None]
        if not given and default is not None:
            return default
        key = given[0] if given else keys[0]
        value = self.get(key)
        holds = isinstance(value, int) and not isinstance(value, bool)
        if not holds or not at_least <= value <= at_most:
            kind = "a positive integer" if at_least == 1 else f"an integer of at least {at_least}"
            raise self.refusal(key, f"must be {kind}, at most {at_most:,}")
        for other in given[1:]:
            if self.get(other) != value:
                raise self.refusal(other, f"must be as {key}, {value}: both mean the same")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        """The positive number under the key; the default if it is missing and there is one."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
            raise self.refusal(key, "must be a positive number")
        return float(value)

    def word(self, key: str, choices: tuple[str, ...], *, default: str | None = None) -> str:
        """The word under the key, one of the choices; the default if it is missing."""
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, str) or value not in choices:
            raise self.refusal(key, f"must be {' or '.join(choices)}", "use a model of a supported architecture")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """The token ids under the key: none, one or a list of them."""
        value = self.get(key)
        ids = cast("list[Any]", value if isinstance(value, list) else [] if value is None else [value])
        if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
            remedy = "correct it in config.json or generation_config.json"
            raise self.refusal(key, "must be a token id or a list of them", remedy)
        return tuple(ids)

    def truth(self, key: str, *, default: bool = False) -> bool:
        """The truth value under the key."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refusal(key, "must be true or false")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """The list of integers under the key; empty if it is missing."""
        items = self._list(key)
        if any(isinstance(item, bool) or not isinstance(item, int) for item in items):
            raise self.refusal(key, "must be a list of integers")
        return tuple(items)

    def numbers(self, key: str) -> tuple[float, ...]:
        """The list of positive numbers under the key; empty if it is missing."""
        items = self._list(key)
        if any(isinstance(x, bool) or not isinstance(x, int | float) or not 0 < x < LARGEST_SIZE for x in items):
            raise self.refusal(key, "must be a list of positive numbers")
        return tuple(map(float, items))

    def words(self, key: str, choices: tuple[str, ...]) -> tuple[str, ...]:
        """The list of words under the key, each one of the choices; empty if it is missing."""
        items = self._list(key)
        if any(not isinstance(item, str) or item not in choices for item in items):
            raise self.refusal(key, f"must be a list of {', '.join(choices)}")
        return tuple(items)

    def _list(self, key: str) -> list[Any]:
        value = self.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.refusal(key, "must be a list")
        return cast("list[Any]", value)

    def section(self, key: str) -> "Keys":
        """The keys of the object under the key."""
        section = self.get(key)
        if not isinstance(section, dict):
            raise self.refusal(key, "must be an object with the model's sizes")
        path = f"{self.path}: {key}" if self.path else key
        return Keys(cast("dict[str, Any]", section), self.file, path)

    def with_defaults(self, **defaults: Any) -> "Keys":
        """The same, with these values of keys that are missing, not of those that are null."""
        return replace(self, values={**defaults, **self.values})

    def within(self, outer: "Keys", *keys: str) -> "Keys":
        """The same, with the outer object's values of those keys that are missing or null here."""
        inherited = {key: outer.get(key) for key in keys if self.get(key) is None}
        return replace(self, values={**self.values, **inherited})
