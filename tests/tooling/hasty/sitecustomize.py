"""Python runs this first where it is on the path.

Profiling a machine is then done in a second, searches are rough, axes have two points, and what more of a resource
would bring is asked of two.
"""

import sys

if "profile" in sys.orig_argv:
    from tests.hrm.profiling.fakes import small_sizes

    sizes = small_sizes()  # kept: a context that nothing holds ends at once, and its sizes with it
    sizes.__enter__()
elif "search" in sys.orig_argv or any("ipykernel" in word for word in sys.orig_argv):
    from hrm.search import bound, choose, polish

    for name in ("BUDGET", "LARGEST_BUDGET"):
        setattr(bound, name, 0)
    choose.MAX_SIMULATED, polish.ROUNDS = 2, 0

    from hrm.analysis import Axis, what_if

    between, what_ifs = Axis.between, sys.modules[what_if.__module__]
    resources = what_ifs.resources

    def ends(what, low, high, count, *, logarithmic=False):
        """The axis from end to end."""
        return between(what, low, high, min(count, 2), logarithmic=logarithmic)

    Axis.between = staticmethod(ends)
    vars(what_ifs)["resources"] = lambda profile: resources(profile)[:2]
