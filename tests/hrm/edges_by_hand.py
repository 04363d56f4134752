"""What every task waits for, written by hand for each kind: the oracle of the edges that follow from reads and writes.

Data edges, and buffer-reuse edges: a load waits for the last reader of the buffer that it overwrites.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

from hrm.acts import decode, prefill
from hrm.schedules import Pipeline
from hrm.tasks import Phase, TaskId

WEIGHT_SLOTS, BUFFERS, STAGING_PAGES = 2, 2, 4


@dataclass(frozen=True)
class ByHand:
    """The waits of a pipeline's tasks."""

    pipeline: Pipeline

    def waits(self, x: TaskId) -> tuple[TaskId, ...]:
        """Tasks that must have ended before this one, in any lane."""
        prefilling = self.pipeline.phase is Phase.PREFILL
        return tuple(self._prefill_waits(x) if prefilling else self._decode_waits(x))

    @property
    def _acts(self):
        return prefill if self.pipeline.phase is Phase.PREFILL else decode

    def _decode_waits(self, x: TaskId) -> Iterator[TaskId]:
        t, i, j = x.step, x.layer, x.index
        match x.act:
            case decode.EMBED:
                if t > 0:
                    yield TaskId(decode.SAMPLE, self.pipeline.num_layers - 1, j, t - 1)
            case decode.PRE_ATTENTION:
                if i == 0:
                    yield TaskId(decode.EMBED, 0, j, t)
                else:
                    yield from self._layer_done(t, i - 1, j)
                step, layer = divmod(t * self.pipeline.num_layers + i - 1, self.pipeline.num_layers)
                if self.pipeline.streams_kv(j) and step >= 0 and not self._has_state(layer):
                    yield TaskId(decode.STORE_KV, layer, j, step)  # its new keys and values must be gone
                if self.pipeline.streamed[i] and self.pipeline.dense_pages:
                    yield TaskId(decode.LOAD_PAGE, i, self.pipeline.dense_pages - 1, t)
            case decode.OFFLOAD_QKV:
                yield TaskId(decode.PRE_ATTENTION, i, j, t)
            case decode.STORE_KV:
                yield TaskId(decode.ATTENTION if self._has_state(i) else decode.PRE_ATTENTION, i, j, t)
            case decode.LOAD_KV:
                yield from self._kv_load_waits(t, i, j)
            case decode.CPU_ATTENTION:
                yield TaskId(decode.OFFLOAD_QKV, i, j, t)
            case decode.ATTENTION:
                yield TaskId(decode.PRE_ATTENTION, i, j, t)
                if self.pipeline.streams_kv(j):
                    yield TaskId(decode.LOAD_KV, i, j, t)
            case decode.LOAD_HIDDEN:
                yield TaskId(decode.CPU_ATTENTION, i, j, t)
            case decode.POST_ATTENTION:
                act = decode.LOAD_HIDDEN if self.pipeline.attention_on_cpu(j) else decode.ATTENTION
                yield TaskId(act, i, j, t)
                if self.pipeline.streamed[i]:
                    yield TaskId(decode.LOAD_PAGE, i, self.pipeline.num_pages - 1, t)
            case decode.OFFLOAD_TOKENS:
                yield TaskId(decode.POST_ATTENTION, i, j, t)
            case decode.CPU_EXPERTS:
                yield TaskId(decode.OFFLOAD_TOKENS, i, j, t)
            case decode.LOAD_EXPERT_OUTPUT:
                yield TaskId(decode.CPU_EXPERTS, i, j, t)
            case decode.SAMPLE:
                yield from self._layer_done(t, i, j)
            case _:
                last_reader = TaskId(decode.POST_ATTENTION, 0, self.pipeline.num_micro_batches - 1, 0)
                yield from self._page_waits(x, last_reader)

    def _layer_done(self, t: int, i: int, j: int) -> Iterator[TaskId]:
        yield TaskId(decode.POST_ATTENTION, i, j, t)
        if self.pipeline.cpu_experts[i]:
            yield TaskId(decode.LOAD_EXPERT_OUTPUT, i, j, t)

    def _kv_load_waits(self, t: int, i: int, j: int) -> Iterator[TaskId]:
        streaming = self._streaming
        loads_before = (t * self.pipeline.num_layers + i) * len(streaming) + bisect_left(streaming, j)
        if loads_before >= BUFFERS:
            position, index = divmod(loads_before - BUFFERS, len(streaming))
            step, layer = divmod(position, self.pipeline.num_layers)
            yield TaskId(decode.ATTENTION, layer, streaming[index], step)
            if self._has_state(layer):
                yield TaskId(decode.STORE_KV, layer, streaming[index], step)
        if t > 0:
            yield TaskId(decode.STORE_KV, i, j, t - 1)

    def _has_state(self, layer: int) -> bool:
        return any(self.pipeline.states) and self.pipeline.states[layer]

    @property
    def _streaming(self) -> tuple[int, ...]:
        """The micro-batches whose cache moves to the GPU layer by layer."""
        return tuple(k for k in range(self.pipeline.num_micro_batches) if self.pipeline.streams_kv(k))

    def _page_waits(self, x: TaskId, last_reader: TaskId) -> Iterator[TaskId]:
        """Edges of weight pages: slots on the GPU and pinned pages are overwritten in turn."""
        index = self.pipeline.load_index(x.step, x.layer)
        if x.act.name == "LOAD_PAGE":
            if index >= WEIGHT_SLOTS:
                step, layer = self._loaded(index - WEIGHT_SLOTS)
                yield last_reader._replace(layer=layer, step=step)
            if self.pipeline.staging:
                yield x._replace(act=self._acts.PAGES[0])
            return
        assert x.act.name == "STAGE_PAGE", x
        pages_before = index * self.pipeline.num_pages + x.index
        if pages_before >= STAGING_PAGES:
            load, page = divmod(pages_before - STAGING_PAGES, self.pipeline.num_pages)
            step, layer = self._loaded(load)
            yield TaskId(self._acts.LOAD_PAGE, layer, page, step)

    def _loaded(self, index: int) -> tuple[int, int]:
        """(step, layer) of the load with that index."""
        layers = [i for i, streamed in enumerate(self.pipeline.streamed) if streamed]
        step, position = divmod(index, len(layers))
        return step, layers[position]

    def _prefill_waits(self, x: TaskId) -> Iterator[TaskId]:
        i, g, chunks = x.layer, x.index, self.pipeline.num_micro_batches
        before = i * chunks + g - BUFFERS  # the chunk that used this chunk's buffers
        layer_before, chunk_before = divmod(before, chunks)
        match x.act:
            case prefill.EMBED | prefill.LOAD_HIDDEN:
                if x.act is prefill.LOAD_HIDDEN:
                    on_cpu = self.pipeline.cpu_experts[i - 1]
                    yield TaskId(prefill.CPU_EXPERTS if on_cpu else prefill.STORE_HIDDEN, i - 1, g)
                if before >= 0:
                    last = layer_before == self.pipeline.num_layers - 1
                    yield TaskId(prefill.SAMPLE if last else prefill.STORE_HIDDEN, layer_before, chunk_before)
            case prefill.PREFILL_LAYER:
                yield TaskId(prefill.EMBED if i == 0 else prefill.LOAD_HIDDEN, i, g)
                if self.pipeline.streamed[i]:
                    yield TaskId(prefill.LOAD_PAGE, i, self.pipeline.num_pages - 1)
                if before >= 0 and not self.pipeline.kv_on_gpu[g]:
                    yield TaskId(prefill.STORE_KV, layer_before, chunk_before)
                if before >= 0 and self.pipeline.cpu_experts[i] and self.pipeline.cpu_experts[layer_before]:
                    last = layer_before == self.pipeline.num_layers - 1
                    yield TaskId(prefill.SAMPLE if last else prefill.OFFLOAD_TOKENS, layer_before, chunk_before)
            case prefill.OFFLOAD_TOKENS:
                yield TaskId(prefill.PREFILL_LAYER, i, g)
                if before >= 0 and self.pipeline.cpu_experts[layer_before]:
                    yield TaskId(prefill.CPU_EXPERTS, layer_before, chunk_before)
            case prefill.CPU_EXPERTS:
                yield TaskId(prefill.OFFLOAD_TOKENS, i, g)
                if i < self.pipeline.num_layers - 1:
                    yield TaskId(prefill.STORE_HIDDEN, i, g)
            case prefill.LOAD_EXPERT_OUTPUT:
                yield TaskId(prefill.CPU_EXPERTS, i, g)
            case prefill.STORE_HIDDEN | prefill.STORE_KV | prefill.SAMPLE:
                yield TaskId(prefill.PREFILL_LAYER, i, g)
                if x.act is prefill.SAMPLE and self.pipeline.cpu_experts[i]:
                    yield TaskId(prefill.LOAD_EXPERT_OUTPUT, i, g)
            case _:
                yield from self._page_waits(x, TaskId(prefill.PREFILL_LAYER, 0, chunks - 1))
