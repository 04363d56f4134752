"""Set before any benchmark imports torch."""

from hrm.contract.openmp import spin_briefly

# As `executor` runs: on a machine that is not quite quiet, longer spins measure the neighbours.
spin_briefly()
