"""Figures of hardware: one number or rate with where it came from, and what it may not be."""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import StrEnum
from functools import lru_cache
from operator import itemgetter
from typing import Any, Final, TypeVar, cast, overload

from hrm.errors import ProfileError
from hrm.numeric import Number
from hrm.units import LARGEST

NOISY_SPREAD: Final = 0.08

_T = TypeVar("_T")


class Source(StrEnum):
    """Where a figure came from."""

    DATASHEET = "datasheet"
    MEASURED = "measured"
    FITTED = "fitted"
    DERIVED = "derived"
    ASSUMED = "assumed"
    GIVEN = "given"  # by the user, on the command line


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number in SI units with its provenance.

    `curve` holds `(size, value)` points where the number depends on a size (bytes of a transfer,
    tokens of a GEMM); `value` is then its plateau. `p20` and `p80` are the 20th and the 80th
    percentile of the samples, or further apart where passes of the measurement differ by more: in
    three of five cases, the value of the next run is expected between them. Of what shares with others, `unshared` is
    what it would have without them.
    """

    value: float
    source: Source
    note: str = ""
    curve: tuple[tuple[float, float], ...] = ()
    samples: int = 0
    p20: float | None = None
    p80: float | None = None
    unshared: float | None = None

    @property
    def spread(self) -> float:
        """Distance from the 20th to the 80th percentile as a share of the value; 0 if unknown."""
        if self.p20 is None or self.p80 is None or self.value <= 0:
            return 0.0
        return (self.p80 - self.p20) / self.value

    @property
    def is_noisy(self) -> bool:
        """Whether it spreads too far to be trusted."""
        return self.spread > NOISY_SPREAD

    def times(self, factor: float, *, note: str = "", source: Source | None = None, size_factor: float = 1) -> "Figure":
        """`factor` times as much, all along the curve, whose sizes are multiplied by `size_factor`.

        `note` is added to the figure's own, and where `source` is given, the product is from there.
        """
        return replace(
            self,
            value=self.value * factor,
            source=source or self.source,
            note="; ".join(filter(None, (self.note, note))),
            curve=tuple((size * size_factor, value * factor) for size, value in self.curve),
            p20=None if self.p20 is None else self.p20 * factor,
            p80=None if self.p80 is None else self.p80 * factor,
            unshared=None if self.unshared is None else self.unshared * factor,
        )

    @overload
    def at(self, size: float | None = None) -> float: ...

    @overload
    def at(self, size: Number | None) -> Number: ...

    def at(self, size: Number | None = None) -> Number:
        """Value at `size`, interpolated over log(size) and flat beyond the ends of the curve.

        `size` may be a NumPy array; the result then is one.
        """
        if size is None or not self.curve:
            return self.value
        if not isinstance(size, (int, float)):
            return _interpolator(self.curve)(size)
        right = bisect_left(self.curve, size, key=itemgetter(0))
        if right == 0:
            return self.curve[0][1]
        if right == len(self.curve):
            return self.curve[-1][1]
        (size_0, value_0), (size_1, value_1) = self.curve[right - 1], self.curve[right]
        share = math.log(size / size_0) / math.log(size_1 / size_0)
        return value_0 + share * (value_1 - value_0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """A bandwidth or compute rate three ways: on paper, at its best, and in work like ours."""

    datasheet: Figure | None = None
    ceiling: Figure | None = None
    achieved: Figure | None = None

    @property
    def planned(self) -> Figure:
        """The figure that plans are made with: achieved, else the ceiling, else the data sheet."""
        figure = self.achieved or self.ceiling or self.datasheet
        assert figure is not None, "validated when the profile is loaded"
        return figure

    @overload
    def at(self, size: float | None = None) -> float: ...

    @overload
    def at(self, size: Number | None) -> Number: ...

    def at(self, size: Number | None = None) -> Number:
        """Planned value at `size`."""
        return self.planned.at(size)

    def each(self, change: Callable[[Figure], Figure]) -> "Rate":
        """The rate with each of its figures changed."""
        return with_figures(self, lambda _, figure: change(figure))


@lru_cache(maxsize=256)
def _interpolator(curve: tuple[tuple[float, float], ...]) -> Callable[[Number], Number]:
    """Values of a curve at arrays of sizes."""
    import numpy as np

    log_sizes, values = np.log([size for size, _ in curve]), np.array([value for _, value in curve])

    @np.errstate(divide="ignore")  # of nothing at all, which takes the curve's first value
    def values_at(sizes: Number) -> Number:
        return np.interp(np.log(sizes), log_sizes, values)

    return values_at


def with_figures(node: _T, change: Callable[[str, Figure], Figure], where: str = "") -> _T:
    """The same data with every figure changed; `change` is told where it stands, fields joined by dots."""
    changed: Any = node
    match node:
        case Figure():
            changed = change(where, node)
        case dict():
            items = cast("dict[str, Any]", node).items()
            changed = {key: with_figures(part, change, f"{where}.{key}") for key, part in items}
        case tuple():
            parts = enumerate(cast("tuple[Any, ...]", node))
            changed = tuple(with_figures(part, change, f"{where}[{index}]") for index, part in parts)
        case _ if is_dataclass(node) and not isinstance(node, type):
            named = {item.name: getattr(node, item.name) for item in fields(node)}
            changed = replace(
                node, **{name: with_figures(part, change, f"{where}.{name}") for name, part in named.items()}
            )
        case _:
            pass
    return changed


def check_figure(where: str, figure: Figure) -> None:
    """Reject a number that no hardware can have (ProfileError naming `where`)."""
    may_be_zero = where.endswith(("_s", "reserve_bytes")) and not where.endswith("per_s")
    spread = [value for value in (figure.p20, figure.p80) if value is not None]
    values = [figure.value, *spread, *(value for _, value in figure.curve)]
    impossible = [value for value in values if not 0 <= value <= LARGEST or (value == 0 and not may_be_zero)]
    if impossible:
        raise ProfileError(
            where, impossible[0], f"must be positive and at most {LARGEST:.0e}", "measure it again or correct it"
        )
    if len(spread) == 2 and spread[0] > spread[1]:
        raise ProfileError(
            f"{where}.p20", spread[0], f"must not be above p80, {spread[1]:.4g}", "exchange them or measure it again"
        )
    sizes = [size for size, _ in figure.curve]
    if any(size <= 0 for size in sizes) or sizes != sorted(set(sizes)):
        raise ProfileError(f"{where}.curve", sizes, "sizes must be positive and ascending", "sort the points")


def check_rate(where: str, rate: Rate) -> None:
    """Reject a rate without a figure, or with one above its data sheet (ProfileError)."""
    named = {name: getattr(rate, name) for name in ("datasheet", "ceiling", "achieved")}
    known = {name: figure for name, figure in named.items() if figure is not None}
    if not known:
        raise ProfileError(where, "<no figure>", "needs a datasheet, ceiling or achieved figure", "add one of them")
    for name, figure in known.items():
        check_figure(f"{where}.{name}", figure)
    datasheet = known.pop("datasheet", None)
    for name, figure in known.items():
        low_end = figure.p20 if figure.p20 is not None else figure.value
        if datasheet and min(low_end, figure.value) > 1.05 * datasheet.value:
            raise ProfileError(
                f"{where}.{name}",
                figure.value,
                f"is above the data sheet's {datasheet.value:.4g} by more than its spread",
                "check the data sheet's figure or measure again",
            )
