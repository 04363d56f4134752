"""Names of schedules, which others may be added to."""

from enum import StrEnum
from typing import Final, cast

_ADDED: Final[set[str]] = set()


class ScheduleName(StrEnum):
    """The schedules; MoE-Lightning's Fig. 6 calls the first three baselines S2, S3 and S4.

    Names that were added to these are found too, but are not among those that are listed.
    """

    CGOPIPE = "cgopipe"
    FLEXGEN = "flexgen"
    FLEXGEN_C = "flexgen-c"
    FASTDECODE = "fastdecode"
    DEEPSPEED = "deepspeed"

    @classmethod
    def add(cls, name: str) -> "ScheduleName":
        """A name beside these, for a schedule of one's own; the same one if it was added before."""
        _ADDED.add(name)
        return cls(name)

    @classmethod
    def _missing_(cls, value: object) -> "ScheduleName | None":
        if not isinstance(value, str) or value not in _ADDED:
            return None
        made = str.__new__(cls, value)
        made._name_ = made._value_ = value
        return cast("ScheduleName", cls._value2member_map_.setdefault(value, made))
