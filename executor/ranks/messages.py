"""What rank 0 tells the others: batch after batch, and where stop texts were found."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from executor.batching import Batch, Placed
from executor.errors import RunError
from executor.group import Group
from executor.guard import is_of_one_request
from executor.handlers import EndOfText
from hrm.policy import ScheduleName

REPORT: Final = b"report"  # in place of a batch; an empty message is the end

GOES_ON: Final = 0
ENDS: Final = 1
FAILS: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RankBatch:
    """A batch to be run by all ranks, its micro-batches as they are."""

    batch: Batch
    index: int
    schedule: ScheduleName | None

    def encode(self) -> bytes:
        """As a message."""
        return msgspec.json.encode(self)

    @staticmethod
    def decode(message: bytes) -> "RankBatch":
        """Of a message."""
        return msgspec.json.decode(message, type=RankBatch)


def telling(group: Group, stops: EndOfText) -> EndOfText:
    """The search for stop texts on rank 0, which tells the others what it found."""

    def stop(placed: Placed, tokens: Sequence[int]) -> bool:
        try:
            ends = stops(placed, tokens)
        except BaseException as error:
            if is_of_one_request(error):
                group.agree(FAILS)
            raise
        return group.agree(ENDS if ends else GOES_ON) == ENDS

    return stop


def told(group: Group) -> Callable[[Placed, Sequence[int]], bool]:
    """What the others do instead of searching."""

    def stop(_placed: Placed, _tokens: Sequence[int]) -> bool:
        found = group.agree(GOES_ON)
        if found == FAILS:
            raise RunError("stop texts", "<failed>", "are searched for by rank 0", "see its reason")
        return found == ENDS

    return stop
