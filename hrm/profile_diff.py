"""What differs between two profiles, and whether by more than their measurements spread.

A spread holds the next run's value in three of five cases (`hrm.profiling.passes`). Both spreads
are estimates of how far two runs lie apart, so they are pooled, as the variances of two samples are
in a t-test; two figures differ if they lie further apart than 19 of 20 pairs of runs would on a
machine that has not changed. What a noisy figure tells apart is little, and is named.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from typing import Any, Final, cast

from hrm.hardware import Figure, HardwareProfile, Link

NINETEEN_OF_TWENTY: Final = 2.45
"""How far apart so many pairs of runs lie at most, in pooled half-widths of the spread.

1.96 / 0.84 would do for normal deviates of a known width, but widths are estimates of few passes;
found by drawing runs of three passes and more, and checked by the tests.
"""

NEVER_THE_SAME = frozenset({"date", "command", "seconds", "others", "resumed", "warnings"})


class Verdict(StrEnum):
    """How a difference compares with the spreads of the two figures."""

    WITHIN = "within the spread"
    BEYOND = "beyond the spread"
    UNKNOWN = "no spread recorded"


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureDiff:
    """One figure in both profiles; `name` is its path, `cpu.read_bytes_per_s.achieved`."""

    name: str
    first: Figure
    second: Figure

    @property
    def change(self) -> float:
        """By what share the second is above the first; infinite above nothing."""
        if self.first.value == self.second.value:
            return 0.0
        if self.first.value == 0:
            return math.inf
        return self.second.value / self.first.value - 1

    @property
    def curve_change(self) -> tuple[float, float]:
        """Size at which the two curves differ most, and by what share; (0, 0) without curves."""
        first, second = dict(self.first.curve), dict(self.second.curve)
        changes = [(size, second[size] / value - 1) for size, value in first.items() if size in second]
        return max(changes, key=lambda pair: abs(pair[1]), default=(0.0, 0.0))

    @property
    def is_noisy(self) -> bool:
        """Whether one of them spreads so far that their agreement says little."""
        return self.first.is_noisy or self.second.is_noisy

    @property
    def apart(self) -> float | None:
        """How far apart nineteen of twenty pairs of runs on an unchanged machine lie at most.

        In the figure's unit; None if neither has a spread. Of each spread, the side towards the
        other figure counts; one figure without a spread is taken as exact.
        """
        low, high = sorted((self.first, self.second), key=lambda figure: figure.value)
        if low.p80 is None and high.p20 is None:
            return None
        above = 0.0 if low.p80 is None else max(low.p80 - low.value, 0.0)
        below = 0.0 if high.p20 is None else max(high.value - high.p20, 0.0)
        return NINETEEN_OF_TWENTY * math.sqrt((above**2 + below**2) / 2)

    def tells(self, change: float) -> bool:
        """Whether a change of the first by that share would be told from noise."""
        return self.apart is not None and self.apart < change * self.first.value

    @property
    def verdict(self) -> Verdict:
        """Whether they lie further apart than two runs on an unchanged machine would."""
        if self.apart is None:
            return Verdict.UNKNOWN
        distance = abs(self.second.value - self.first.value)
        return Verdict.WITHIN if distance <= self.apart else Verdict.BEYOND


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileDiff:
    """Everything that differs.

    `figures` are those that both profiles have, `only_first` and `only_second` name the others,
    and `environment` holds lines of the environment that differ, but for those of the run itself.
    """

    figures: tuple[FigureDiff, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    environment: Mapping[str, tuple[str, str]]

    @property
    def different(self) -> list[FigureDiff]:
        """Figures that are not equal, the largest change first."""
        unequal = [figure for figure in self.figures if figure.change or figure.curve_change[1]]
        return sorted(unequal, key=lambda figure: -abs(figure.change))

    def count(self, verdict: Verdict) -> int:
        """How many of the figures that are not equal have this verdict."""
        return sum(figure.verdict is verdict for figure in self.different)

    @property
    def judged(self) -> list[FigureDiff]:
        """Figures of which at least one has a spread."""
        return [figure for figure in self.figures if figure.apart is not None]

    def told(self, change: float) -> int:
        """In how many figures a change by that share would be told from noise."""
        return sum(figure.tells(change) for figure in self.figures)


def diff_profiles(first: HardwareProfile, second: HardwareProfile) -> ProfileDiff:
    """Compare two profiles figure by figure."""
    one, other = figures_of(first), figures_of(second)
    keys = {**first.environment, **second.environment}
    lines = {
        key: (first.environment.get(key, "–"), second.environment.get(key, "–"))
        for key in keys
        if key not in NEVER_THE_SAME
    }
    return ProfileDiff(
        figures=tuple(
            FigureDiff(name=name, first=figure, second=other[name]) for name, figure in one.items() if name in other
        ),
        only_first=tuple(name for name in one if name not in other),
        only_second=tuple(name for name in other if name not in one),
        environment={key: pair for key, pair in lines.items() if pair[0] != pair[1]},
    )


def figures_of(node: object, path: str = "") -> dict[str, Figure]:
    """Every figure of a profile or a part of it by its path, in the profile's order."""
    if isinstance(node, Figure):
        return {path: node}
    found: dict[str, Figure] = {}
    for name, value in _parts(node):
        found |= figures_of(value, f"{path}.{name}" if path else name)
    return found


def _parts(node: object) -> list[tuple[str, object]]:
    """What a part of a profile consists of, by name; levels and links are told by theirs."""
    if isinstance(node, dict):
        pairs = cast("dict[Any, object]", node)
        return [(str(key), value) for key, value in pairs.items()]
    if isinstance(node, tuple):
        items = cast("tuple[object, ...]", node)
        return [(_label(item, index), item) for index, item in enumerate(items)]
    if is_dataclass(node) and not isinstance(node, type):
        named = {item.name: getattr(node, item.name) for item in fields(node)}
        if isinstance(node, HardwareProfile):  # short paths: `cpu.read_bytes_per_s`
            del named["levels"], named["links"], named["gpus"]
            gpus = [(f"gpu{index}", card) for index, card in enumerate(node.gpus)]
            return [*_parts(node.levels), *_parts(node.links), *gpus, *named.items()]
        return list(named.items())
    return []


def _label(item: object, index: int) -> str:
    match item:
        case Link():
            return f"{item.source}->{item.target} {item.kind}"
        case _:
            return str(getattr(item, "name", index))
