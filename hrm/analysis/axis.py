"""What is swept: a resource of the machine, a whole piece of it, or a length of the workload."""

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final

from hrm.errors import HrmError, WorkloadError
from hrm.scaling import Resource, resource_value, scale, with_resource
from hrm.search import Space
from hrm.units import format_number


class Whole(StrEnum):
    """A piece of hardware, all of whose resources are multiplied by one factor."""

    CPU = "cpu"
    GPU = "gpu"
    LINK = "link"

    @property
    def resources(self) -> tuple[Resource, ...]:
        """The resources that belong to it."""
        return _RESOURCES[self]

    @property
    def column(self) -> str:
        """Its name in a table."""
        return f"{self.value}_factor"

    def read(self, text: str, where: str) -> float:
        """A factor; HrmError naming `where` if the text is no number."""
        try:
            return float(text)
        except ValueError:
            raise HrmError(where, text, "must be a factor", "write it like 1.5") from None

    def show(self, factor: float) -> str:
        """The factor as it is printed."""
        return f"{factor:.3g}" if factor < 1000 else format_number(factor)


_RESOURCES: Final = {
    Whole.CPU: (Resource.CPU_MEMORY, Resource.CPU_BANDWIDTH, Resource.CPU_FLOPS),
    Whole.GPU: (Resource.GPU_MEMORY, Resource.GPU_BANDWIDTH, Resource.GPU_FLOPS),
    Whole.LINK: (Resource.H2D_BANDWIDTH, Resource.D2H_BANDWIDTH),
}


class Length(StrEnum):
    """Numbers of a workload, in tokens."""

    PROMPT_LEN = "prompt-len"
    GEN_LEN = "gen-len"

    @property
    def column(self) -> str:
        """Its name in a table."""
        return self.value.replace("-", "_")

    def read(self, text: str, where: str) -> float:
        """A number of tokens, such as `512`; HrmError naming `where` for what is none."""
        # Its digits are counted first: of thousands of them Python makes no number.
        if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < 1:
            raise HrmError(where, text, "must be a positive number of tokens, below 10^9", "write it like 512")
        return float(text)

    def show(self, tokens: float) -> str:
        """The number as it is printed."""
        return format_number(tokens)


Swept = Resource | Whole | Length
SWEPT: Final[dict[str, Swept]] = {each.value: each for kind in (Resource, Whole, Length) for each in kind}


@dataclass(frozen=True, slots=True)
class Axis:
    """Something that is swept, and its values."""

    what: Swept
    points: tuple[float, ...]

    @staticmethod
    def between(what: Swept, low: float, high: float, count: int, *, logarithmic: bool = False) -> "Axis":
        """`count` values from `low` to `high`, evenly spaced, or evenly in the logarithm.

        Lengths and bytes are whole numbers; those that rounding makes equal are given once. Raises
        HrmError if the range is empty.
        """
        if not 0 < low < high < math.inf or count < 2:
            raise HrmError(
                what.value,
                f"<{what.show(low)} to {what.show(high)} in {count}>",
                "must be two or more points from a positive value to a greater one",
                "give the smaller one first",
            )
        shares = [index / (count - 1) for index in range(count)]
        if logarithmic:
            values = [low * (high / low) ** share for share in shares]
        else:
            values = [low + (high - low) * share for share in shares]
        if isinstance(what, Length) or (isinstance(what, Resource) and what.is_memory):
            values = dict.fromkeys(float(round(value)) for value in values)
        return Axis(what, tuple(values))

    @property
    def column(self) -> str:
        """Its name in a table: `h2d_bandwidth_bytes_per_s`, `cpu_factor`, `gen_len`."""
        return self.what.column

    def at(self, space: Space, value: float) -> Space:
        """The space with what is swept at a value; longer prompts keep the ratio of longest to mean.

        Raises HrmError naming what is swept for values that no machine or workload can have.
        """
        profile, workload = space.profile, space.workload
        match self.what:
            case Resource():
                return replace(space, profile=with_resource(profile, self.what, value, dtype=space.dtype))
            case Whole():
                for resource in self.what.resources:
                    profile = scale(profile, resource, value)
                return replace(space, profile=profile)
            case Length.PROMPT_LEN:
                longest = max(math.ceil(workload.max_prompt_len * value / workload.prompt_len), math.ceil(value))
                lengths: dict[str, Any] = {"prompt_len": value, "max_prompt_len": longest}
            case Length.GEN_LEN:
                lengths = {"gen_len": round(value)}
        try:
            return replace(space, workload=replace(workload, **lengths))
        except WorkloadError as error:
            rule = f"gives a workload of which a length {error.rule}"
            raise WorkloadError(self.what.value, f"<{self.what.show(value)}>", rule, "sweep less far") from error

    def now(self, space: Space) -> float:
        """The value that the space has as it is."""
        match self.what:
            case Resource():
                return resource_value(space.profile, self.what, dtype=space.dtype)
            case Whole():
                return 1.0
            case Length.PROMPT_LEN:
                return space.workload.prompt_len
            case Length.GEN_LEN:
                return float(space.workload.gen_len)
