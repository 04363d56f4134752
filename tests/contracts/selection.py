"""Of many cases that test the same, those that every run of the suite has; `--full` runs the others as well."""

from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from itertools import combinations
from typing import Any, TypeVar

import pytest

Case = TypeVar("Case")


def chosen(cases: Iterable[Any], at: Collection[int]) -> list[Any]:
    """All cases as parameters, those at other places than these marked `full`; tuples are of several parameters."""
    found = [case if isinstance(case, tuple) else (case,) for case in cases]
    assert max(at) < len(found), "a place that no case has"
    return [pytest.param(*case, marks=() if place in at else pytest.mark.full) for place, case in enumerate(found)]


def covering(cases: Sequence[Case], facts: Callable[[Case], Iterable[Hashable]]) -> list[int]:
    """The places of few cases in which every fact of any case is found; always the same ones.

    The one with the most new facts comes first, and of as many the first. With `pairs` as facts, any two values that
    meet in a case meet in one of these.
    """
    facts_of = [set(facts(case)) for case in cases]
    left, found = set[Hashable]().union(*facts_of), list[int]()
    while left:
        found.append(max(range(len(cases)), key=lambda place: len(facts_of[place] & left)))
        left -= facts_of[found[-1]]
    return sorted(found)


def pairs(values: Iterable[tuple[str, object]]) -> set[tuple[tuple[str, object], ...]]:
    """Any two of a case's values, each with the name of what it is of."""
    return set(combinations(sorted(values, key=repr), 2))
