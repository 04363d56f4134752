"""Tasks of prefill: chunks of prompts, computed on the GPU but for experts that may stay on the host.

T tokens, D hidden; X elements of a row between projections and attention, O of attention's output.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from executor.batching import Chunk, ChunkPart
from executor.handlers.added import added
from executor.handlers.feed_forward import PhaseHandlers
from executor.handlers.memory import PrefillBuffers, Routed
from executor.handlers.pages import PageHandlers
from executor.handlers.state import Generated, sample
from executor.kv_cache import cache_rows, prefix_rows
from executor.lanes import Handler
from executor.model import PromptNumbers, embed
from executor.model.in_place import clear
from executor.model.kv_rows import dequantise, quantise
from hrm.acts import prefill
from hrm.contract.temporaries import skips_in_last_layer
from hrm.tasks import Act, Lane, Phase, Task


@dataclass(frozen=True, slots=True)
class Prompts:
    """Chunks of prompts, each with its tokens and with the numbers that attention needs."""

    chunks: tuple[Chunk, ...]
    tokens: list[Tensor]
    numbers: list[PromptNumbers]

    @staticmethod
    def write(chunks: tuple[Chunk, ...], to: PrefillBuffers) -> "Prompts":
        """Write the numbers to where they are sent from."""
        tokens = [torch.tensor([token for part in chunk.parts for token in part.tokens]) for chunk in chunks]
        numbers = [
            PromptNumbers.write(
                to.host_numbers_T2[chunk.offset :].view(-1),
                [part.start for part in chunk.parts],
                [part.last - part.first for part in chunk.parts],
            )
            for chunk in chunks
        ]
        return Prompts(chunks, tokens, numbers)


@dataclass(frozen=True, slots=True)
class PrefillHandlers(PhaseHandlers):
    """Tasks of prefill: chunks of prompts.

    First tokens are appended to the batch, unless something else is to `choose`: it is handed the last hidden states of
    prompts that end.
    """

    prompts: Prompts
    choose: Callable[[Tensor, Sequence[Generated]], object] | None = None

    def by_act(self) -> dict[Act, Handler]:
        """The handler of every act that occurs in prefill."""
        spec = self.arch.spec
        streamed = [self.policy.streamed_bytes(spec, i, Phase.PREFILL) for i in range(spec.num_layers)]
        pages = PageHandlers(self.backend, self.memory.weights, self.pipeline, streamed, lambda: False)
        return {
            **pages.by_act(),
            prefill.PART_EXPERTS: self.part_experts,
            prefill.EMBED: self.embed,
            prefill.LOAD_HIDDEN: self.load_hidden,
            prefill.REDUCE_HIDDEN: self.reduce,
            prefill.PREFILL_ATTENTION: self.attention,
            prefill.REDUCE_ATTENTION: self.reduce,
            prefill.PREFILL_LAYER: self.layer,
            prefill.STORE_KV: self.store_kv,
            prefill.OFFLOAD_TOKENS: self.offload_tokens,
            prefill.STORE_HIDDEN: self.store_hidden,
            prefill.CPU_EXPERTS: self.cpu_experts,
            prefill.LOAD_EXPERT_OUTPUT: self.load_expert_output,
            prefill.REDUCE_LAST: self.reduce_last,
            prefill.SAMPLE: self.sample,
            **added(self, Phase.PREFILL),
        }

    def embed(self, x: Task) -> int:
        """Gather the prompts' embeddings on the host and move them to the GPU."""
        embedding, scale, first_token = self.memory.weights.embedding, self.arch.embedding_scale, self.arch.first_token
        embed(embedding, self.prompts.tokens[x.id.index], self.host(x), scale=scale, first_token=first_token)
        return self.load_hidden(x)

    def load_hidden(self, x: Task) -> int:
        """Move a chunk's hidden states to the GPU, and its numbers with them."""
        numbers = self.prompts.numbers[x.id.index].flat
        sent = self.memory.prefill.numbers_BT[x.slot(prefill.HIDDEN), : len(numbers)]
        copies = [(self._hidden(x), self.host(x)), *self.backend.gpu_kernels.copies(numbers, sent)]
        return self.backend.transfer(Lane.H2D, copies)

    def store_hidden(self, x: Task) -> int:
        """Move a chunk's hidden states to the host."""
        return self.backend.transfer(Lane.D2H, [(self.host(x), self._hidden(x))])

    def reduce(self, x: Task) -> int:
        """What ranks have of a chunk's hidden states, summed up: before a layer, or after its attention."""
        is_before = x.id.act is prefill.REDUCE_HIDDEN
        hidden_TD = self._hidden(x)
        self.group.all_reduce(hidden_TD if is_before else hidden_TD[: self._num_going_on(x)])
        return 0

    def layer(self, x: Task) -> int:
        """Compute one layer over a chunk, attention first."""
        if self.group.size == 1:
            self.attention(x)
        if num_going_on := self._num_going_on(x):
            self.memory.workspace.reset()
            to_cpu = self._routed(x) if self.pipeline.cpu_experts[x.id.layer] else None
            self.ffn_on_gpu(x.id.layer, self._hidden(x)[:num_going_on], self._weights(x), to_cpu)
        return 0

    def attention(self, x: Task) -> int:
        """Compute one layer over a chunk up to the output projection; keys and values go to their cache or the buffer.

        After attention the last layer goes on with the last tokens of prompts only, which are all
        that is sampled from: their hidden states are then the chunk's first ones.
        """
        workspace, mixer = self.memory.workspace, self._mixer(x)
        chunk, hidden_TD, weights = self.prompts.chunks[x.id.index], self._hidden(x), self._weights(x)
        workspace.reset()

        def take(width: int, tokens: int = chunk.num_tokens) -> Tensor:
            return workspace.take((tokens, width), hidden_TD.dtype)

        row_TX, held_TS = take(mixer.block.sent_elements), take(mixer.block.held_elements)
        prompts = self._numbers(x)
        mixer.project(hidden_TD, weights.dense.mixer, prompts.positions_T, row_TX, held_TS, workspace)
        attention_TO = take(mixer.block.returned_elements)
        if mixer.has_state:
            kept = [self._state(x, index) for index in range(len(chunk.parts))]
        else:
            kept = [self._kept(x, part) for part in chunk.parts]
            self._write_cached(x, mixer.cached(row_TX))
        mixer.prefill(self.backend.gpu_kernels, row_TX, weights.dense.mixer, prompts, kept, attention_TO, workspace)
        self._keep_in_turn(x, mixer.cached(row_TX))
        if self._skips(x):
            last_R, num_ending = self._last_tokens(x).long(), self._num_going_on(x)
            hidden_RD, attention_TO, held_TS = (
                torch.index_select(part, 0, last_R, out=take(part.shape[1], num_ending))
                for part in (hidden_TD, attention_TO, held_TS)
            )
            hidden_TD = hidden_TD[:num_ending].copy_(hidden_RD)
        if self.group.rank > 0:
            clear(hidden_TD)
        if len(hidden_TD):
            mixer.finish(attention_TO, held_TS, weights.dense.mixer, hidden_TD, workspace)
        return 0

    def _skips(self, x: Task) -> bool:
        """Whether the layer goes on after attention with the chunk's last tokens of prompts only."""
        chunk = self.prompts.chunks[x.id.index]
        is_last = x.id.layer == len(self.arch.layers) - 1 and self.arch.spec.has_head
        return is_last and skips_in_last_layer(sum(part.ends for part in chunk.parts), chunk.num_tokens)

    def _num_going_on(self, x: Task) -> int:
        """With how many tokens the layer goes on after attention."""
        chunk = self.prompts.chunks[x.id.index]
        return sum(part.ends for part in chunk.parts) if self._skips(x) else chunk.num_tokens

    def _write_cached(self, x: Task, cached_TW: Tensor) -> None:
        """Write what is cached of a chunk to the buffer, by which it goes to the host or to caches of codes.

        Where it is quantised, `cached_TW` becomes what the codes mean: every token sees the same of
        another, in whichever chunk or step it does.
        """
        if self.policy.formats.kv_cache.is_scaled:
            buffer, parts = self._kv_buffer(x, len(cached_TW)), self._mixer(x).block.cached_parts
            quantise(cached_TW, parts, buffer)
            dequantise(buffer, parts, cached_TW)
        elif self.policy.gpu_kv_micro_batches < self.policy.num_micro_batches:
            buffer = self._kv_buffer(x, len(cached_TW))
            if not self._keeps_prefix(x):
                buffer.copy_(cached_TW)
                return
            for part in self.prompts.chunks[x.id.index].parts:
                if not self._is_whole(part):  # else attention does
                    buffer[part.first : part.last].copy_(cached_TW[part.first : part.last])

    def _keep_in_turn(self, x: Task, cached_TW: Tensor) -> None:
        """Write to the GPU's caches what attention did not, which needs tokens in another form or order."""
        if self._keeps_prefix(x):
            return
        if self.policy.formats.kv_cache.is_scaled:
            cached_TW = self._kv_buffer(x, len(cached_TW))
        for part in self.prompts.chunks[x.id.index].parts:
            if self.policy.kv_on_gpu(part.micro_batch):
                for target, source in self._in_turn(x, part, cached_TW):
                    target.copy_(source)

    def _in_turn(self, x: Task, part: ChunkPart, rows_TW: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Where those rows of a chunk that a part's cache keeps go, and the rows themselves."""
        reach = self._mixer(x).reach
        cache, start = self.memory.caches.of(part.micro_batch, x.id.layer), self.state.cache_start(part.placed, reach)
        return [
            (cache.narrow(0, start + row, count), rows_TW.narrow(0, part.first + token - part.start, count))
            for token, row, count in reach.spans(part.start, part.end)
        ]

    def offload_tokens(self, x: Task) -> int:
        """Normed tokens, their routing, and what waits for their experts, to the host."""
        return self.backend.transfer(Lane.D2H, self._routed(x).copies_to(self._host_routed(x)))

    def cpu_experts(self, x: Task) -> int:
        """The experts that stay on the host, computed there.

        Their output is added to the chunk's hidden states, which are there between layers; after the
        last one it is alone.
        """
        routed = self._host_routed(x)
        output_TD = self.host(x)[: len(routed.tokens_TD)]
        if x.id.layer == len(self.arch.layers) - 1:
            output_TD.zero_()
        self.ffn_on_cpu(x.id.layer, routed, output_TD)
        return 0

    def load_expert_output(self, x: Task) -> int:
        """Their output after the last layer to the GPU, where their input was."""
        output_TD = self._routed(x).tokens_TD
        return self.backend.transfer(Lane.H2D, [(output_TD, self.host(x)[: len(output_TD)])])

    def store_kv(self, x: Task) -> int:
        """Move new keys and values, or states of prompts that end, to those caches that live on the host."""
        chunk, has_state = self.prompts.chunks[x.id.index], self._mixer(x).has_state
        buffer = self._kv_buffer(x, len(chunk.parts) if has_state else chunk.num_tokens)
        copies: list[tuple[Tensor, Tensor]] = []
        for index, part in enumerate(chunk.parts):
            if self.policy.kv_on_gpu(part.micro_batch):
                continue
            if not has_state:
                copies += self._in_turn(x, part, buffer)
            elif part.ends:
                copies.append((self._cache_of_state(x, part), buffer.narrow(0, index, 1)))
        return self.backend.transfer(Lane.D2H, copies)

    def reduce_last(self, x: Task) -> int:
        """What ranks have of prompts' ends after the last layer, summed up where a chunk's hidden states begin."""
        hidden_TD = self._hidden(x)
        num_ending = sum(part.ends for part in self.prompts.chunks[x.id.index].parts)
        ends_RD = self._ends(x, slice(0, num_ending))
        self.group.all_reduce(hidden_TD[:num_ending].copy_(ends_RD))
        return 0

    def sample(self, x: Task) -> int:
        """Choose the first token of each prompt that ends in a chunk, at most μ at once."""
        parts = [part for part in self.prompts.chunks[x.id.index].parts if part.ends]
        for first in range(0, len(parts), self.policy.micro_batch_size):
            piece = slice(first, min(first + self.policy.micro_batch_size, len(parts)))
            sequences = [self.state.by_placed[id(part.placed)] for part in parts[piece]]
            hidden_RD = self._ends(x, piece) if self.group.size == 1 else self._hidden(x)[piece]
            if self.choose is not None:
                self.choose(hidden_RD, sequences)
            else:
                sample(self.arch, self.memory, self.state, self.group, hidden_RD, sequences)
        return 0

    def after_layers(self, x: Task) -> Tensor:
        """Hidden states of a whole chunk after the last layer, with the CPU's experts."""
        hidden_TD = self._hidden(x)
        if self.pipeline.cpu_experts[x.id.layer]:
            hidden_TD += self._routed(x).tokens_TD
        return hidden_TD

    def _ends(self, x: Task, piece: slice) -> Tensor:
        """A copy of the hidden states of some prompts' ends after the last layer, with the CPU's experts."""
        where = piece if self._skips(x) else self._last_tokens(x)[piece]
        hidden_RD = self._hidden(x)[where]
        if self.pipeline.cpu_experts[x.id.layer]:
            hidden_RD += self._routed(x).tokens_TD[where]
        return hidden_RD

    def _last_tokens(self, x: Task) -> Tensor:
        """Where each prompt that ends in a chunk has its last token, on the GPU's level.

        Only the last part of a chunk may be of a prompt that goes on in the next.
        """
        num_ending = sum(part.ends for part in self.prompts.chunks[x.id.index].parts)
        return self._numbers(x).ends[1 : 1 + num_ending] - 1

    def _cache(self, part: ChunkPart, layer: int) -> Tensor:
        """The prompt's part of its micro-batch's cache, as far as the end of the part."""
        start = self.state.cache_start(part.placed, self.arch.layers[layer].mixer.reach)
        return self.memory.caches.of(part.micro_batch, layer)[start : start + part.end]

    def _kept(self, x: Task, part: ChunkPart) -> Tensor | None:
        """Where the GPU has a prompt's keys and values up to the end of the part, if it has.

        A cache is such a place if it has them as attention needs them, and so are the rows of a whole prompt by which
        they go to the host's.
        """
        if self.policy.kv_on_gpu(part.micro_batch) and self._keeps_prefix(x):
            return self._cache(part, x.id.layer)
        if not self._is_whole(part):
            return prefix_rows(self._mixer(x).prefix_elements, self.policy, self.memory.prefill.prefix)[: part.end]
        return self._kv_buffer(x, part.last)[part.first :] if self._keeps_prefix(x) else None

    def _keeps_prefix(self, x: Task) -> bool:
        return self._mixer(x).block.keeps_prefix_in_cache(self.policy.formats)

    @staticmethod
    def _is_whole(part: ChunkPart) -> bool:
        return part.start == 0 and part.ends

    def _state(self, x: Task, index: int) -> Tensor:
        """Where a part of a prompt finds the state before it and leaves that after it, zeros before the first.

        That is its cache on the GPU; else the buffer, by whose rows the states of prompts that end go to
        the host; or until then where a split prompt's earlier parts are kept. One that ends leaves that
        place, for another may begin there in the same chunk.
        """
        part = self.prompts.chunks[x.id.index].parts[index]
        kept = cache_rows(self.arch.spec.layers[x.id.layer], self.policy, self.memory.prefill.prefix)[:1]
        if self.policy.kv_on_gpu(part.micro_batch):
            kept = state = self._cache_of_state(x, part)
        else:
            state = self._kv_buffer(x, index + 1)[index:] if part.ends else kept
        if not part.start:
            state.zero_()
        elif state is not kept:
            state.copy_(kept)
        return state

    def _cache_of_state(self, x: Task, part: ChunkPart) -> Tensor:
        start = self.state.cache_start(part.placed, self._mixer(x).reach)
        return self.memory.caches.of(part.micro_batch, x.id.layer).narrow(0, start, 1)

    def _numbers(self, x: Task) -> PromptNumbers:
        """A chunk's numbers, on the GPU since its hidden states came."""
        sent = self.memory.prefill.numbers_BT[x.slot(prefill.HIDDEN)]
        return self.backend.gpu_kernels.numbers(self.prompts.numbers[x.id.index], sent)

    def _hidden(self, x: Task) -> Tensor:
        num_tokens = self.prompts.chunks[x.id.index].num_tokens
        return self.memory.prefill.hidden_BTD[x.slot(prefill.HIDDEN), :num_tokens]

    def _routed(self, x: Task) -> Routed:
        """What goes to the CPU's experts, or comes back, on the GPU."""
        return self.memory.prefill.routed.of(x.slot(prefill.ROUTED), self._num_going_on(x))

    def _host_routed(self, x: Task) -> Routed:
        return self.memory.prefill.host_routed.of(x.slot(prefill.HOST_ROUTED), self._num_going_on(x))

    def _kv_buffer(self, x: Task, num_rows: int) -> Tensor:
        buffer = self.memory.prefill.kv_B[x.slot(prefill.KV)]
        return cache_rows(self.arch.spec.layers[x.id.layer], self.policy, buffer)[:num_rows]

    def host(self, x: Task) -> Tensor:
        """A chunk's hidden states on the host."""
        chunk = self.prompts.chunks[x.id.index]
        return self.memory.prefill.host_TD[chunk.offset : chunk.offset + chunk.num_tokens]
