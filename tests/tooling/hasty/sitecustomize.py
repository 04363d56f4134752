"""Python runs this first where it is on the path: a command that profiles a machine is then done in a second."""

import sys

if "profile" in sys.orig_argv:
    from tests.hrm.profiling.fakes import small_sizes

    small_sizes().__enter__().setattr("hrm.profiling.machine.PASSES", 1)
