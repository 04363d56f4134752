"""What several passes found, as one: medians, and spreads that say how far another run may be off.

Samples of one moment agree with one another better than with those of a minute later, when
neighbours, clocks and the placement of memory and threads have changed. So everything is measured
in several passes, each with buffers of its own, and what the passes differ by is in the spread.

Nor do passes tell as much of the next run as independent draws would: machines change within
seconds and within minutes alike (1/f noise), so the medians of two runs differ about as much as two
passes do, however many passes there are. Spreads are as wide as that takes.
"""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from math import exp, log
from statistics import median
from typing import Any, Final, TypeVar, cast

from hrm.figures import with_figures
from hrm.hardware import NOISY_SPREAD, Figure, Source
from hrm.profiling.timing import Latency, Timing, middle_and_ends, significant

T = TypeVar("T")

COVERED: Final = 0.6  # of other runs: as much as lies between the 20th and the 80th percentile

REACH: Final = {2: 4.37, 3: 2.49, 4: 1.89, 5: 1.74, 6: 1.62, 7: 1.48}
"""By number of passes, how far the next run's median is off in `COVERED` of the cases at most.

In halves of the distance from the 20th to the 80th percentile of the passes, as that withstands a
disturbed pass; found by drawing 1/f noise, and checked by the tests. Where passes are independent,
the next run is within reach more often, in 82 % of the cases with seven passes.
"""


def expected_span(values: Sequence[float]) -> tuple[float, float]:
    """Where the median of the next run's passes lies in three of five cases, given this run's.

    That is so on a machine that changes as much within a run as between two in a row. It is taken
    of the logarithms, as rates and times then have the same. With one pass it is that value.
    """
    if len(values) < 2:
        return values[0], values[0]
    if min(values) <= 0:
        middle, reach = _middle_and_reach(values)
        return max(0.0, middle - reach), middle + reach
    middle, reach = _middle_and_reach([log(value) for value in values])
    return exp(middle - reach), exp(middle + reach)


def _middle_and_reach(values: Sequence[float]) -> tuple[float, float]:
    middle, low, high = middle_and_ends(values)
    return middle, REACH[min(len(values), max(REACH))] * (high - low) / 2


def combine(found: Sequence[T]) -> T:
    """One result of those of several passes, which have the same structure.

    Figures and timings get the median of their values, latencies the 20th percentile. Their spread
    is that of samples within a pass or `expected_span`, whichever is wider on either side. Other
    numbers are medians; texts, and what has another structure in some passes, are those of one pass.
    """
    return cast("T", _combined(list(found)))


def _combined(found: list[Any]) -> Any:
    present = [one for one in found if one is not None]
    if len(present) <= len(found) // 2:
        return None
    first = present[0]
    match first:
        case Figure():
            return _figure(present)
        case Latency():
            return _latency(present)
        case Timing():
            return _timing(present)
        case str():
            return next((one for one in cast("list[str]", present) if one), "")
        case float():
            return median(present)
        case dict():
            common = [key for key in cast("dict[Any, Any]", first) if all(key in one for one in present)]
            return {key: _combined([one[key] for one in present]) for key in common}
        case tuple():
            same = [one for one in present if len(one) == len(cast("tuple[Any, ...]", first))]
            return tuple(_combined(list(parts)) for parts in zip(*same, strict=True))
        case _ if is_dataclass(first) and not isinstance(first, type):
            names = [item.name for item in fields(first)]
            parts = {name: _combined([getattr(one, name) for one in present]) for name in names}
            return replace(first, **parts)
        case _:
            return first


def _timing(found: Sequence[Timing]) -> Timing:
    value, low, high = _spread([(one.median_s, one.p20_s, one.p80_s) for one in found])
    return Timing(value, low, high, sum(one.samples for one in found))


def _latency(found: Sequence[Latency]) -> Latency:
    """That of the passes which were least disturbed: a fifth of them; no end is lower than what any found."""
    _, value, _ = middle_and_ends([one.median_s for one in found])
    _, low, high = _spread([(one.median_s, one.p20_s, one.p80_s) for one in found])
    low = max(low, min(one.p20_s for one in found))
    return Latency(value, min(low, value), max(high, value), sum(one.samples for one in found))


def _figure(found: Sequence[Figure]) -> Figure:
    """The figure in the middle, with the medians and the spread of all of them."""
    middle = sorted(found, key=lambda one: one.value)[len(found) // 2]
    if middle.source is not Source.MEASURED or middle.p20 is None or middle.p80 is None:
        return middle
    value, low, high = _spread(
        [
            (one.value, one.value if one.p20 is None else one.p20, one.value if one.p80 is None else one.p80)
            for one in found
        ]
    )
    curve, noisy = _curve([one.curve for one in found])
    note = f"noisy at {', '.join(f'{size:.4g}' for size in noisy)}" if noisy else ""
    return replace(
        middle,
        value=significant(value),
        note="; ".join(filter(None, (middle.note, note))),
        curve=curve,
        samples=sum(one.samples for one in found),
        p20=significant(low),
        p80=significant(high),
    )


def _spread(found: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Median of the values; the wider of the passes' spreads and of what they differ by."""
    value = median(value for value, _, _ in found)
    within = [(low / middle, high / middle) for middle, low, high in found if middle > 0]
    low, high = expected_span([value for value, _, _ in found])
    if within:
        low = min(low, value * median(low for low, _ in within))
        high = max(high, value * median(high for _, high in within))
    return value, min(low, value), max(high, value)


def _curve(curves: Sequence[tuple[tuple[float, float], ...]]) -> tuple[tuple[tuple[float, float], ...], list[float]]:
    """Medians of the points if most passes have a curve, and the sizes at which passes differ."""
    bent = [dict(curve) for curve in curves if curve]
    if len(bent) <= len(curves) // 2:
        return (), []
    points = {size: [curve[size] for curve in bent if size in curve] for size in sorted(bent[0])}
    noisy: list[float] = []
    for size, values in points.items():
        middle, low, high = middle_and_ends(values)
        if high - low > NOISY_SPREAD * middle:
            noisy.append(size)
    return tuple((size, significant(median(values))) for size, values in points.items()), noisy


def flag_noisy(node: T) -> T:
    """The same profile, or part of one, with notes that say which figures spread by over 8 %."""
    return with_figures(node, _flagged)


def _flagged(_: str, figure: Figure) -> Figure:
    if not figure.is_noisy:
        return figure
    noisy = f"noisy: {figure.spread:.0%} between the 20th and 80th percentile"
    return replace(figure, note="; ".join(filter(None, (figure.note, noisy))))
