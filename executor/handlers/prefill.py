"""Tasks of prefill: chunks of prompts, all computed on the GPU.

T tokens, D hidden, Q = heads*head_dim, X = Q+2KV, G kv heads, d head_dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from executor.backends import AbstractBackend
from executor.batching import Chunk, ChunkPart
from executor.handlers.memory import RunMemory
from executor.handlers.pages import PageHandlers
from executor.handlers.state import BatchState, sample
from executor.lanes import Handler
from executor.model import Architecture, PromptNumbers, feed_forward, post_attention, pre_attention, to_cache
from executor.weight_pages import LayerWeights
from hrm.acts import prefill
from hrm.acts.pages import WEIGHTS
from hrm.contract.temporaries import skips_in_last_layer
from hrm.policy import Policy
from hrm.schedules import Pipeline
from hrm.tasks import Act, Lane, Phase, Task


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
    numbers: list[PromptNumbers]

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
        numbers = [
            PromptNumbers.write(
                memory.prefill.host_numbers_T2[chunk.offset :].view(-1),
                [part.start for part in chunk.parts],
                [part.last - part.first for part in chunk.parts],
            )
            for chunk in chunks
        ]
        kv_on_gpu = tuple(policy.kv_on_gpu(j) for j in range(policy.num_micro_batches))
        handlers = PrefillHandlers(backend, arch, policy, pipeline, memory, state, chunks, kv_on_gpu, tokens, numbers)
        spec = arch.spec
        elements_in = policy.formats.weights.elements_in
        streamed = [elements_in(policy.streamed_bytes(spec, i, Phase.PREFILL)) for i in range(spec.num_layers)]
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

    def embed(self, x: Task) -> int:
        """Gather the prompts' embeddings on the host and move them to the GPU."""
        torch.index_select(self.memory.weights.embedding, 0, self.tokens[x.id.index], out=self._host(x))
        return self.load_hidden(x)

    def load_hidden(self, x: Task) -> int:
        """Move a chunk's hidden states to the GPU, and its numbers with them."""
        numbers = self.numbers[x.id.index].flat
        sent = self.memory.prefill.numbers_BT[x.slot(prefill.HIDDEN), : len(numbers)]
        copies = [(self._hidden(x), self._host(x)), *self.backend.gpu_kernels.copies(numbers, sent)]
        return self.backend.transfer(Lane.H2D, copies)

    def store_hidden(self, x: Task) -> int:
        """Move a chunk's hidden states to the host."""
        return self.backend.transfer(Lane.D2H, [(self._host(x), self._hidden(x))])

    def layer(self, x: Task) -> int:
        """Compute one layer over a chunk; keys and values go to their cache or the buffer.

        After attention the last layer goes on with the last tokens of prompts only, which are all
        that is sampled from.
        """
        arch, spec, workspace = self.arch, self.arch.spec, self.memory.workspace
        chunk = self.chunks[x.id.index]
        hidden_TD = self._hidden(x)
        weights = self._weights(x)
        workspace.reset()
        mixer = spec.attention
        qkv_TX = workspace.take((chunk.num_tokens, mixer.projected_size), hidden_TD.dtype)
        prompts = self._numbers(x)
        pre_attention(arch, hidden_TD, weights.dense.attention, prompts.positions_T, qkv_TX, workspace)
        if not all(self.kv_on_gpu):
            self._kv_buffer(x).copy_(to_cache(mixer, qkv_TX))
        attention_TQ = workspace.take((chunk.num_tokens, mixer.returned_elements), hidden_TD.dtype)
        kept = [self._kept(part, x.id.layer) for part in chunk.parts]
        self.backend.gpu_kernels.prefill_attention(arch, qkv_TX, prompts, kept, attention_TQ, workspace)
        num_ending = sum(part.ends for part in chunk.parts)
        is_last = x.id.layer == spec.num_layers - 1
        if not is_last or not skips_in_last_layer(num_ending, chunk.num_tokens):
            self._after_attention(x, hidden_TD, attention_TQ, weights)
        elif num_ending:
            last_R = self._last_tokens(x).long()
            hidden_RD = workspace.take((num_ending, spec.hidden_size), hidden_TD.dtype)
            attention_RQ = workspace.take((num_ending, mixer.returned_elements), hidden_TD.dtype)
            torch.index_select(hidden_TD, 0, last_R, out=hidden_RD)
            torch.index_select(attention_TQ, 0, last_R, out=attention_RQ)
            self._after_attention(x, hidden_RD, attention_RQ, weights)
            hidden_TD.index_copy_(0, last_R, hidden_RD)
        return 0

    def _after_attention(self, x: Task, hidden_TD: Tensor, attention_TQ: Tensor, weights: LayerWeights) -> None:
        """The rest of a layer, for all of a chunk's tokens or some."""
        if not weights.has_experts:
            feed_forward(self.arch, hidden_TD, attention_TQ, weights.dense, self.memory.workspace)
            return
        x_TD, routing = post_attention(self.arch, hidden_TD, attention_TQ, weights.dense, self.memory.workspace)
        counts = self.backend.gpu_kernels.run_experts(
            x_TD,
            routing,
            weights.experts,
            hidden_TD,
            self.memory.workspace,
            rows_at_once=self.memory.tokens_at_once,
            num_experts=self.arch.spec.num_experts,
        )
        self.state.count_routed(x.id.layer, counts)

    def store_kv(self, x: Task) -> int:
        """Move new keys and values to those caches that live on the host."""
        buffer = self._kv_buffer(x)
        copies = [
            (self._cache(part, x.id.layer)[part.start :], buffer[part.first : part.last])
            for part in self.chunks[x.id.index].parts
            if not self.kv_on_gpu[part.micro_batch]
        ]
        return self.backend.transfer(Lane.D2H, copies)

    def sample(self, x: Task) -> int:
        """Choose the first token of each prompt that ends in a chunk, at most μ at once."""
        parts = [part for part in self.chunks[x.id.index].parts if part.ends]
        hidden_TD, most = self._hidden(x), self.policy.micro_batch_size
        last_R = self._last_tokens(x)
        for first in range(0, len(parts), most):
            piece = slice(first, first + most)
            sequences = [self.state.by_placed[id(part.placed)] for part in parts[piece]]
            sample(self.arch, self.memory, self.state, hidden_TD[last_R[piece]], sequences)
        return 0

    def _last_tokens(self, x: Task) -> Tensor:
        """Where each prompt that ends in a chunk has its last token, on the GPU's level.

        Only the last part of a chunk may be of a prompt that goes on in the next.
        """
        num_ending = sum(part.ends for part in self.chunks[x.id.index].parts)
        return self._numbers(x).ends[1 : 1 + num_ending] - 1

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

    def _numbers(self, x: Task) -> PromptNumbers:
        """A chunk's numbers, on the GPU since its hidden states came."""
        sent = self.memory.prefill.numbers_BT[x.slot(prefill.HIDDEN)]
        return self.backend.gpu_kernels.numbers(self.numbers[x.id.index], sent)

    def _hidden(self, x: Task) -> Tensor:
        num_tokens = self.chunks[x.id.index].num_tokens
        return self.memory.prefill.hidden_BTD[x.slot(prefill.HIDDEN), :num_tokens]

    def _kv_buffer(self, x: Task) -> Tensor:
        num_tokens = self.chunks[x.id.index].num_tokens
        return self.memory.prefill.kv_BT2Gd[x.slot(prefill.KV), :num_tokens]

    def _host(self, x: Task) -> Tensor:
        chunk = self.chunks[x.id.index]
        return self.memory.prefill.host_TD[chunk.offset : chunk.offset + chunk.num_tokens]

    def _weights(self, x: Task) -> LayerWeights:
        return self.memory.weights.layer(x.id.layer, x.slot(WEIGHTS))
