"""Set before any benchmark imports torch."""

import os

from hrm.contract.openmp import spin_briefly

# As `executor` runs: on a machine that is not quite quiet, longer spins measure the neighbours.
spin_briefly()
os.environ.pop("EXECUTOR_NATIVE_UP_TO", None)  # that of tests: benchmarks run as users do
