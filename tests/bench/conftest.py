"""Set before any benchmark imports torch."""

import os

from executor.cli import OPENMP_SPINS

# As `executor` runs: on a machine that is not quite quiet, longer spins measure the neighbours.
os.environ.setdefault("GOMP_SPINCOUNT", OPENMP_SPINS)
