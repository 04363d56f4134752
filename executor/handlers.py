"""What each kind of task does on real weights, in prefill and in decode.

T tokens, D hidden, Q = heads*head_dim, KV = kv_heads*head_dim, X = Q+2KV, K experts per token,
N requests in a batch, C tokens of a cache, G kv heads, d head_dim, B buffers.

Handlers lock nothing: that no buffer is overwritten while it is read follows from the edges of the
task graph (hrm.schedules.pipeline). A request that has ended costs nothing: every decode task
works on the rows of the requests that still go on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, final

import torch
from torch import Tensor

from executor.backends import AbstractBackend
from executor.batching import Batch, Chunk, Placed
from executor.kv_cache import KvCaches
from executor.lanes import Handler
from executor.model import (
    Architecture,
    Routing,
    Workspace,
    append_kv,
    decode_attention,
    logits,
    post_attention,
    pre_attention,
    prefill_attention,
    run_experts,
)
from executor.sampling import choose
from executor.weight_pages import LayerWeights, WeightPages, page_slice
from hrm.model_spec import ModelSpec
from hrm.policy import Policy
from hrm.schedules import Pipeline
from hrm.schedules.pipeline import BUFFERS
from hrm.tasks import Lane, TaskId, TaskKind

STOP: Final = "stop"
LENGTH: Final = "length"


# -- memory ---------------------------------------------------------------------------------------


@final
class Exchange:
    """One level's decode buffers: a row per request, with all that moves between the levels.

    `routed`, `expert_output`, `weights` and `experts` are there only if the CPU computes experts.
    """

    def __init__(
        self, spec: ModelSpec, dtype: torch.dtype, memory: Tensor, *, num_requests: int,
        ffn_on_cpu: bool,
    ) -> None:  # fmt: skip
        start = 0

        def rows(width: int, of: torch.dtype) -> Tensor:
            nonlocal start
            end = start + num_requests * width * of.itemsize
            start, part = end, memory[start:end]
            return part.view(of).view(num_requests, width)

        routed = int(ffn_on_cpu)
        # The widest elements come first, so that all of them are aligned.
        self.experts_NK = rows(routed * spec.experts_per_token, torch.int64)
        self.weights_NK = rows(routed * spec.experts_per_token, torch.float32)
        self.hidden_ND = rows(spec.hidden_size, dtype)
        self.qkv_NX = rows(spec.query_size + 2 * spec.kv_size, dtype)
        self.attention_NQ = rows(spec.query_size, dtype)
        self.routed_ND = rows(routed * spec.hidden_size, dtype)
        self.expert_output_ND = rows(routed * spec.hidden_size, dtype)


@final
class PrefillBuffers:
    """Chunks on the GPU, one in use and one in transfer, and all hidden states on the host."""

    def __init__(
        self, spec: ModelSpec, dtype: torch.dtype, *, gpu: Tensor, host: Tensor, chunk_tokens: int
    ) -> None:
        elements = gpu.view(dtype)
        hidden = BUFFERS * chunk_tokens * spec.hidden_size
        self.hidden_BTD = elements[:hidden].view(BUFFERS, chunk_tokens, spec.hidden_size)
        self.kv_BT2Gd = elements[hidden:].view(
            BUFFERS, chunk_tokens, 2, spec.num_kv_heads, spec.head_dim
        )
        self.host_TD = host.view(dtype).view(-1, spec.hidden_size)


@dataclass(frozen=True, slots=True)
class RunMemory:
    """All memory of a run; made once, used by every batch."""

    weights: WeightPages
    caches: KvCaches
    gpu: Exchange
    host: Exchange
    prefill: PrefillBuffers
    workspace: Workspace
    sampling_workspace: Workspace
    host_workspace: Workspace


# -- state of a batch -----------------------------------------------------------------------------


@dataclass(slots=True)
class Generated:
    """A request being generated: its tokens so far and, once it has ended, why."""

    placed: Placed
    tokens: list[int] = field(default_factory=list[int])
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """The requests of a micro-batch that go on in one decode step, a row each.

    `lengths` are tokens in the cache with the step's own; `cache_rows` is where that one goes.
    """

    sequences: tuple[Generated, ...]
    tokens: Tensor
    positions: Tensor
    starts: list[int]
    lengths: list[int]
    cache_rows: Tensor

    @staticmethod
    def of(sequences: Sequence[Generated]) -> "Rows":
        """The rows of the step after the tokens that the sequences have."""
        starts = [sequence.placed.start for sequence in sequences]
        lengths = [len(s.placed.request.prompt) + len(s.tokens) for s in sequences]
        return Rows(
            tuple(sequences),
            torch.tensor([sequence.tokens[-1] for sequence in sequences], dtype=torch.int64),
            torch.tensor([length - 1 for length in lengths], dtype=torch.int64),
            starts,
            lengths,
            torch.tensor(
                [start + length - 1 for start, length in zip(starts, lengths, strict=True)],
                dtype=torch.int64,
            ),
        )


class EndOfText(Protocol):
    """Whether a request's text so far holds one of its stop texts."""

    def __call__(self, placed: Placed, tokens: Sequence[int], /) -> bool:
        """True ends the request."""
        ...


