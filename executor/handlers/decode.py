"""Tasks of decode: one new token for every request that goes on.

R requests, D hidden, N rows of a batch's buffers, K experts per token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from executor.handlers.added import added
from executor.handlers.feed_forward import PhaseHandlers
from executor.handlers.memory import Exchange, narrow
from executor.handlers.pages import PageHandlers
from executor.handlers.state import Rows, sample
from executor.handlers.tapes import TapedWork, Tapes
from executor.lanes import Handler
from executor.model import CpuKernels, Mixer, RowNumbers, embed
from executor.model.in_place import add, clear
from hrm.acts import decode
from hrm.contract.rows import NUMBERS_PER_REQUEST
from hrm.tasks import Act, Lane, Phase, Task
from hrm.units import KIB

SMALLEST_GAP_BYTES: Final = 64 * KIB  # that a device passes over: it moves these as soon as it begins another copy


@dataclass(frozen=True, slots=True)
class DecodeHandlers(PhaseHandlers):
    """Tasks of decode: one new token for every request that goes on, of so many `batches` whose steps take turns."""

    batches: int = 1

    def by_act(self) -> dict[Act, Handler]:
        """The handler of every act that occurs in decode."""
        spec, state = self.arch.spec, self.state
        streamed = [self.policy.streamed_bytes(spec, i, Phase.DECODE) for i in range(spec.num_layers)]
        pages = PageHandlers(self.backend, self.memory.weights, self.pipeline, streamed, lambda: state.num_active == 0)
        tapes = Tapes(self.arch, self.pipeline, state, weights_move=any(streamed))
        taped = tapes.taped if self.backend.gpu_kernels.shares_memory else lambda work: work
        # What waits for parts of experts is made anew for each of them.
        in_parts = any(map(self.pipeline.parts_of, range(spec.num_layers)))
        of_rows: dict[Act, TapedWork] = {
            decode.EMBED: self.embed,
            decode.REDUCE_HIDDEN: self.reduce_hidden,
            decode.PRE_ATTENTION: taped(self.pre_attention),
            decode.OFFLOAD_QKV: self.offload_qkv,
            decode.LOAD_KV: self.load_kv,
            decode.STORE_KV: self.store_kv,
            decode.ATTENTION: taped(self.attention),
            decode.CPU_ATTENTION: tapes.taped(self.attention),
            decode.LOAD_HIDDEN: self.load_hidden,
            decode.OUTPUT_PROJECTION: taped(self.output_projection),
            decode.REDUCE_ATTENTION: self.reduce_attention,
            decode.POST_ATTENTION: self.post_attention if in_parts else taped(self.post_attention),
            decode.OFFLOAD_TOKENS: self.offload_tokens,
            decode.CPU_EXPERTS: tapes.taped(self.cpu_experts),
            decode.LOAD_EXPERT_OUTPUT: self.load_expert_output,
            decode.REDUCE_LAST: self.reduce_last,
        }
        return {
            **pages.by_act(),
            decode.PART_EXPERTS: self.part_experts,
            decode.SAMPLE: self.sample,
            **{act: self.on_rows(work) for act, work in of_rows.items()},
            **added(self, Phase.DECODE),
        }

    def step(self, x: Task) -> int:
        """Which of the batch's own steps the task is in."""
        return x.id.step // self.batches

    def on_rows(self, work: TapedWork) -> Handler:
        """A handler that calls `work` with the requests that go on, and their rows, if any do."""
        state, batches = self.state, self.batches

        def handle(x: Task) -> int:
            rows = state.rows(x.id.index, x.id.step // batches)
            if not rows.sequences:
                return 0
            first = state.first_rows[x.id.index]
            return work(x, rows, slice(first, first + len(rows.sequences)))

        return handle

    def embed(self, _: Task, rows: Rows, span: slice) -> int:
        """Gather the last tokens' embeddings on the host and move them to the GPU."""
        host_RD, arch = self.memory.host.hidden_ND[span], self.arch
        scale, first_token = arch.embedding_scale, arch.first_token
        embed(self.memory.weights.embedding, rows.tokens, host_RD, scale=scale, first_token=first_token)
        return self.enter(rows, span)

    def enter(self, rows: Rows, span: slice) -> int:
        """Move hidden states from the host to the GPU, and the step's numbers with them."""
        host, gpu = self.memory.host, self.memory.gpu
        place, copies = _numbers_of(span), [(gpu.hidden_ND[span], host.hidden_ND[span])]
        for numbers, here, there in zip(rows.numbers.values(), host.numbers, gpu.numbers, strict=True):
            copies += self.backend.gpu_kernels.sent(numbers, here[place], there[place])
        return self.backend.transfer(Lane.H2D, copies)

    def reduce_hidden(self, x: Task, _: Rows, span: slice) -> int:
        """What ranks have of embeddings, or of the layer before, summed up."""
        if x.id.layer > 0:
            self._add_cpu_experts(x.id.layer - 1, span)
        return self._reduce(span)

    def pre_attention(self, x: Task, rows: Rows, span: slice) -> int:
        """Queries, keys and values of the new tokens, as they go to the cache."""
        gpu, workspace, mixer = self.memory.gpu, self.memory.workspace, self._mixer(x)
        if x.id.layer > 0 and self.group.size == 1:
            self._add_cpu_experts(x.id.layer - 1, span)
        workspace.reset()
        positions_R = self._numbers(mixer, rows, span).positions_R
        weights = self._weights(x).dense.mixer
        held_RS = narrow(gpu.held_NS, span, mixer.block.held_elements)
        given = gpu.hidden_ND[span], weights, positions_R
        rows_RX = self._rows(gpu, x, span)
        if mixer.has_state or not self.policy.formats.kv_cache.is_scaled:
            mixer.project(*given, rows_RX, held_RS, workspace)
        else:
            plain_RX = workspace.take((len(rows_RX), mixer.block.sent_elements), rows_RX.dtype)
            mixer.project(*given, plain_RX, held_RS, workspace)
            mixer.pack(plain_RX, rows_RX, self.memory.caches.of(x.id.index, x.id.layer).dtype)
        return 0

    def offload_qkv(self, x: Task, _: Rows, span: slice) -> int:
        """Queries, keys and values to the host."""
        copies = [(self._rows(self.memory.host, x, span), self._rows(self.memory.gpu, x, span))]
        return self.backend.transfer(Lane.D2H, copies)

    def load_kv(self, x: Task, rows: Rows, _: slice) -> int:
        """The part in use of a layer's cache to a buffer on the GPU."""
        source, target = self.memory.caches.of(x.id.index, x.id.layer), self._kv_buffer(x)
        reach = self._mixer(x).reach
        spans = [
            # `rows` may be an earlier step's if this load runs ahead; the step itself tells how
            # many tokens the cache holds.
            (start, start + reach.capacity(len(sequence.placed.request.prompt) + self.step(x)))
            for sequence, start in zip(rows.sequences, rows.numbers[reach].starts, strict=True)
        ]
        if not self.backend.gpu_kernels.shares_memory:
            spans = joined(spans, max(SMALLEST_GAP_BYTES // source[:1].nbytes, 1))
        return self.backend.transfer(Lane.H2D, [(target[start:end], source[start:end]) for start, end in spans])

    def store_kv(self, x: Task, rows: Rows, span: slice) -> int:
        """New keys and values to the cache on the host, or what attention made of states."""
        mixer = self._mixer(x)
        if mixer.has_state:
            source, target = self._kv_buffer(x), self.memory.caches.of(x.id.index, x.id.layer)
            starts = rows.numbers[mixer.reach].starts
            return self.backend.transfer(
                Lane.D2H, [(target.narrow(0, start, 1), source.narrow(0, start, 1)) for start in starts]
            )
        host_RX, gpu_RX = (self._rows(at, x, span) for at in (self.memory.host, self.memory.gpu))
        # A device copies what is contiguous, so whole rows.
        cached = mixer.block.cached_bytes(self.policy.formats) // gpu_RX.itemsize
        first = -cached if self.backend.gpu_kernels.shares_memory else 0
        moved = self.backend.transfer(Lane.D2H, [(host_RX[:, first:], gpu_RX[:, first:])])
        self.backend.synchronise()  # the host is who appends them
        cache = self.memory.caches.of(x.id.index, x.id.layer)
        mixer.append(cache, host_RX, rows.numbers[mixer.reach].cache_rows_R)
        return moved

    def attention(self, x: Task, rows: Rows, span: slice) -> int:
        """Append the new tokens to the cache and attend to it, on the device it is used on."""
        mixer = self._mixer(x)
        if x.id.act is decode.CPU_ATTENTION:
            level, kernels, numbers = self.memory.host, CpuKernels(), rows.numbers[mixer.reach]
            weights = self.memory.weights.of_layer(x.id.layer).host_mixer
        else:
            level, kernels, numbers = self.memory.gpu, self.backend.gpu_kernels, self._numbers(mixer, rows, span)
            weights = self._weights(x).dense.mixer
        if self.pipeline.streams_kv(x.id.index):
            cache = self._kv_buffer(x)
        else:
            cache = self.memory.caches.of(x.id.index, x.id.layer)
        row_RX, out_RO = self._rows(level, x, span), self._outputs(level, x, span)
        mixer.append(cache, row_RX, numbers.cache_rows_R)
        spare_bytes = self.memory.workspace.capacity_bytes // 2
        mixer.decode(kernels, row_RX, weights, cache, numbers, out_RO, spare_bytes=spare_bytes)
        return 0

    def load_hidden(self, x: Task, _: Rows, span: slice) -> int:
        """The attention output to the GPU."""
        copies = [(self._outputs(self.memory.gpu, x, span), self._outputs(self.memory.host, x, span))]
        return self.backend.transfer(Lane.H2D, copies)

    def output_projection(self, x: Task, _: Rows, span: slice) -> int:
        """What attention returns, projected and added to the hidden states, which go on in rank 0."""
        gpu, workspace, mixer = self.memory.gpu, self.memory.workspace, self._mixer(x)
        workspace.reset()
        hidden_RD, held_RS = gpu.hidden_ND[span], narrow(gpu.held_NS, span, mixer.block.held_elements)
        if self.group.rank > 0:
            clear(hidden_RD)
        mixer.finish(self._outputs(gpu, x, span), held_RS, self._weights(x).dense.mixer, hidden_RD, workspace)
        return 0

    def reduce_attention(self, _: Task, __: Rows, span: slice) -> int:
        """What ranks have of hidden states after attention, summed up."""
        return self._reduce(span)

    def post_attention(self, x: Task, rows: Rows, span: slice) -> int:
        """Output projection, and the FFN: of one with experts, the router and what is on the GPU."""
        if self.group.size == 1:
            self.output_projection(x, rows, span)
        gpu = self.memory.gpu
        self.memory.workspace.reset()
        to_cpu = gpu.routed(span) if self.pipeline.cpu_experts[x.id.layer] else None
        self.ffn_on_gpu(x.id.layer, gpu.hidden_ND[span], self._weights(x), to_cpu)
        return 0

    def offload_tokens(self, _: Task, __: Rows, span: slice) -> int:
        """Normed tokens, their routing, and what waits for their experts, to the host."""
        host, gpu = self.memory.host, self.memory.gpu
        return self.backend.transfer(Lane.D2H, gpu.routed(span).copies_to(host.routed(span)))

    def cpu_experts(self, x: Task, _: Rows, span: slice) -> int:
        """The experts that stay on the host, computed there."""
        host = self.memory.host
        self.ffn_on_cpu(x.id.layer, host.routed(span), clear(host.expert_output_ND[span]))
        return 0

    def load_expert_output(self, _: Task, __: Rows, span: slice) -> int:
        """Their output to the GPU; whatever comes next there adds it to the hidden states."""
        host, gpu = self.memory.host, self.memory.gpu
        copies = [(gpu.expert_output_ND[span], host.expert_output_ND[span])]
        return self.backend.transfer(Lane.H2D, copies)

    def reduce_last(self, x: Task, _: Rows, span: slice) -> int:
        """What ranks have of hidden states after the last layer, summed up."""
        self._add_cpu_experts(x.id.layer, span)
        return self._reduce(span)

    def sample(self, x: Task) -> int:
        """Choose the next tokens and set up the next step's rows, even if there are none."""
        self.on_rows(self._sample)(x)
        self.state.set_rows(x.id.index, self.step(x) + 1)
        return 0

    def _sample(self, x: Task, rows: Rows, span: slice) -> int:
        hidden_RD = self.after_layers(x, span)
        sample(self.arch, self.memory, self.state, self.group, hidden_RD, rows.sequences)
        return 0

    def after_layers(self, x: Task, span: slice) -> Tensor:
        """Hidden states after the last layer."""
        if self.group.size == 1:
            self._add_cpu_experts(x.id.layer, span)
        return self.memory.gpu.hidden_ND[span]

    def _reduce(self, span: slice) -> int:
        self.group.all_reduce(self.memory.gpu.hidden_ND[span])
        return 0

    def _add_cpu_experts(self, layer: int, span: slice) -> None:
        if self.pipeline.cpu_experts[layer]:
            add(self.memory.gpu.hidden_ND[span], self.memory.gpu.expert_output_ND[span])

    def _rows(self, level: Exchange, x: Task, span: slice) -> Tensor:
        """What the layer's attention is computed from."""
        sent_bytes = self._mixer(x).block.sent_bytes(self.policy.formats)
        return narrow(level.rows_NX, span, sent_bytes // level.rows_NX.itemsize)

    def _outputs(self, level: Exchange, x: Task, span: slice) -> Tensor:
        return narrow(level.attention_NO, span, self._mixer(x).block.returned_elements)

    def _numbers(self, mixer: Mixer, rows: Rows, span: slice) -> RowNumbers:
        """The numbers of the requests that go on, on the GPU since the step's EMBED."""
        kernels, numbers = self.backend.gpu_kernels, rows.numbers[mixer.reach]
        if kernels.shares_memory:  # before the slices below, which cost more than all else here
            return numbers
        sent = self.memory.gpu.numbers[list(rows.numbers).index(mixer.reach)]
        return kernels.numbers(numbers, sent[_numbers_of(span)])

    def _kv_buffer(self, x: Task) -> Tensor:
        return self.memory.caches.buffer(x.slot(decode.KV_BUFFERS), x.id.layer)


def _numbers_of(span: slice) -> slice:
    return slice(NUMBERS_PER_REQUEST * span.start, NUMBERS_PER_REQUEST * span.stop)


def joined(spans: Sequence[tuple[int, int]], smallest_gap: int) -> list[tuple[int, int]]:
    """The same rows in fewer spans: those that follow one another closely are one, with what lies between."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if found and start - found[-1][1] < smallest_gap:
            start, _ = found.pop()  # noqa: PLW2901
        found.append((start, end))
    return found
