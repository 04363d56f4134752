"""What each kind of task does on real weights: `prefill` and `decode`, with `pages` for both, and `stages` of a model.

Handlers lock nothing: that no buffer of `memory` is overwritten while it is read follows from the
edges of the task graph (hrm.schedules.pipeline). A request that has ended costs nothing: every
decode task works on the rows of the requests that still go on, which `state` keeps.
"""

from executor.handlers.added import add_handler
from executor.handlers.arenas import HostArenas
from executor.handlers.decode import DecodeHandlers
from executor.handlers.memory import RunMemory, allocate
from executor.handlers.prefill import PrefillHandlers, Prompts
from executor.handlers.stages import Handover, StageDecode, StagePrefill, in_turns
from executor.handlers.state import ERROR, LENGTH, STOP, BatchState, EndOfText, Generated, choices, never_stops

__all__ = [
    "ERROR",
    "LENGTH",
    "STOP",
    "BatchState",
    "DecodeHandlers",
    "EndOfText",
    "Generated",
    "Handover",
    "HostArenas",
    "PrefillHandlers",
    "Prompts",
    "RunMemory",
    "StageDecode",
    "StagePrefill",
    "add_handler",
    "allocate",
    "choices",
    "in_turns",
    "never_stops",
]