@final
class BatchState:
    """The requests of a batch, what they have generated, and which rows the next step has.

    `num_active` counts requests that go on; `num_generated` tokens so far, for live displays.
    """

    def __init__(self, batch: Batch, arch: Architecture, stops: EndOfText) -> None:
        self._eos = frozenset(arch.eos_token_ids)
        self._stops = stops
        self.sequences = [
            [Generated(placed) for placed in micro_batch.placed]
            for micro_batch in batch.micro_batches
        ]
        self.num_active = batch.num_requests
        self.num_generated = 0
        self.first_rows: list[int] = []
        first = 0
        for members in self.sequences:
            self.first_rows.append(first)
            first += len(members)
        self.by_placed = {id(s.placed): s for members in self.sequences for s in members}
        # Two versions: STORE_KV of a step may still run when SAMPLE makes the next step's rows.
        nothing = Rows.of([])
        self._rows: list[list[Rows]] = [[nothing, nothing] for _ in self.sequences]

    def rows(self, micro_batch: int, step: int) -> Rows:
        """The requests of a micro-batch that go on in that step."""
        return self._rows[micro_batch][step % 2]

    def append(self, sequence: Generated, token: int) -> None:
        """Add a token; end the request if it is one that ends it or the last allowed."""
        request = sequence.placed.request
        params = request.params
        sequence.tokens.append(token)
        self.num_generated += 1
        ends = token in params.stop_token_ids or (token in self._eos and not params.ignore_eos)
        if ends or (params.stop and self._stops(sequence.placed, sequence.tokens)):
            sequence.finish_reason = STOP
        elif len(sequence.tokens) >= params.max_tokens:
            sequence.finish_reason = LENGTH
        else:
            return
        self.num_active -= 1

    def start_decode(self) -> None:
        """Set up the rows of step 0, after prefill."""
        for j in range(len(self.sequences)):
            self.set_rows(j, 0)
            self._rows[j][1] = self._rows[j][0]

    def set_rows(self, micro_batch: int, step: int) -> None:
        """Set up the rows of a step from the requests that go on."""
        going_on = [s for s in self.sequences[micro_batch] if s.finish_reason is None]
        self._rows[micro_batch][step % 2] = Rows.of(going_on)


# -- handlers -------------------------------------------------------------------------------------


