"""What a layer's mixer computes, wherever it is computed.

T tokens, D hidden, R requests, C rows of a cache, X elements of a row between the steps, S of what
waits, O of the output.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from executor.model.kv_rows import quantise
from executor.model.numbers import PromptNumbers, Reach, RowNumbers
from executor.model.workspace import Workspace
from executor.native import kernels
from hrm import layers

if TYPE_CHECKING:
    from executor.model.kernels import AbstractKernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixer(ABC):
    """The maths of one kind of mixer, with the options of a family.

    A token goes through `project`, attention over what is cached, and `finish`. Between them it is a
    row of `block.sent_elements`, which may be sent to the host and ends with what is cached of it, in
    decode as the cache has it: if that is quantised, `pack` makes such rows for `append` and `decode`;
    `block.held_elements` besides wait where they were computed. Weights are `executor.model.layout`'s
    for the block.
    """

    block: layers.Mixer

    @property
    def has_state(self) -> bool:
        """Whether its cache is a state that each token makes anew, and no row of any token."""
        return not self.block.cached_elements

    @property
    def reach(self) -> Reach:
        """Which rows of a cache tokens have."""
        return Reach(self.block.kept_rows)

    @property
    def prefix_elements(self) -> int:
        """Elements that prefill keeps of each token of a split prompt: of one that is cached, as cached."""
        return self.block.cached_elements

    @abstractmethod
    def project(
        self, x_TD: Tensor, weights: Any, positions_T: Tensor, row_TX: Tensor, held_TS: Tensor, workspace: Workspace
    ) -> None:
        """Write the rows of hidden states, and what waits of them.

        `positions_T` are integers from 0, on the device of the other tensors.
        """

    @abstractmethod
    def append(self, cache_C: Tensor, row_RX: Tensor, rows_R: Tensor) -> None:
        """Write what is cached of new tokens at the cache's `rows_R` (int64, on the cache's device)."""

    @abstractmethod
    def decode(
        self,
        kernels: "AbstractKernels",
        row_RX: Tensor,
        weights: Any,
        cache_C: Tensor,
        numbers: RowNumbers,
        out_RO: Tensor,
        *,
        spare_bytes: int,
    ) -> None:
        """Attention of one new token per request over its own part of the cache, itself included.

        At most about `spare_bytes` are taken besides.
        """

    @abstractmethod
    def prefill(
        self,
        kernels: "AbstractKernels",
        row_TX: Tensor,
        weights: Any,
        prompts: PromptNumbers,
        caches_C: Sequence[Tensor | None],
        out_TO: Tensor,
        workspace: Workspace,
    ) -> None:
        """Causal attention within each of the prompts that lie one after the other in `row_TX`.

        Where a prompt has a cache, its tokens are written to the cache's last rows, of
        `prefix_elements`. The first prompt's may have more, which are its earlier tokens and are
        attended over as well. A cache that is a state, of one row, is what the earlier tokens left of
        zeros, and becomes what these leave of it.
        """

    @abstractmethod
    def finish(self, out_TO: Tensor, held_TS: Tensor, weights: Any, hidden_TD: Tensor, workspace: Workspace) -> None:
        """Add the projected output of attention to hidden states, in place."""

    def cached(self, row_TX: Tensor) -> Tensor:
        """The part of the rows that a cache takes."""
        return row_TX[:, row_TX.shape[1] - self.block.cached_elements :]

    def pack(self, row_TX: Tensor, packed_TY: Tensor, codes: torch.dtype) -> None:
        """Write the rows as they go to a quantised cache: what is cached in such a row's bytes, the rest as it is."""
        others = row_TX.shape[1] - self.block.cached_elements
        packed_TY[:, :others].copy_(row_TX[:, :others])
        quantise(self.cached(row_TX), self.block.cached_parts, packed_TY[:, others:].view(codes))


def append_kv(cache_C: Tensor, row_TX: Tensor, rows_T: Tensor) -> None:
    """Write what rows end with at the cache's `rows_T` (int64, on the cache's device), bytes as they are."""
    cache = cache_C.flatten(1).view(row_TX.dtype)
    cached_TX, native = row_TX[:, -cache.shape[1] :], kernels()
    if native is not None and native.takes_append(cache, cached_TX, rows_T):
        native.append(cache, cached_TX, rows_T)
    else:
        cache.index_copy_(0, rows_T, cached_TX)
