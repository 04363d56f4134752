"""A `config.json` and its keys, each of the type that is asked for or refused by file and key."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

from hrm.decoding import read_json_object
from hrm.errors import ModelError
from hrm.model_spec.spec import LARGEST_SIZE

CHECK: Final = "check the config.json"


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; ModelError if it is none."""
    return read_json_object(path, "a readable JSON file", ModelError, remedy="download the config again")


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of a JSON object, which `where` names in messages; null mostly means missing."""

    values: dict[str, Any]
    where: str

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

    def integer(self, *keys: str, default: int | None = None, at_least: int = 1) -> int:
        """The integer under the keys, which are names of one thing; ModelError if they disagree."""
        given = [key for key in keys if self.get(key) is not None]
        if not given and default is not None:
            return default
        key = given[0] if given else keys[0]
        value = self.get(key)
        holds = isinstance(value, int) and not isinstance(value, bool)
        if not holds or not at_least <= value <= LARGEST_SIZE:
            kind = "a positive integer" if at_least == 1 else f"an integer of at least {at_least}"
            raise self.refusal(key, f"must be {kind}, at most {LARGEST_SIZE:,}")
        for other in given[1:]:
            if self.get(other) != value:
                raise self.refusal(other, f"must be as {key}, {value}: both mean the same")
        return value

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
        return Keys(cast("dict[str, Any]", section), f"{self.where}: {key}")

    def with_defaults(self, **defaults: Any) -> "Keys":
        """The same, with these values of keys that are missing, not of those that are null."""
        return replace(self, values={**defaults, **self.values})

    def within(self, outer: "Keys", *keys: str) -> "Keys":
        """The same, with the outer object's values of those keys that are missing or null here."""
        inherited = {key: outer.get(key) for key in keys if self.get(key) is None}
        return replace(self, values={**self.values, **inherited})
