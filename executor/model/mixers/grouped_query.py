"""Grouped-query attention: projections, norms of heads, rotary embedding, gate and output.

T tokens, D hidden, H heads, G kv heads, d head_dim, Q = H*d, KV = G*d, X = Q+2KV, R requests, C rows
of a cache. A row has queries, keys and values one after the other; a token of a cache its keys and
then its values, (2, G, d).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from executor.model.in_place import add
from executor.model.kv_rows import is_quantised
from executor.model.layout import AttentionWeights
from executor.model.linear import add_projected, project
from executor.model.mixers.base import Mixer, append_kv
from executor.model.norm import PLAIN, Norm, norm_into, normed
from executor.model.numbers import PromptNumbers, Reach, RowNumbers
from executor.model.rotary import Rotary
from executor.model.softmax import Softmax
from executor.model.workspace import Workspace
from hrm.layers import GroupedQueryAttention

if TYPE_CHECKING:
    from executor.model.kernels import AbstractKernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Temperature:
    """How queries grow with their position, for attention over long texts to stay sharp (arXiv 2501.19399).

    The query of a text's n-th token is multiplied by 1 + `scale` * log(1 + n // `stretch`).
    """

    stretch: int
    scale: float

    def factors(self, positions_T: Tensor) -> Tensor:
        """What queries at positions from 0 are multiplied by, float32."""
        stretches_T = (positions_T + 1).div_(self.stretch, rounding_mode="floor")
        return stretches_T.float().log1p_().mul_(self.scale).add_(1)

    def apply(self, queries_TQ: Tensor, positions_T: Tensor, workspace: Workspace) -> None:
        """Multiply queries in place, in float32 and rounded once."""
        mark, exact_TQ = workspace.mark(), queries_TQ
        if queries_TQ.dtype is not torch.float32:
            exact_TQ = workspace.take(queries_TQ.shape, torch.float32).copy_(queries_TQ)
        exact_TQ.mul_(self.factors(positions_T).unsqueeze(1))
        if exact_TQ is not queries_TQ:
            queries_TQ.copy_(exact_TQ)
        workspace.release(mark)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedQuery(Mixer):
    """Grouped-query attention.

    `head_norm` is of queries and keys, over each head or, if its weights are that long, over all
    together; `value_norm` is of each head's values, without weights. After them and before the rotary
    embedding, `clip` bounds queries, keys and values. After that, `rotated_norm` is of each head of queries
    and keys, without weights, and a `temperature` scales queries. Scores are products times `scale`,
    1/sqrt(d) if it is None. A window is a chunk if `chunked`: attention starts anew after so many tokens.
    What is added to hidden states is multiplied by `output_scale`.
    """

    block: GroupedQueryAttention
    norm: Norm = PLAIN
    rotary: Rotary | None = None
    clip: float | None = None
    head_norm: Norm | None = None
    rotated_norm: Norm | None = None
    temperature: Temperature | None = None
    value_norm: Norm | None = None
    output_scale: float = 1.0
    scale: float | None = None
    chunked: bool = False

    @property
    def reach(self) -> Reach:
        """A window, if there is one."""
        return Reach(self.block.window, chunked=self.chunked and self.block.window > 0)

    def _softmax(self, weights: AttentionWeights) -> Softmax:
        return Softmax(self.scale, weights.sinks, self.reach)

    def project(
        self,
        x_TD: Tensor,
        weights: AttentionWeights,
        positions_T: Tensor,
        row_TX: Tensor,
        held_TS: Tensor,
        workspace: Workspace,
    ) -> None:
        """Queries, keys and values, rotated to their positions; the gate of the output waits."""
        block, mark = self.block, workspace.mark()
        projected_TX = row_TX[:, : block.projected_size] if block.values_from_keys else row_TX
        hidden_TD = normed(self.norm, x_TD, weights.attention_norm, workspace, weights.attention_norm_bias)
        if block.output_gate:
            gate = slice(block.query_size, 2 * block.query_size)
            project(hidden_TD, weights.qkv[: gate.start], row_TX[:, : gate.start])
            project(hidden_TD, weights.qkv[gate], held_TS)
            project(hidden_TD, weights.qkv[gate.stop :], row_TX[:, gate.start :])
        else:
            project(hidden_TD, weights.qkv, projected_TX)
        workspace.release(mark)
        if weights.qkv_bias is not None:
            projected_TX.add_(weights.qkv_bias)
        if block.values_from_keys:
            keys_TK, values_TK = row_TX[:, -2 * block.kv_size :].chunk(2, dim=1)
            values_TK.copy_(keys_TK)
        if weights.gate_bias is not None:
            held_TS.add_(weights.gate_bias)
        self._norm_heads(row_TX, weights, workspace)
        if self.clip is not None:
            row_TX.clamp_(-self.clip, self.clip)
        self._place(row_TX, positions_T, workspace)

    def _place(self, row_TX: Tensor, positions_T: Tensor, workspace: Workspace) -> None:
        """Let queries and keys know their positions."""
        block = self.block
        if self.rotary is not None:
            self.rotary.turn(row_TX, block.num_heads + block.num_kv_heads, block.head_dim, positions_T, workspace)
        if self.rotated_norm is not None:
            for part in self._queries_and_keys(row_TX):
                self._norm_without_weights(self.rotated_norm, part, workspace)
        if self.temperature is not None:
            self.temperature.apply(row_TX[:, : block.query_size], positions_T, workspace)

    def _norm_without_weights(self, norm: Norm, rows_TW: Tensor, workspace: Workspace) -> None:
        heads = rows_TW.unflatten(1, (-1, self.block.head_dim))
        norm_into(norm, heads, heads.new_ones(self.block.head_dim), heads, workspace)

    def _queries_and_keys(self, row_TX: Tensor) -> tuple[Tensor, ...]:
        sizes = (self.block.query_size, self.block.kv_size)
        return row_TX[:, : sum(sizes)].split(sizes, dim=1)

    def _norm_heads(self, row_TX: Tensor, weights: AttentionWeights, workspace: Workspace) -> None:
        if self.value_norm is not None:
            self._norm_without_weights(self.value_norm, row_TX[:, -self.block.kv_size :], workspace)
        if weights.query_norm is None or weights.key_norm is None:
            return
        assert self.head_norm is not None, "the family does not say how heads are normed"
        for part, weight in zip(self._queries_and_keys(row_TX), (weights.query_norm, weights.key_norm), strict=True):
            heads = part.view(part.shape[0], part.shape[1] // weight.shape[0], weight.shape[0])
            norm_into(self.head_norm, heads, weight, heads, workspace)

    def append(self, cache_C: Tensor, row_RX: Tensor, rows_R: Tensor) -> None:
        """Keys and values."""
        append_kv(cache_C, row_RX, rows_R)

    def decode(
        self,
        kernels: "AbstractKernels",
        row_RX: Tensor,
        weights: AttentionWeights,
        cache_C: Tensor,
        numbers: RowNumbers,
        out_RO: Tensor,
        *,
        spare_bytes: int,
    ) -> None:
        """As the level's kernels do it."""
        cache_C2Gd = cache_C if is_quantised(cache_C) else cache_C.view(-1, *self.block.cached_shape)
        softmax = self._softmax(weights)
        kernels.decode_attention(
            self.block, row_RX, cache_C2Gd, numbers, out_RO, spare_bytes=spare_bytes, softmax=softmax
        )

    def prefill(
        self,
        kernels: "AbstractKernels",
        row_TX: Tensor,
        weights: AttentionWeights,
        prompts: PromptNumbers,
        caches_C: Sequence[Tensor | None],
        out_TO: Tensor,
        workspace: Workspace,
    ) -> None:
        """As the level's kernels do it."""
        shape = self.block.cached_shape
        caches_C2Gd = [None if cache is None else cache.view(-1, *shape) for cache in caches_C]
        softmax = self._softmax(weights)
        kernels.prefill_attention(self.block, row_TX, prompts, caches_C2Gd, out_TO, workspace, softmax)

    def finish(
        self, out_TO: Tensor, held_TS: Tensor, weights: AttentionWeights, hidden_TD: Tensor, workspace: Workspace
    ) -> None:
        """The gate scales attention's output, in place, before it is projected; a norm may follow."""
        if self.block.output_gate:
            out_TO.mul_(held_TS.sigmoid_())
        if self.output_scale != 1:
            assert weights.output_bias is None, "a bias would have to be scaled as well"
            out_TO.mul_(self.output_scale)
        if weights.attention_output_norm is None:
            add_projected(out_TO, weights.output, hidden_TD)
            if weights.output_bias is not None:
                hidden_TD.add_(weights.output_bias)
            return
        mark = workspace.mark()
        added_TD = project(out_TO, weights.output, workspace.take(hidden_TD.shape, hidden_TD.dtype))
        if weights.output_bias is not None:
            added_TD.add_(weights.output_bias)
        norm_into(self.norm, added_TD, weights.attention_output_norm, added_TD, workspace)
        add(hidden_TD, added_TD)
        workspace.release(mark)