@final
class PageHandlers:
    """Moves weight pages; the same in both phases.

    `streamed` says how many elements of each layer the phase streams.
    """

    def __init__(
        self, backend: AbstractBackend, weights: WeightPages, pipeline: Pipeline,
        streamed: Sequence[int], idle: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._backend, self._weights, self._pipeline = backend, weights, pipeline
        self._streamed, self._idle = streamed, idle

    def stage(self, x: TaskId) -> int:
        """STAGE_PAGE: copy a page into pinned memory."""
        if self._idle():
            return 0
        page = self._page(x)
        source = self._weights.on_host(x.layer, page)
        return self._backend.transfer(Lane.STAGE, [(self._pinned(x, page), source)])

    def load(self, x: TaskId) -> int:
        """LOAD_PAGE: move a page into its slot on the GPU."""
        if self._idle():
            return 0
        page = self._page(x)
        if self._pipeline.staging:
            source = self._pinned(x, page)
        else:
            source = self._weights.on_host(x.layer, page)
        index = self._pipeline.load_index(x.step, x.layer)
        return self._backend.transfer(Lane.H2D, [(self._weights.in_slot(index, page), source)])

    def _page(self, x: TaskId) -> slice:
        return page_slice(self._streamed[x.layer], self._pipeline.num_pages, x.micro_batch)

    def _pinned(self, x: TaskId, page: slice) -> Tensor:
        index = self._pipeline.load_index(x.step, x.layer)
        return self._weights.staged(index * self._pipeline.num_pages + x.micro_batch, page)


@dataclass(frozen=True, slots=True)
class PrefillHandlers:
    """Tasks of prefill: chunks of whole prompts, all computed on the GPU."""

    backend: AbstractBackend
    arch: Architecture
    policy: Policy
    pipeline: Pipeline
    memory: RunMemory
    state: BatchState
    chunks: tuple[Chunk, ...]
    kv_on_gpu: tuple[bool, ...]
    tokens: list[Tensor]
    positions: list[Tensor]

    @staticmethod
    def make(
        backend: AbstractBackend, arch: Architecture, policy: Policy, pipeline: Pipeline,
        memory: RunMemory, state: BatchState, chunks: tuple[Chunk, ...],
    ) -> dict[TaskKind, Handler]:  # fmt: skip
        """The handler of every kind that occurs in prefill."""
        tokens = [
            torch.tensor([t for part in chunk.parts for t in part.placed.request.prompt])
            for chunk in chunks
        ]
        positions = [
            torch.cat([torch.arange(part.last - part.first) for part in chunk.parts])
            for chunk in chunks
        ]
        kv_on_gpu = tuple(policy.kv_on_gpu(j) for j in range(policy.num_micro_batches))
        handlers = PrefillHandlers(
            backend, arch, policy, pipeline, memory, state, chunks, kv_on_gpu, tokens, positions
        )
        spec = arch.spec
        size = getattr(torch, policy.dtype).itemsize
        streamed = [policy.streamed_bytes(spec, i) // size for i in range(spec.num_layers)]
        pages = PageHandlers(backend, memory.weights, pipeline, streamed, lambda: False)
        return {
            TaskKind.STAGE_PAGE: pages.stage,
            TaskKind.LOAD_PAGE: pages.load,
            TaskKind.EMBED: handlers.embed,
            TaskKind.LOAD_HIDDEN: handlers.load_hidden,
            TaskKind.PREFILL_LAYER: handlers.layer,
            TaskKind.STORE_KV: handlers.store_kv,
            TaskKind.STORE_HIDDEN: handlers.store_hidden,
            TaskKind.SAMPLE: handlers.sample,
        }

    def embed(self, x: TaskId) -> int:
        """Gather the prompts' embeddings on the host and move them to the GPU."""
        host_TD = self._host(x)
        torch.index_select(
            self.memory.weights.embedding, 0, self.tokens[x.micro_batch], out=host_TD
        )
        return self.backend.transfer(Lane.H2D, [(self._hidden(x), host_TD)])

    def load_hidden(self, x: TaskId) -> int:
        """Move a chunk's hidden states to the GPU."""
        return self.backend.transfer(Lane.H2D, [(self._hidden(x), self._host(x))])

    def store_hidden(self, x: TaskId) -> int:
        """Move a chunk's hidden states to the host."""
        return self.backend.transfer(Lane.D2H, [(self._host(x), self._hidden(x))])

    def layer(self, x: TaskId) -> int:
        """Compute one layer over a chunk; keys and values go to their cache or the buffer."""
        arch, spec, workspace = self.arch, self.arch.spec, self.memory.workspace
        chunk = self.chunks[x.micro_batch]
        hidden_TD = self._hidden(x)
        weights = self._weights(x)
        workspace.reset()
        width = spec.query_size + 2 * spec.kv_size
        qkv_TX = workspace.take((chunk.num_tokens, width), hidden_TD.dtype)
        pre_attention(
            arch, hidden_TD, weights.dense, self.positions[x.micro_batch], qkv_TX, workspace
        )
        kv_T2Gd = qkv_TX[:, spec.query_size :].view(-1, 2, spec.num_kv_heads, spec.head_dim)
        if not all(self.kv_on_gpu):
            self._kv_buffer(x).copy_(kv_T2Gd)
        for part in chunk.parts:
            if self.kv_on_gpu[part.micro_batch]:
                cache = self.memory.caches.of(part.micro_batch, x.layer)
                start = part.placed.start
                cache[start : start + part.last - part.first] = kv_T2Gd[part.first : part.last]
        attention_TQ = workspace.take((chunk.num_tokens, spec.query_size), hidden_TD.dtype)
        lengths = [part.last - part.first for part in chunk.parts]
        prefill_attention(arch, qkv_TX, lengths, attention_TQ, workspace)
        x_TD, routing = post_attention(arch, hidden_TD, attention_TQ, weights.dense, workspace)
        run_experts(x_TD, routing, weights.all_experts, hidden_TD, workspace)
        return 0

    def store_kv(self, x: TaskId) -> int:
        """Move new keys and values to those caches that live on the host."""
        buffer = self._kv_buffer(x)
        copies = [
            (
                self.memory.caches.of(part.micro_batch, x.layer)[
                    part.placed.start : part.placed.start + part.last - part.first
                ],
                buffer[part.first : part.last],
            )
            for part in self.chunks[x.micro_batch].parts
            if not self.kv_on_gpu[part.micro_batch]
        ]
        return self.backend.transfer(Lane.D2H, copies)

    def sample(self, x: TaskId) -> int:
        """Choose the first token of each prompt of a chunk, at most μ at once."""
        parts = self.chunks[x.micro_batch].parts
        hidden_TD, most = self._hidden(x), self.policy.micro_batch_size
        for first in range(0, len(parts), most):
            piece = parts[first : first + most]
            last_tokens = torch.tensor([part.last - 1 for part in piece])
            sequences = [self.state.by_placed[id(part.placed)] for part in piece]
            sample(self.arch, self.memory, self.state, hidden_TD[last_tokens], sequences)
        return 0

    def _buffer_index(self, x: TaskId) -> int:
        return (x.layer * len(self.chunks) + x.micro_batch) % BUFFERS

    def _hidden(self, x: TaskId) -> Tensor:
        num_tokens = self.chunks[x.micro_batch].num_tokens
        return self.memory.prefill.hidden_BTD[self._buffer_index(x), :num_tokens]

    def _kv_buffer(self, x: TaskId) -> Tensor:
        num_tokens = self.chunks[x.micro_batch].num_tokens
        return self.memory.prefill.kv_BT2Gd[self._buffer_index(x), :num_tokens]

    def _host(self, x: TaskId) -> Tensor:
        chunk = self.chunks[x.micro_batch]
        return self.memory.prefill.host_TD[chunk.offset : chunk.offset + chunk.num_tokens]

    def _weights(self, x: TaskId) -> LayerWeights:
        return self.memory.weights.layer(x.layer, self.pipeline.load_index(0, x.layer))


@dataclass(frozen=True, slots=True)
class DecodeHandlers:
    """Tasks of decode: one new token for every request that goes on."""

    backend: AbstractBackend
    arch: Architecture
    pipeline: Pipeline
    memory: RunMemory
    state: BatchState
    streaming_kv: tuple[int, ...]

    @staticmethod
    def make(
        backend: AbstractBackend, arch: Architecture, policy: Policy, pipeline: Pipeline,
        memory: RunMemory, state: BatchState,
    ) -> dict[TaskKind, Handler]:  # fmt: skip
        """The handler of every kind that occurs in decode."""
        spec = arch.spec
        streaming = tuple(j for j in range(pipeline.num_micro_batches) if pipeline.streams_kv(j))
        handlers = DecodeHandlers(backend, arch, pipeline, memory, state, streaming)
        size = getattr(torch, policy.dtype).itemsize
        streamed = [policy.decode_streamed_bytes(spec, i) // size for i in range(spec.num_layers)]
        pages = PageHandlers(
            backend, memory.weights, pipeline, streamed, lambda: state.num_active == 0
        )
        of_rows = {
            TaskKind.EMBED: handlers.embed,
            TaskKind.PRE_ATTENTION: handlers.pre_attention,
            TaskKind.OFFLOAD_QKV: handlers.offload_qkv,
            TaskKind.LOAD_KV: handlers.load_kv,
            TaskKind.STORE_KV: handlers.store_kv,
            TaskKind.ATTENTION: handlers.attention,
            TaskKind.LOAD_HIDDEN: handlers.load_hidden,
            TaskKind.POST_ATTENTION: handlers.post_attention,
            TaskKind.OFFLOAD_TOKENS: handlers.offload_tokens,
            TaskKind.CPU_EXPERTS: handlers.cpu_experts,
            TaskKind.LOAD_EXPERT_OUTPUT: handlers.load_expert_output,
        }
        return {
            TaskKind.STAGE_PAGE: pages.stage,
            TaskKind.LOAD_PAGE: pages.load,
            TaskKind.SAMPLE: handlers.sample,
            **{kind: handlers.on_rows(work) for kind, work in of_rows.items()},
        }

    def on_rows(self, work: Callable[[TaskId, Rows, slice], int]) -> Handler:
        """A handler that calls `work` with the requests that go on, and their rows, if any do."""
        state = self.state

        def handle(x: TaskId) -> int:
            rows = state.rows(x.micro_batch, x.step)
            if not rows.sequences:
                return 0
            first = state.first_rows[x.micro_batch]
            return work(x, rows, slice(first, first + len(rows.sequences)))

        return handle

    def embed(self, _: TaskId, rows: Rows, span: slice) -> int:
        """Gather the last tokens' embeddings on the host and move them to the GPU."""
        host_RD = self.memory.host.hidden_ND[span]
        torch.index_select(self.memory.weights.embedding, 0, rows.tokens, out=host_RD)
        return self.backend.transfer(Lane.H2D, [(self.memory.gpu.hidden_ND[span], host_RD)])

    def pre_attention(self, x: TaskId, rows: Rows, span: slice) -> int:
        """Queries, keys and values of the new tokens."""
        gpu, workspace = self.memory.gpu, self.memory.workspace
        if x.layer > 0:
            self._add_cpu_experts(x.layer - 1, span)
        workspace.reset()
        pre_attention(
            self.arch, gpu.hidden_ND[span], self._weights(x).dense, rows.positions,
            gpu.qkv_NX[span], workspace,
        )  # fmt: skip
        return 0

    def offload_qkv(self, _: TaskId, __: Rows, span: slice) -> int:
        """Queries, keys and values to the host."""
        copies = [(self.memory.host.qkv_NX[span], self.memory.gpu.qkv_NX[span])]
        return self.backend.transfer(Lane.D2H, copies)

    def load_kv(self, x: TaskId, rows: Rows, _: slice) -> int:
        """The part in use of a layer's cache to a buffer on the GPU."""
        source, target = self.memory.caches.of(x.micro_batch, x.layer), self._kv_buffer(x)
        copies: list[tuple[Tensor, Tensor]] = []
        for sequence, start in zip(rows.sequences, rows.starts, strict=True):
            # `rows` may be an earlier step's if this load runs ahead; the step itself tells how
            # many tokens the cache holds.
            used = len(sequence.placed.request.prompt) + x.step
            copies.append((target.narrow(0, start, used), source.narrow(0, start, used)))
        return self.backend.transfer(Lane.H2D, copies)

    def store_kv(self, x: TaskId, rows: Rows, span: slice) -> int:
        """New keys and values to the cache on the host."""
        first = self.arch.spec.query_size
        host_RX, gpu_RX = self.memory.host.qkv_NX[span], self.memory.gpu.qkv_NX[span]
        moved = self.backend.transfer(Lane.D2H, [(host_RX[:, first:], gpu_RX[:, first:])])
        append_kv(self.memory.caches.of(x.micro_batch, x.layer), host_RX, rows.cache_rows)
        return moved

    def attention(self, x: TaskId, rows: Rows, span: slice) -> int:
        """Append the new tokens to the cache and attend to it, on the device it is used on."""
        on_cpu = self.pipeline.attention_on_cpu(x.micro_batch)
        level = self.memory.host if on_cpu else self.memory.gpu
        if self.pipeline.streams_kv(x.micro_batch):
            cache = self._kv_buffer(x)
        else:
            cache = self.memory.caches.of(x.micro_batch, x.layer)
        qkv_RX = level.qkv_NX[span]
        append_kv(cache, qkv_RX, rows.cache_rows)
        decode_attention(
            self.arch, qkv_RX, cache, rows.starts, rows.lengths, level.attention_NQ[span]
        )
        return 0

    def load_hidden(self, _: TaskId, __: Rows, span: slice) -> int:
        """The attention output to the GPU."""
        copies = [(self.memory.gpu.attention_NQ[span], self.memory.host.attention_NQ[span])]
        return self.backend.transfer(Lane.H2D, copies)

    def post_attention(self, x: TaskId, _: Rows, span: slice) -> int:
        """Output projection, router, and the experts on the GPU."""
        gpu, workspace = self.memory.gpu, self.memory.workspace
        weights = self._weights(x)
        hidden_RD = gpu.hidden_ND[span]
        workspace.reset()
        x_RD, routing = post_attention(
            self.arch, hidden_RD, gpu.attention_NQ[span], weights.dense, workspace
        )
        experts = weights.all_experts
        if self.pipeline.cpu_experts[x.layer]:
            experts = weights.on_gpu
            gpu.routed_ND[span] = x_RD
            gpu.weights_NK[span] = routing.weights_TK
            gpu.experts_NK[span] = routing.experts_TK
        if experts:
            run_experts(x_RD, routing, experts, hidden_RD, workspace)
        return 0

    def offload_tokens(self, _: TaskId, __: Rows, span: slice) -> int:
        """Normed tokens and their routing to the host."""
        host, gpu = self.memory.host, self.memory.gpu
        copies = [
            (host.routed_ND[span], gpu.routed_ND[span]),
            (host.weights_NK[span], gpu.weights_NK[span]),
            (host.experts_NK[span], gpu.experts_NK[span]),
        ]
        return self.backend.transfer(Lane.D2H, copies)

    def cpu_experts(self, x: TaskId, _: Rows, span: slice) -> int:
        """The experts that stay on the host, computed there."""
        host, workspace = self.memory.host, self.memory.host_workspace
        output_RD = host.expert_output_ND[span].zero_()
        routing = Routing(host.weights_NK[span], host.experts_NK[span])
        workspace.reset()
        experts = self.memory.weights.host_experts[x.layer]
        run_experts(host.routed_ND[span], routing, experts, output_RD, workspace)
        return 0

    def load_expert_output(self, _: TaskId, __: Rows, span: slice) -> int:
        """Their output to the GPU; whatever comes next there adds it to the hidden states."""
        host, gpu = self.memory.host, self.memory.gpu
        copies = [(gpu.expert_output_ND[span], host.expert_output_ND[span])]
        return self.backend.transfer(Lane.H2D, copies)

    def sample(self, x: TaskId) -> int:
        """Choose the next tokens and set up the next step's rows, even if there are none."""
        self.on_rows(self._sample)(x)
        self.state.set_rows(x.micro_batch, x.step + 1)
        return 0

    def _sample(self, x: TaskId, rows: Rows, span: slice) -> int:
        self._add_cpu_experts(x.layer, span)
        hidden_RD = self.memory.gpu.hidden_ND[span]
        sample(self.arch, self.memory, self.state, hidden_RD, rows.sequences)
        return 0

    def _add_cpu_experts(self, layer: int, span: slice) -> None:
        if self.pipeline.cpu_experts[layer]:
            self.memory.gpu.hidden_ND[span] += self.memory.gpu.expert_output_ND[span]

    def _kv_buffer(self, x: TaskId) -> Tensor:
        layers = x.step * self.pipeline.num_layers + x.layer
        load_index = layers * len(self.streaming_kv) + self.streaming_kv.index(x.micro_batch)
        return self.memory.caches.buffer(load_index)

    def _weights(self, x: TaskId) -> LayerWeights:
        return self.memory.weights.layer(x.layer, self.pipeline.load_index(x.step, x.layer))


def sample(
    arch: Architecture, memory: RunMemory, state: BatchState, hidden_RD: Tensor,
    sequences: Sequence[Generated],
) -> None:  # fmt: skip
    """Choose and append the next token of each sequence, from its last hidden state."""
    workspace, head = memory.sampling_workspace, memory.weights.head
    workspace.reset()
    logits_RV = logits(arch, hidden_RD, head.final_norm, head.lm_head, workspace)
    params = [sequence.placed.request.params for sequence in sequences]
    steps = [len(sequence.tokens) for sequence in sequences]
    for sequence, token in zip(sequences, choose(logits_RV, params, steps), strict=True):
        state.append(sequence, token)
