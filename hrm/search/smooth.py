"""Machines on which more work never takes less time, and never more a piece."""

from dataclasses import replace
from typing import Final

import numpy as np

from hrm.hardware import HardwareProfile, Rate

_STEPS_BETWEEN: Final = 16  # points of a rate's curve
_SMOOTH: Final = 1 + 5e-4  # by how much a curve may bend between those


def smoothed(profile: HardwareProfile) -> HardwareProfile:
    """A machine that is nowhere slower, on which more work takes no less time, nor more a piece.

    A rate's curve is raised where it falls, and where it rises faster than the size.
    """
    levels = tuple(
        replace(
            level,
            processor=replace(
                level.processor,
                compute_flops_per_s={
                    dtype: _smooth(rate) for dtype, rate in level.processor.compute_flops_per_s.items()
                },
            ),
        )
        for level in profile.levels
    )
    links = tuple(replace(link, bandwidth_bytes_per_s=_smooth(link.bandwidth_bytes_per_s)) for link in profile.links)
    return replace(profile, levels=levels, links=links)


def _smooth(rate: Rate) -> Rate:
    figure = rate.planned
    if not figure.curve:
        return rate
    sizes = np.array([size for size, _ in figure.curve], dtype=float)
    steps = np.arange(_STEPS_BETWEEN) / _STEPS_BETWEEN
    logs = np.log(sizes)
    places = (logs[:-1, None] + steps * np.diff(logs)[:, None]).ravel()
    dense = np.exp(np.append(places, logs[-1]))
    values = np.asarray(figure.at(dense))
    among = np.minimum(1.0, dense[:, None] / dense) * values
    raised = among.max(axis=1) * _SMOOTH
    if np.allclose(raised, values * _SMOOTH, rtol=1e-12):
        return rate
    curve = tuple(zip(dense.tolist(), raised.tolist(), strict=True))
    return Rate(achieved=replace(figure, curve=curve))
