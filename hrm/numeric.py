"""Arithmetic for one policy (plain numbers) and for a whole grid of them (NumPy arrays)."""

from typing import Any

# A plain number, or a NumPy array with one entry for every policy of a grid.
Number = Any


def maximum(*values: Number) -> Number:
    """Elementwise maximum; stays a plain number, without NumPy, if all arguments are."""
    if all(isinstance(value, (int, float)) for value in values):
        return max(values)
    import numpy as np

    result: Number = values[0]
    for value in values[1:]:
        result = np.maximum(result, value)
    return result


def where(condition: Number, if_true: Number, if_false: Number) -> Number:
    """Elementwise choice; `condition` is 0 or 1."""
    if isinstance(condition, (bool, int)):
        return if_true if condition else if_false
    return condition * if_true + (1 - condition) * if_false
