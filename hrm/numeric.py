"""Arithmetic for one policy (plain numbers) and for a whole grid of them (NumPy arrays)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeVar, Union, overload

if TYPE_CHECKING:
    from numpy.typing import NDArray

# A plain number, or a NumPy array with one entry for every policy of a grid.
Number = Union[float, "NDArray[Any]"]
N = TypeVar("N", int, float, "NDArray[Any]")  # one of them, and the same again


@dataclass(frozen=True, slots=True)
class Spread:
    """Median of `n` samples with their 20th and 80th percentile; all zeros if there are none."""

    n: int = 0
    median: float = 0.0
    p20: float = 0.0
    p80: float = 0.0

    @staticmethod
    def of(samples: Iterable[float]) -> "Spread":
        """Percentiles lie between samples, in proportion."""
        ordered = sorted(samples)

        def at(share: float) -> float:
            position = share * (len(ordered) - 1)
            low = int(position)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (position - low) * (ordered[high] - ordered[low])

        if not ordered:
            return Spread()
        return Spread(len(ordered), at(0.5), at(0.2), at(0.8))


@overload
def maximum(*values: int) -> int: ...


@overload
def maximum(*values: float) -> float: ...


@overload
def maximum(*values: Number) -> Number: ...


def maximum(*values: Number) -> Number:
    """Elementwise maximum; stays a plain number, without NumPy, if all arguments are."""
    for value in values:  # `all` takes twice as long
        if not isinstance(value, (int, float)):
            break
    else:
        return max(values)
    import numpy as np

    return reduce(np.maximum, values)


@overload
def minimum(*values: int) -> int: ...


@overload
def minimum(*values: float) -> float: ...


@overload
def minimum(*values: Number) -> Number: ...


def minimum(*values: Number) -> Number:
    """Elementwise minimum; stays a plain number, without NumPy, if all arguments are."""
    for value in values:  # `all` takes twice as long
        if not isinstance(value, (int, float)):
            break
    else:
        return min(values)
    import numpy as np

    return reduce(np.minimum, values)


def power(base: float, exponent: Number) -> Number:
    """`base` raised elementwise; NumPy's own takes twenty times as long where the result is next to nothing."""
    if isinstance(exponent, (int, float)) or base <= 0:
        return base**exponent
    import numpy as np

    return np.exp(math.log(base) * exponent)


def where(condition: Number, if_true: Number, if_false: Number) -> Number:
    """Elementwise choice; `condition` is 0 or 1."""
    if isinstance(condition, (bool, int)):
        return if_true if condition else if_false
    return condition * if_true + (1 - condition) * if_false


def is_zero(value: Number) -> bool:
    """Whether a number is 0, or all of an array."""
    if isinstance(value, (int, float)):
        return value == 0
    return not (value.size and value.flat[0]) and not value.any()  # mostly the first says it
