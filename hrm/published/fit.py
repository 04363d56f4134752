"""The fitted figures of a machine, found again from the cells that they were fitted on."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Final, TypeVar, cast

from hrm.hardware import Figure, HardwareProfile, Link, MemoryLevel, Source
from hrm.machines import load_profile
from hrm.published.compare import closed_form, machine_name
from hrm.published.data import TABLE_4

FITTED_SETUPS: Final = ("S1", "S2")
START_FACTOR: Final = 0.7  # so that what is found owes nothing to what is shipped
FACTORS: Final = (0.4, 1.28)  # of what is shipped; more is above the data sheet of a link

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedFigure:
    """A fitted figure: its machine, where it stands there, what is shipped, and what a new fit finds."""

    machine: str
    where: str
    shipped: float
    found: float
    note: str


def fitted_figures(profile: HardwareProfile) -> dict[str, Figure]:
    """Every figure of a machine that was fitted, by where it stands."""
    found: dict[str, Figure] = {}

    def record(where: str, figure: Figure) -> Figure:
        if figure.source is Source.FITTED:
            found[where] = figure
        return figure

    _map_figures(profile, "", record)
    return found


def scaled(profile: HardwareProfile, factors: dict[str, float]) -> HardwareProfile:
    """The machine with figures, by where they stand, times a factor; curves keep their shape."""

    def scale(where: str, figure: Figure) -> Figure:
        factor = factors.get(where, 1.0)
        curve = tuple((size, value * factor) for size, value in figure.curve)
        return replace(figure, value=figure.value * factor, curve=curve)

    return _map_figures(profile, "", scale)


def fit(setup: str) -> list[FittedFigure]:
    """Fit a machine's fitted figures again, together, on all cells of Table 4 of that setup.

    Least squares over the logarithms of predicted over measured throughput, in closed form.
    """
    from scipy.optimize import least_squares

    profile = load_profile(machine_name(setup))
    cells = [run for run in TABLE_4 if run.setup == setup]
    figures = fitted_figures(profile)

    def log_errors(log_factors: Any) -> list[float]:
        factors = dict(zip(figures, map(math.exp, log_factors), strict=True))
        machine = scaled(profile, factors)
        predicted = [closed_form(run, machine).tokens_per_s for run in cells]
        return [math.log(p / run.tokens_per_s) for p, run in zip(predicted, cells, strict=True)]

    least, most = (math.log(factor) for factor in FACTORS)
    solution = least_squares(
        log_errors, [math.log(START_FACTOR)] * len(figures), bounds=(least, most), diff_step=[1e-4] * len(figures)
    )
    return [
        FittedFigure(
            machine=machine_name(setup),
            where=where,
            shipped=figure.value,
            found=figure.value * math.exp(log_factor),
            note=figure.note,
        )
        for (where, figure), log_factor in zip(figures.items(), solution.x, strict=True)
    ]


def _map_figures(node: _T, where: str, change: Callable[[str, Figure], Figure]) -> _T:
    """The same data with every figure changed; `where` leads to it, fields joined by dots."""
    mapped: Any = node
    match node:
        case Figure():
            mapped = change(where.removesuffix(".achieved"), node)
        case dict():
            items = cast("dict[str, Any]", node).items()
            mapped = {key: _map_figures(value, f"{where}.{key}", change) for key, value in items}
        case tuple():
            parts = cast("tuple[Any, ...]", node)
            mapped = tuple(_map_figures(part, _name(part), change) for part in parts)
        case _ if is_dataclass(node) and not isinstance(node, type):
            changed = {
                item.name: _map_figures(getattr(node, item.name), f"{where}.{item.name}", change)
                for item in fields(node)
            }
            mapped = replace(node, **changed)
        case _:
            pass
    return mapped


def _name(part: object) -> str:
    match part:
        case MemoryLevel():
            return part.name
        case Link():
            return f"{part.source}->{part.target} {part.kind}"
        case _:
            return type(part).__name__.lower()
