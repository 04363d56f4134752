"""What each kind of task does on real weights: `prefill` and `decode`, with `pages` for both.

Handlers lock nothing: that no buffer of `memory` is overwritten while it is read follows from the
edges of the task graph (hrm.schedules.pipeline). A request that has ended costs nothing: every
decode task works on the rows of the requests that still go on, which `state` keeps.
"""

from executor.handlers.arenas import HostArenas
from executor.handlers.decode import DecodeHandlers
from executor.handlers.memory import RunMemory, allocate
from executor.handlers.prefill import PrefillHandlers
from executor.handlers.state import ERROR, LENGTH, STOP, BatchState, EndOfText, Generated, never_stops

__all__ = [
    "ERROR",
    "LENGTH",
    "STOP",
    "BatchState",
    "DecodeHandlers",
    "EndOfText",
    "Generated",
    "HostArenas",
    "PrefillHandlers",
    "RunMemory",
    "allocate",
    "never_stops",
]
