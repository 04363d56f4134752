"""Latent attention: projections, norms of what is compressed, rotary embedding and output.

T tokens, D hidden, R requests, C rows of a cache. A row has the queries of all heads, (H, n+p), and then
what is cached: a compressed vector and the rotary key that all heads share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from torch import Tensor

from executor.model import latent
from executor.model.layout import LatentWeights
from executor.model.linear import add_projected, project
from executor.model.mixers.base import Mixer, append_kv
from executor.model.norm import PLAIN, Norm, norm_into, normed
from executor.model.numbers import PromptNumbers, RowNumbers
from executor.model.rotary import Rotary
from executor.model.workspace import Workspace
from hrm.layers import LatentAttention

if TYPE_CHECKING:
    from executor.model.kernels import AbstractKernels


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Latent(Mixer):
    """Multi-head latent attention.

    `inner_norm` is of compressed queries and of compressed keys and values. Scores are products times
    `scale`.
    """

    block: LatentAttention
    rotary: Rotary
    scale: float
    norm: Norm = PLAIN
    inner_norm: Norm = PLAIN

    def project(
        self,
        x_TD: Tensor,
        weights: LatentWeights,
        positions_T: Tensor,
        row_TX: Tensor,
        held_TS: Tensor,  # noqa: ARG002 - others need it
        workspace: Workspace,
    ) -> None:
        """Queries and what is cached, rotated to their positions."""
        block, mark = self.block, workspace.mark()
        query_TQ, compressed_Tr, key_Tp = row_TX.split((block.query_size, block.kv_rank, block.rope_head_dim), dim=1)
        hidden_TD = normed(self.norm, x_TD, weights.attention_norm, workspace)
        project(hidden_TD, weights.kv_down, self.cached(row_TX))
        if weights.kv_down_bias is not None:
            self.cached(row_TX).add_(weights.kv_down_bias)
        self._project_queries(hidden_TD, weights, query_TQ, workspace)
        workspace.release(mark)
        norm_into(self.inner_norm, compressed_Tr, weights.kv_norm, compressed_Tr, workspace)
        rotated = row_TX[:, block.nope_head_dim :]  # of a head its last elements
        self.rotary.turn(rotated, block.num_heads, block.head_dim, positions_T, workspace)
        self.rotary.turn(key_Tp, 1, block.rope_head_dim, positions_T, workspace)

    def _project_queries(
        self, hidden_TD: Tensor, weights: LatentWeights, query_TQ: Tensor, workspace: Workspace
    ) -> None:
        if weights.query is not None:
            project(hidden_TD, weights.query, query_TQ)
            return
        assert weights.query_down is not None
        assert weights.query_norm is not None
        assert weights.query_up is not None
        down_Tq = workspace.take((hidden_TD.shape[0], self.block.query_rank), hidden_TD.dtype)
        project(hidden_TD, weights.query_down, down_Tq)
        if weights.query_down_bias is not None:
            down_Tq.add_(weights.query_down_bias)
        norm_into(self.inner_norm, down_Tq, weights.query_norm, down_Tq, workspace)
        project(down_Tq, weights.query_up, query_TQ)

    def append(self, cache_C: Tensor, row_RX: Tensor, rows_R: Tensor) -> None:
        """The compressed vector and the rotary key."""
        append_kv(cache_C, row_RX, rows_R)

    def decode(
        self,
        kernels: "AbstractKernels",
        row_RX: Tensor,
        weights: LatentWeights,
        cache_C: Tensor,
        numbers: RowNumbers,
        out_RO: Tensor,
        *,
        spare_bytes: int,
    ) -> None:
        """In the absorbed form: every row of the cache is read once for all heads."""
        block, out_RHv = self.block, self._values(out_RO)
        given = block, self._queries(row_RX), weights.kv_up, cache_C
        if kernels.shares_memory:
            latent.decode_on_host(*given, numbers, self.scale, out_RHv)
        else:
            latent.decode_at_once(*given, numbers, self.scale, out_RHv, spare_bytes=spare_bytes)

    @property
    def prefix_elements(self) -> int:
        """Keys and values of all heads."""
        return self.block.expanded_elements

    def prefill(
        self,
        kernels: "AbstractKernels",  # noqa: ARG002 - others need them
        row_TX: Tensor,
        weights: LatentWeights,
        prompts: PromptNumbers,
        caches_C: Sequence[Tensor | None],
        out_TO: Tensor,
        workspace: Workspace,
    ) -> None:
        """With keys and values of all heads, which are what the caches here have."""
        block, mark = self.block, workspace.mark()
        shape = (-1, block.num_heads, block.head_dim + block.value_head_dim)
        expanded_THe = workspace.take((row_TX.shape[0], block.expanded_elements), row_TX.dtype).view(shape)
        latent.expand(block, self.cached(row_TX), weights.kv_up, expanded_THe)
        prefixes = [None if cache is None else cache.view(shape) for cache in caches_C]
        rows, out_THv = (self._queries(row_TX), expanded_THe), self._values(out_TO)
        latent.prefill(block, *rows, prompts.lengths, prefixes, self.scale, out_THv, workspace)
        workspace.release(mark)

    def finish(
        self,
        out_TO: Tensor,
        held_TS: Tensor,  # noqa: ARG002 - others need it
        weights: LatentWeights,
        hidden_TD: Tensor,
        workspace: Workspace,  # noqa: ARG002 - others need it
    ) -> None:
        """The output projection."""
        add_projected(out_TO, weights.output, hidden_TD)
        if weights.output_bias is not None:
            hidden_TD.add_(weights.output_bias)

    def _queries(self, row_TX: Tensor) -> Tensor:
        return row_TX[:, : self.block.query_size].unflatten(1, (self.block.num_heads, -1))

    def _values(self, out_TO: Tensor) -> Tensor:
        return out_TO.view(out_TO.shape[0], self.block.num_heads, -1)
