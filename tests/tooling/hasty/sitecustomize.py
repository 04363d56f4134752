"""Python runs this first where it is on the path.

Profiling a machine is then done in a second, searches are rough, and axes have few points.
"""

import sys

if "profile" in sys.orig_argv:
    from tests.hrm.profiling.fakes import small_sizes

    patch = small_sizes().__enter__()
    patch.setattr("hrm.profiling.machine.PASSES", 1)
    patch.setattr("hrm.profiling.machine.options.MOST_QUICK_S", 0.03)
elif any("ipykernel" in word for word in sys.orig_argv):
    from hrm.search import bound, choose, polish

    for name in ("BUDGET", "LARGEST_BUDGET"):
        setattr(bound, name, 2000)
    choose.MAX_SIMULATED, polish.ROUNDS = 4, 0

    from hrm.analysis import Axis

    between = Axis.between

    def ends(what, low, high, count, *, logarithmic=False):
        """The axis with a point between its ends at most."""
        return between(what, low, high, min(count, 3), logarithmic=logarithmic)

    Axis.between = staticmethod(ends)
