"""What ranks do together: every rank calls the same functions in the same order, with tensors of the same shapes.

R rows (requests), V vocab.
"""

from abc import ABC, abstractmethod
from typing import final

from torch import Tensor

from executor.errors import RunError


class LostRankError(RunError):
    """Another rank is gone, or has not come to where this one waits for it."""


def share_of(rank: int, size: int, count: int) -> range:
    """Which of `count` things are that rank's: as even as can be, in the order of ranks."""
    return range(rank * count // size, (rank + 1) * count // size)


class Group(ABC):
    """The ranks of a run as one of them sees them.

    `all_reduce`, `exchange_rows`, `gather` and `agree` are called in the lane that computes, `broadcast` and `collect`
    in the main thread: what the two do may overlap. All raise LostRankError when a rank is gone, and the first four
    also when one has not come for too long.
    """

    rank: int
    size: int

    @abstractmethod
    def all_reduce(self, tensor: Tensor) -> None:
        """Add up the ranks' contiguous tensors in place; the same bits on every rank.

        A tensor on a device is reduced there, behind what the calling thread has queued.
        """

    @abstractmethod
    def exchange_rows(self, rows_RV: Tensor) -> Tensor:
        """All columns of this rank's share of the rows, where each rank has some columns of all rows.

        The ranks' columns are equally many, and follow one another in the order of ranks. Shares are those of
        `share_of`, and may be empty.
        """

    @abstractmethod
    def gather(self, own: Tensor, count: int) -> Tensor:
        """`count` numbers of which each rank brings its share, see `share_of`; the same on every rank."""

    @abstractmethod
    def agree(self, value: int) -> int:
        """The value that rank 0 was given; those of other ranks do not matter."""

    @abstractmethod
    def broadcast(self, message: bytes | None = None) -> bytes:
        """The message of rank 0; other ranks give none, and wait for it however long that takes."""

    @abstractmethod
    def collect(self, message: bytes) -> list[bytes]:
        """The messages of all ranks, in their order; the same on every rank."""

    @abstractmethod
    def close(self) -> None:
        """Leave the group; what other ranks still wait for fails."""


@final
class Alone(Group):
    """A group of one rank, which has everything."""

    rank, size = 0, 1

    def all_reduce(self, tensor: Tensor) -> None:
        """Leave the tensor as it is."""

    def exchange_rows(self, rows_RV: Tensor) -> Tensor:
        """The rows themselves."""
        return rows_RV

    def gather(self, own: Tensor, count: int) -> Tensor:
        """The numbers themselves."""
        assert len(own) == count
        return own

    def agree(self, value: int) -> int:
        """The value itself."""
        return value

    def broadcast(self, message: bytes | None = None) -> bytes:
        """The message itself."""
        assert message is not None
        return message

    def collect(self, message: bytes) -> list[bytes]:
        """The message itself."""
        return [message]

    def close(self) -> None:
        """Nothing is held."""
