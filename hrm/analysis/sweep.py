"""The best policy at every point of a line: throughput against what is swept."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hrm.analysis.axis import Axis
from hrm.analysis.rows import OnPoint, search_row, searched, table
from hrm.policy import ScheduleName
from hrm.search import Space

if TYPE_CHECKING:
    import pandas as pd


def sweep(
    space: Space, axis: Axis, *, schedules: Sequence[ScheduleName] = (ScheduleName.CGOPIPE,), on_point: OnPoint = None
) -> "pd.DataFrame":
    """Search the best policy at every point of the axis, for every schedule.

    One row a schedule and point with the columns `schedule`, `axis.column` and those of
    `search_row`; where nothing fits, numbers are missing and `reason` says why.
    """
    points = [(schedule, value) for schedule in schedules for value in axis.points]
    spaces = (axis.at(replace(space, schedule=schedule), value) for schedule, value in points)
    rows = [
        {"schedule": schedule.value, axis.column: value, **search_row(result, one.profile)}
        for (schedule, value), (one, result) in zip(points, searched(spaces, on_point), strict=True)
    ]
    return table(rows, ("schedule", axis.column))
