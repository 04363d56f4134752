"""Python runs this first where it is on the path: profiling a machine is then done in a second, searches are rough."""

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
