"""How GNU's OpenMP, which torch computes with, waits: alike where a machine is measured and used.

Threads that wait for one another's part of an operator spin for about 0.1 ms before they sleep:
longer than it takes from one operator to the next, and short enough (3 ms are usual) that another
process which takes a core for a while holds up little.
"""

import os
from typing import Final

SPINS: Final = "10000"


def spin_briefly() -> None:
    """To be called before torch is imported; what the user has set stays."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
