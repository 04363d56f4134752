"""Questions that take many searches: which machine, which upgrade, which formats, how much memory, what where.

Every answer is a tidy pandas DataFrame, one row a search, whose columns name their units;
`hrm.plots` draws them.
"""

from hrm.analysis.axis import SWEPT, Axis, Length, Whole
from hrm.analysis.formats import compare_formats, formats_of
from hrm.analysis.fronts import front_of_cpu_memory, front_of_gpus, front_of_latency
from hrm.analysis.machines import compare_machines
from hrm.analysis.regions import policy_map
from hrm.analysis.rows import plan_row
from hrm.analysis.sweep import sweep
from hrm.analysis.what_if import what_if

__all__ = [
    "SWEPT",
    "Axis",
    "Length",
    "Whole",
    "compare_formats",
    "compare_machines",
    "formats_of",
    "front_of_cpu_memory",
    "front_of_gpus",
    "front_of_latency",
    "plan_row",
    "policy_map",
    "sweep",
    "what_if",
]
