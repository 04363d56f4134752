"""The maths that depends on where it is computed, and how that place learns the numbers it needs.

T tokens, D hidden, H heads, G kv heads, d head_dim, Q = H*d, X = Q+2KV, R requests, C tokens of a
cache.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, TypeVar, final

from torch import Tensor

from executor.model.attention import decode_attention, prefill_attention
from executor.model.experts import run_experts
from executor.model.layout import Experts
from executor.model.numbers import PromptNumbers, RowNumbers
from executor.model.softmax import PLAIN, Softmax
from executor.model.workspace import Workspace
from executor.native.experts import SILU, Glu, Routing
from hrm.layers import GroupedQueryAttention

N = TypeVar("N", RowNumbers, PromptNumbers)


class AbstractKernels(ABC):
    """What computes on one level of the memory; implementations are final.

    `shares_memory` says that this level is the host's memory, so that nothing has to be sent.
    """

    shares_memory: ClassVar[bool]

    @final
    def copies(self, host: Tensor, there: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The copies, target first, that bring numbers from the host's memory."""
        return [] if self.shares_memory else [(there, host)]

    @final
    def sent(self, numbers: RowNumbers, host: Tensor, there: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The same for numbers that are not in the host's memory yet."""
        if not self.shares_memory:
            numbers.write(host)
        return self.copies(host, there)

    @final
    def numbers(self, numbers: N, there: Tensor) -> N:
        """The numbers where they are computed with; `there` is where they were sent."""
        return numbers if self.shares_memory else numbers.at(there)

    @abstractmethod
    def decode_attention(
        self,
        block: GroupedQueryAttention,
        qkv_RX: Tensor,
        cache_C2Gd: Tensor,
        rows: RowNumbers,
        out_RQ: Tensor,
        *,
        spare_bytes: int,
        softmax: Softmax = PLAIN,
    ) -> None:
        """Attention of one new token per request over its own part of the cache.

        At most about `spare_bytes` are taken besides.
        """

    @abstractmethod
    def prefill_attention(
        self,
        block: GroupedQueryAttention,
        qkv_TX: Tensor,
        prompts: PromptNumbers,
        caches_C2Gd: Sequence[Tensor | None],
        out_TQ: Tensor,
        workspace: Workspace,
        softmax: Softmax = PLAIN,
    ) -> None:
        """Causal attention within each of the prompts that lie one after the other in `qkv_TX`.

        Where a prompt has a cache, its keys and values are written to the cache's last rows. The
        first prompt's may have more, which are its earlier tokens and are attended over as well.
        """

    @abstractmethod
    def run_experts(
        self,
        x_TD: Tensor,
        routing: Routing,
        experts: Experts,
        out_TD: Tensor,
        workspace: Workspace,
        *,
        rows_at_once: int,
        num_experts: int,
        glu: Glu = SILU,
    ) -> Sequence[int] | Tensor:
        """Add to `out_TD` the weighted output of exactly the `experts` given.

        Returns how many tokens are routed to each of all `num_experts`, given or not: where they were
        counted, so that no one need wait for it. At most `rows_at_once` rows of 2D+2I elements are taken besides.
        """


@final
class CpuKernels(AbstractKernels):
    """The host's functions, where the level is memory of the host."""

    shares_memory = True

    def decode_attention(
        self,
        block: GroupedQueryAttention,
        qkv_RX: Tensor,
        cache_C2Gd: Tensor,
        rows: RowNumbers,
        out_RQ: Tensor,
        *,
        spare_bytes: int,  # noqa: ARG002
        softmax: Softmax = PLAIN,
    ) -> None:
        """Request by request, so that nothing is taken."""
        decode_attention(block, qkv_RX, cache_C2Gd, rows.starts, rows.lengths, out_RQ, softmax)

    def prefill_attention(
        self,
        block: GroupedQueryAttention,
        qkv_TX: Tensor,
        prompts: PromptNumbers,
        caches_C2Gd: Sequence[Tensor | None],
        out_TQ: Tensor,
        workspace: Workspace,
        softmax: Softmax = PLAIN,
    ) -> None:
        """Prompt by prompt."""
        prefill_attention(block, qkv_TX, prompts.lengths, caches_C2Gd, out_TQ, workspace, softmax)

    def run_experts(
        self,
        x_TD: Tensor,
        routing: Routing,
        experts: Experts,
        out_TD: Tensor,
        workspace: Workspace,
        *,
        rows_at_once: int,  # noqa: ARG002
        num_experts: int,  # noqa: ARG002
        glu: Glu = SILU,
    ) -> Sequence[int]:
        """Expert by expert; it counts up to the last expert that any token goes to."""
        return run_experts(x_TD, routing, experts.each, out_TD, workspace, glu=glu)
