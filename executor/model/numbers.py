"""What attention must know of the requests and prompts that it is computed for.

The host knows it when it plans a step. A device has to be sent it, and reads it in memory of its own.

T tokens, R requests.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hrm.contract.rows import NUMBERS_PER_REQUEST


@dataclass(frozen=True, slots=True)
class Reach:
    """Which rows of its part of a cache a request's tokens have.

    Every token has its own, or if `rows` is not 0 so many are filled in turn: with the last tokens,
    or if `chunked` with those of the chunk of so many that is under way.
    """

    rows: int = 0
    chunked: bool = False

    def capacity(self, tokens: int) -> int:
        """Rows that a request of at most so many tokens needs."""
        return min(tokens, self.rows) if self.rows else tokens

    def row(self, position: int) -> int:
        """The row of the token at that position."""
        return position % self.rows if self.rows else position

    def length(self, tokens: int) -> int:
        """Rows that the last of so many tokens attends to, its own included."""
        if self.chunked:
            return (tokens - 1) % self.rows + 1
        return self.capacity(tokens)

    def spans(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """Where the tokens from `start` to `end` that are still needed go.

        As (first token, first row, count), each of consecutive rows.
        """
        if not self.rows:
            return [(start, start, end - start)]
        spans: list[tuple[int, int, int]] = []
        token = max(start, end - self.rows)
        while token < end:
            row = token % self.rows
            count = min(self.rows - row, end - token)
            spans.append((token, row, count))
            token += count
        return spans


@dataclass(frozen=True, slots=True)
class RowViews:
    """The numbers of R requests in memory that a device reads."""

    positions_R: Tensor  # noqa: N815 - int64, of the new token
    cache_rows_R: Tensor  # noqa: N815 - int64, where its keys and values go
    starts: Tensor  # (R+1) int32, each request's first row of the cache
    lengths_R: Tensor  # noqa: N815 - int32, tokens that it has there, the new one included
    queries: Tensor  # (R+1) int32, 0 to R: the queries before each request's

    @staticmethod
    def of(flat: Tensor, num_requests: int) -> "RowViews":
        """Views of 5 int64 for each request, which lie side by side."""
        count = num_requests
        narrow = flat[2 * count : NUMBERS_PER_REQUEST * count].view(torch.int32)
        starts, lengths, queries = narrow[: 3 * count + 2].split((count + 1, count, count + 1))
        return RowViews(flat[:count], flat[count : 2 * count], starts, lengths, queries)

    def places(self, some: slice, tokens: range) -> tuple[Tensor, Tensor]:
        """Rows of the cache that hold these tokens of some requests, (r, L), and which they have, (r, 1, 1, L).

        Where a request has fewer, it is the row of its last one.
        """
        starts_r1, lengths_r1 = self.starts[:-1][some].unsqueeze(1), self.lengths_R[some].unsqueeze(1)
        tokens_1L = torch.arange(tokens.start, tokens.stop, device=self.starts.device).unsqueeze(0)
        return starts_r1 + torch.minimum(tokens_1L, lengths_r1 - 1), (tokens_1L < lengths_r1)[:, None, None, :]


@dataclass(frozen=True, slots=True)
class RowNumbers:
    """What decode must know of R requests that have one new token each.

    Request r's tokens are the cache's rows from `starts[r]`, `lengths[r]` of them, the new token
    included. `views` are there if a device computes, and the tensors are then on it.
    """

    positions_R: Tensor  # noqa: N815 - int64, of the new token
    cache_rows_R: Tensor  # noqa: N815 - int64, where its keys and values go
    starts: Sequence[int]
    lengths: Sequence[int]
    views: RowViews | None = None

    @property
    def sent(self) -> RowViews:
        """The views, where a device computes."""
        assert self.views is not None, "the numbers were not sent to the device"
        return self.views

    @property
    def longest(self) -> int:
        """The most tokens that any request has."""
        return max(self.lengths)

    def write(self, to: Tensor) -> None:
        """Write them to memory that is sent to a device."""
        views = RowViews.of(to, len(self.lengths))
        views.positions_R.copy_(self.positions_R)
        views.cache_rows_R.copy_(self.cache_rows_R)
        # Flash attention is told where all of the cache ends, though the lengths say it better.
        views.starts.copy_(torch.tensor([*self.starts, self.starts[-1] + self.lengths[-1]]))
        views.lengths_R.copy_(torch.tensor(self.lengths))
        views.queries.copy_(torch.arange(len(self.lengths) + 1))

    def at(self, there: Tensor) -> "RowNumbers":
        """The same numbers as they were sent there."""
        views = RowViews.of(there, len(self.lengths))
        return RowNumbers(views.positions_R, views.cache_rows_R, self.starts, self.lengths, views)


@dataclass(frozen=True, slots=True)
class PromptNumbers:
    """What prefill must know of prompts, or parts of prompts, that lie one after the other.

    All but `lengths` is in `flat`: what is sent to a device.
    """

    flat: Tensor  # int64
    positions_T: Tensor  # noqa: N815 - int64
    ends: Tensor  # int32: 0, and where each prompt ends among the tokens
    lengths: Sequence[int]

    @staticmethod
    def within(memory: Tensor, lengths: Sequence[int]) -> "PromptNumbers":
        """Views of the numbers of prompts of these lengths, at the start of a vector of int64."""
        num_tokens, num_ends = sum(lengths), len(lengths) + 1
        flat = memory[: num_tokens + (num_ends + 1) // 2]
        return PromptNumbers(flat, flat[:num_tokens], flat[num_tokens:].view(torch.int32)[:num_ends], lengths)

    @staticmethod
    def write(to: Tensor, starts: Sequence[int], lengths: Sequence[int]) -> "PromptNumbers":
        """Write the numbers of prompts whose first tokens have the positions `starts`."""
        numbers = PromptNumbers.within(to, lengths)
        positions = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        torch.cat(positions, out=numbers.positions_T)
        numbers.ends.copy_(torch.tensor([0, *lengths]).cumsum(0))
        return numbers

    def at(self, there: Tensor) -> "PromptNumbers":
        """The same numbers as they were sent there."""
        return PromptNumbers.within(there, self.lengths)
