"""Tasks of prefill: chunks of prompts, all computed on the GPU.

T tokens, D hidden, Q = heads*head_dim, X = Q+2KV, G kv heads, d head_dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from executor.backends import AbstractBackend
from executor.batching import Chunk, ChunkPart
from executor.handlers.experts import experts_on_gpu
from executor.handlers.memory import RunMemory
from executor.handlers.pages import PageHandlers
from executor.handlers.state import BatchState, sample
from executor.lanes import Handler
from executor.model import Architecture, post_attention, pre_attention, prefill_attention
from executor.weight_pages import LayerWeights
from hrm.acts import prefill
from hrm.contract.rings import BUFFERS
from hrm.contract.rows import NUMBERS_PER_TOKEN
from hrm.contract.temporaries import skips_in_last_layer
from hrm.policy import Policy
from hrm.schedules import Pipeline
from hrm.tasks import Act, Lane, TaskId


@dataclass(frozen=True, slots=True)
class PrefillHandlers:
    """Tasks of prefill: chunks of prompts, all computed on the GPU."""

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
        backend: AbstractBackend,
        arch: Architecture,
        policy: Policy,
        pipeline: Pipeline,
        memory: RunMemory,
        state: BatchState,
        chunks: tuple[Chunk, ...],
    ) -> dict[Act, Handler]:
        """The handler of every act that occurs in prefill."""
        tokens = [torch.tensor([token for part in chunk.parts for token in part.tokens]) for chunk in chunks]
        positions = [torch.cat([torch.arange(part.start, part.end) for part in chunk.parts]) for chunk in chunks]
        kv_on_gpu = tuple(policy.kv_on_gpu(j) for j in range(policy.num_micro_batches))
        handlers = PrefillHandlers(backend, arch, policy, pipeline, memory, state, chunks, kv_on_gpu, tokens, positions)
        if not backend.shares_memory:
            handlers.write_numbers()
        spec = arch.spec
        elements_in = policy.formats.weights.elements_in
        streamed = [elements_in(policy.streamed_bytes(spec, i)) for i in range(spec.num_layers)]
        pages = PageHandlers(backend, memory.weights, pipeline, streamed, lambda: False)
        return {
            prefill.STAGE_PAGE: pages.stage,
            prefill.LOAD_PAGE: pages.load,
            prefill.EMBED: handlers.embed,
            prefill.LOAD_HIDDEN: handlers.load_hidden,
            prefill.PREFILL_LAYER: handlers.layer,
            prefill.STORE_KV: handlers.store_kv,
            prefill.STORE_HIDDEN: handlers.store_hidden,
            prefill.SAMPLE: handlers.sample,
        }

    def write_numbers(self) -> None:
        """Every chunk's positions and ends of prompts, into memory that a device reads."""
        for index, chunk in enumerate(self.chunks):
            positions, ends = _number_views(self._host_numbers(index), chunk)
            positions.copy_(self.positions[index])
            ends.copy_(torch.tensor([0, *(part.last for part in chunk.parts)]))

    def embed(self, x: TaskId) -> int:
        """Gather the prompts' embeddings on the host and move them to the GPU."""
        torch.index_select(self.memory.weights.embedding, 0, self.tokens[x.index], out=self._host(x))
        return self.load_hidden(x)

    def load_hidden(self, x: TaskId) -> int:
        """Move a chunk's hidden states to the GPU."""
        copies = [(self._hidden(x), self._host(x))]
        if not self.backend.shares_memory:
            copies.append((self._numbers(x), self._host_numbers(x.index)))
        return self.backend.transfer(Lane.H2D, copies)

    def store_hidden(self, x: TaskId) -> int:
        """Move a chunk's hidden states to the host."""
        return self.backend.transfer(Lane.D2H, [(self._host(x), self._hidden(x))])

    def layer(self, x: TaskId) -> int:
        """Compute one layer over a chunk; keys and values go to their cache or the buffer.

        After attention the last layer goes on with the last tokens of prompts only, which are all
        that is sampled from.
        """
        arch, spec, workspace = self.arch, self.arch.spec, self.memory.workspace
        chunk = self.chunks[x.index]
        hidden_TD = self._hidden(x)
        weights = self._weights(x)
        workspace.reset()
        width = spec.query_size + 2 * spec.kv_size
        qkv_TX = workspace.take((chunk.num_tokens, width), hidden_TD.dtype)
        kernels = self.backend.gpu_kernels
        positions, ends = self.positions[x.index], None
        if kernels is not None:
            positions, ends = _number_views(self._numbers(x), chunk)
        pre_attention(arch, hidden_TD, weights.dense, positions, qkv_TX, workspace)
        kv_T2Gd = qkv_TX[:, spec.query_size :].view(-1, 2, spec.num_kv_heads, spec.head_dim)
        if not all(self.kv_on_gpu):
            self._kv_buffer(x).copy_(kv_T2Gd)
        attention_TQ = workspace.take((chunk.num_tokens, spec.query_size), hidden_TD.dtype)
        lengths = [part.last - part.first for part in chunk.parts]
        kept = [self._kept(part, x.layer) for part in chunk.parts]
        if kernels is None or ends is None:
            prefill_attention(arch, qkv_TX, lengths, kept, attention_TQ, workspace)
        else:
            kernels.prefill_attention(arch, qkv_TX, lengths, ends, kept, attention_TQ, workspace)
        num_ending = sum(part.ends for part in chunk.parts)
        is_last = x.layer == spec.num_layers - 1
        if not is_last or not skips_in_last_layer(num_ending, chunk.num_tokens):
            self._after_attention(x, hidden_TD, attention_TQ, weights)
        elif num_ending:
            last_R = self._last_tokens(x).long()
            hidden_RD = workspace.take((num_ending, spec.hidden_size), hidden_TD.dtype)
            attention_RQ = workspace.take((num_ending, spec.query_size), hidden_TD.dtype)
            torch.index_select(hidden_TD, 0, last_R, out=hidden_RD)
            torch.index_select(attention_TQ, 0, last_R, out=attention_RQ)
            self._after_attention(x, hidden_RD, attention_RQ, weights)
            hidden_TD.index_copy_(0, last_R, hidden_RD)
        return 0

    def _after_attention(self, x: TaskId, hidden_TD: Tensor, attention_TQ: Tensor, weights: LayerWeights) -> None:
        """The rest of a layer, for all of a chunk's tokens or some."""
        x_TD, routing = post_attention(self.arch, hidden_TD, attention_TQ, weights.dense, self.memory.workspace)
        counts = experts_on_gpu(
            self.backend, self.memory, x_TD, routing, weights.all_experts, weights.all_stacks, hidden_TD
        )
        self.state.count_routed(x.layer, counts)

    def store_kv(self, x: TaskId) -> int:
        """Move new keys and values to those caches that live on the host."""
        buffer = self._kv_buffer(x)
        copies = [
            (self._cache(part, x.layer)[part.start :], buffer[part.first : part.last])
            for part in self.chunks[x.index].parts
            if not self.kv_on_gpu[part.micro_batch]
        ]
        return self.backend.transfer(Lane.D2H, copies)

    def sample(self, x: TaskId) -> int:
        """Choose the first token of each prompt that ends in a chunk, at most μ at once."""
        parts = [part for part in self.chunks[x.index].parts if part.ends]
        hidden_TD, most = self._hidden(x), self.policy.micro_batch_size
        last_R = self._last_tokens(x)
        for first in range(0, len(parts), most):
            piece = slice(first, first + most)
            sequences = [self.state.by_placed[id(part.placed)] for part in parts[piece]]
            sample(self.arch, self.memory, self.state, hidden_TD[last_R[piece]], sequences)
        return 0

    def _last_tokens(self, x: TaskId) -> Tensor:
        """Where each prompt that ends in a chunk has its last token, on the GPU's level.

        Only the last part of a chunk may be of a prompt that goes on in the next.
        """
        chunk = self.chunks[x.index]
        last_tokens = [part.last - 1 for part in chunk.parts if part.ends]
        if self.backend.shares_memory:
            return torch.tensor(last_tokens, dtype=torch.int64)
        _, ends = _number_views(self._numbers(x), chunk)
        return ends[1 : 1 + len(last_tokens)] - 1

    def _cache(self, part: ChunkPart, layer: int) -> Tensor:
        """The prompt's part of its micro-batch's cache, as far as the end of the part."""
        start = part.placed.start
        return self.memory.caches.of(part.micro_batch, layer)[start : start + part.end]

    def _kept(self, part: ChunkPart, layer: int) -> Tensor | None:
        """Where the GPU keeps a prompt's keys and values up to the end of the part, if it does."""
        if self.kv_on_gpu[part.micro_batch]:
            return self._cache(part, layer)
        is_whole = part.start == 0 and part.ends
        return None if is_whole else self.memory.prefill.prefix_C2Gd[: part.end]

    def _buffer_index(self, x: TaskId) -> int:
        return (x.layer * len(self.chunks) + x.index) % BUFFERS

    def _numbers(self, x: TaskId) -> Tensor:
        """A chunk's numbers on the GPU; they come with its hidden states."""
        count = _num_numbers(self.chunks[x.index])
        return self.memory.prefill.numbers_BT[self._buffer_index(x), :count]

    def _host_numbers(self, index: int) -> Tensor:
        chunk = self.chunks[index]
        start = NUMBERS_PER_TOKEN * chunk.offset
        return self.memory.prefill.host_numbers[start : start + _num_numbers(chunk)]

    def _hidden(self, x: TaskId) -> Tensor:
        num_tokens = self.chunks[x.index].num_tokens
        return self.memory.prefill.hidden_BTD[self._buffer_index(x), :num_tokens]

    def _kv_buffer(self, x: TaskId) -> Tensor:
        num_tokens = self.chunks[x.index].num_tokens
        return self.memory.prefill.kv_BT2Gd[self._buffer_index(x), :num_tokens]

    def _host(self, x: TaskId) -> Tensor:
        chunk = self.chunks[x.index]
        return self.memory.prefill.host_TD[chunk.offset : chunk.offset + chunk.num_tokens]

    def _weights(self, x: TaskId) -> LayerWeights:
        return self.memory.weights.layer(x.layer, self.pipeline.load_index(0, x.layer))


def _num_numbers(chunk: Chunk) -> int:
    """int64 that hold a chunk's positions and, as int32, 0 and the end of each prompt."""
    return chunk.num_tokens + (len(chunk.parts) + 2) // 2


def _number_views(flat: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """A chunk's positions, int64, and 0 followed by where each prompt ends, int32."""
    ends = flat[chunk.num_tokens :].view(torch.int32)
    return flat[: chunk.num_tokens], ends[: len(chunk.parts) + 1]
