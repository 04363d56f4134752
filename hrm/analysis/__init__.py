"""Questions that take many searches: which machine, which upgrade, how much memory, what where.

Every answer is a tidy pandas DataFrame, one row a search, whose columns name their units;
`hrm.plots` draws them.
"""

from hrm.analysis.fronts import front_of_cpu_memory, front_of_gpus, front_of_latency
from hrm.analysis.machines import compare_machines
from hrm.analysis.regions import Axis, policy_map
from hrm.analysis.what_if import what_if

__all__ = [
    "Axis",
    "compare_machines",
    "front_of_cpu_memory",
    "front_of_gpus",
    "front_of_latency",
    "policy_map",
    "what_if",
]
