"""The fitted figures of a machine, found again from the cells that they were fitted on."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from hrm.figures import with_figures
from hrm.hardware import Figure, HardwareProfile, Link, MemoryLevel, Source
from hrm.machines import load_profile
from hrm.published.compare import closed_form, machine_name
from hrm.published.data import TABLE_4

FITTED_SETUPS: Final = ("S1", "S2")
START_FACTOR: Final = 0.7  # so that what is found owes nothing to what is shipped
FACTORS: Final = (0.4, 1.28)  # of what is shipped; more is above the data sheet of a link

_Part = TypeVar("_Part", MemoryLevel, Link)


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

    _map_figures(profile, record)
    return found


def scaled(profile: HardwareProfile, factors: dict[str, float]) -> HardwareProfile:
    """The machine with figures, by where they stand, times a factor; curves keep their shape."""
    return _map_figures(profile, lambda where, figure: figure.times(factors.get(where, 1.0)))


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


def _map_figures(profile: HardwareProfile, change: Callable[[str, Figure], Figure]) -> HardwareProfile:
    def changed(part: _Part, name: str) -> _Part:
        return with_figures(part, lambda where, figure: change(where.removesuffix(".achieved"), figure), name)

    return replace(
        profile,
        levels=tuple(changed(level, level.name) for level in profile.levels),
        links=tuple(changed(link, f"{link.source}->{link.target} {link.kind}") for link in profile.links),
    )
