"""Which tasks a policy needs and what each waits for, whatever the order they are issued in.

A schedule only decides the order of issue. Lanes and dependencies follow from the policy, so they
are told here once: data edges, and buffer-reuse edges (a load waits for the last reader of the
buffer that it overwrites).
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from hrm.contract.rings import BUFFERS, STAGING_PAGES, WEIGHT_SLOTS
from hrm.model_spec import ModelSpec
from hrm.policy import Policy
from hrm.tasks import Device, Lane, Phase, Task, TaskId, TaskKind

K = TaskKind
_LANES = {
    K.EMBED: Lane.H2D,
    K.PRE_ATTENTION: Lane.GPU,
    K.OFFLOAD_QKV: Lane.D2H,
    K.LOAD_KV: Lane.H2D,
    K.STORE_KV: Lane.D2H,
    K.LOAD_HIDDEN: Lane.H2D,
    K.POST_ATTENTION: Lane.GPU,
    K.OFFLOAD_TOKENS: Lane.D2H,
    K.CPU_EXPERTS: Lane.CPU,
    K.LOAD_EXPERT_OUTPUT: Lane.H2D,
    K.LOAD_PAGE: Lane.H2D,
    K.STAGE_PAGE: Lane.STAGE,
    K.PREFILL_LAYER: Lane.GPU,
    K.STORE_HIDDEN: Lane.D2H,
    K.SAMPLE: Lane.GPU,
}


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The shape of one phase: all that decides which tasks there are.

    `kv_on_gpu[j]` says whether micro-batch j's KV cache lives on the GPU, `streamed[i]` whether
    layer i has weights to load, `cpu_experts[i]` whether some of its experts run on the CPU. A
    layer's weights move in `num_pages` pages, the first `dense_pages` of which hold projections
    (0 if those are resident). In prefill `num_micro_batches` counts chunks of prompts. Parts of a
    split prompt lie in successive chunks, and each leaves its keys and values on the GPU to the
    next: their layers run in turn in one lane, so no edge has to say so.
    """

    phase: Phase = Phase.DECODE
    num_layers: int
    num_micro_batches: int
    num_steps: int = 1
    attention: Device = Device.CPU
    kv_on_gpu: tuple[bool, ...] = ()
    streamed: tuple[bool, ...] = ()
    cpu_experts: tuple[bool, ...] = ()
    num_pages: int = 1
    dense_pages: int = 0
    staging: bool = False

    @staticmethod
    def of_policy(spec: ModelSpec, policy: Policy, *, num_steps: int = 1) -> "Pipeline":
        """The decode pipeline of a policy; the schedule sets the number of pages."""
        on_cpu = policy.ffn is Device.CPU
        return Pipeline(
            num_layers=spec.num_layers,
            num_micro_batches=policy.num_micro_batches,
            num_steps=num_steps,
            attention=policy.attention,
            kv_on_gpu=tuple(policy.kv_on_gpu(j) for j in range(policy.num_micro_batches)),
            streamed=tuple(policy.decode_streamed_bytes(spec, i) > 0 for i in range(spec.num_layers)),
            cpu_experts=tuple(
                on_cpu and count < spec.num_experts_of(spec.layer_kind(i))
                for i, count in enumerate(policy.resident_experts)
            ),
            dense_pages=0 if policy.resident_dense else 1,
            staging=policy.staging,
        )

    @staticmethod
    def of_prefill(spec: ModelSpec, policy: Policy, *, num_chunks: int) -> "Pipeline":
        """The prefill pipeline of a policy: everything is computed on the GPU."""
        return Pipeline(
            phase=Phase.PREFILL,
            num_layers=spec.num_layers,
            num_micro_batches=num_chunks,
            kv_on_gpu=(policy.gpu_kv_micro_batches == policy.num_micro_batches,) * num_chunks,
            streamed=tuple(policy.streamed_bytes(spec, i) > 0 for i in range(spec.num_layers)),
            cpu_experts=(False,) * spec.num_layers,
            dense_pages=0 if policy.resident_dense else 1,
            staging=policy.staging,
        )

    def with_pages(self, num_pages: int, dense_share: float = 1.0) -> "Pipeline":
        """The same pipeline moving each layer in `num_pages`, projections in the first share."""
        dense_pages = math.ceil(dense_share * num_pages) if self.dense_pages else 0
        return replace(self, num_pages=num_pages, dense_pages=dense_pages)

    # -- which tasks there are ------------------------------------------------------------------

    def attention_on_cpu(self, j: int) -> bool:
        """Whether micro-batch j attends on the CPU: its cache is there and the policy says so."""
        return self.attention is Device.CPU and not self.kv_on_gpu[j]

    def streams_kv(self, j: int) -> bool:
        """Whether micro-batch j's cache moves to the GPU layer by layer."""
        return self.attention is Device.GPU and not self.kv_on_gpu[j]

    def next_layer(self, t: int, i: int) -> tuple[int, int] | None:
        """(step, layer) after layer i of step t; None after the last."""
        if i + 1 < self.num_layers:
            return t, i + 1
        return (t + 1, 0) if t + 1 < self.num_steps else None

    def load_index(self, t: int, i: int) -> int:
        """How many layers were loaded before layer i of step t; its weight slot is this mod 2."""
        return t * sum(self.streamed) + sum(self.streamed[:i])

    # -- orders are put together from these -----------------------------------------------------

    def load_pages(self, where: tuple[int, int] | None, first: int = 0, last: int | None = None) -> Iterator[TaskId]:
        """Load pages [first, last) of the layer at (step, layer), staging each first if need be."""
        if where is None or not self.streamed[where[1]]:
            return
        t, i = where
        for page in range(first, self.num_pages if last is None else last):
            if self.staging:
                yield TaskId(K.STAGE_PAGE, i, page, t)
            yield TaskId(K.LOAD_PAGE, i, page, t)

    def page_slice(self, j: int, *, lookahead: int = 0) -> tuple[int, int]:
        """Pages [first, last) of the next layer that are loaded beside micro-batch j.

        They are spread evenly, but the pages with projections come early enough for the next
        layer to be entered `lookahead` micro-batches before this one ends.
        """
        n = self.num_micro_batches

        def loaded_by(count: int) -> int:
            evenly = count * self.num_pages // n
            entered = n - lookahead + 1  # by then the next layer's first projections are needed
            return max(evenly, min(-(-count * self.dense_pages // entered), self.dense_pages))

        return loaded_by(j), loaded_by(j + 1)

    def prefetch_kv(self, t: int, i: int, j: int) -> Iterator[TaskId]:
        """Move the KV cache of (layer i, micro-batch j) to the GPU, if it has to move."""
        if self.streams_kv(j):
            yield TaskId(K.LOAD_KV, i, j, t)

    def embed(self, t: int, i: int, j: int) -> Iterator[TaskId]:
        """Move a micro-batch's token embeddings to the GPU, before the first layer."""
        if i == 0:
            yield TaskId(K.EMBED, i, j, t)

    def before_attention(self, t: int, i: int, j: int) -> Iterator[TaskId]:
        """Everything up to queries, keys and values."""
        yield TaskId(K.PRE_ATTENTION, i, j, t)

    def attend(self, t: int, i: int, j: int) -> Iterator[TaskId]:
        """Attention of a micro-batch with the transfers of its new tokens."""
        if self.attention_on_cpu(j):
            yield TaskId(K.OFFLOAD_QKV, i, j, t)
        elif self.streams_kv(j):
            yield TaskId(K.STORE_KV, i, j, t)
        yield TaskId(K.ATTENTION, i, j, t)

    def load_hidden(self, t: int, i: int, j: int) -> Iterator[TaskId]:
        """Move the attention output to the GPU, if it was made on the CPU."""
        if self.attention_on_cpu(j):
            yield TaskId(K.LOAD_HIDDEN, i, j, t)

    def after_attention(self, t: int, i: int, j: int) -> Iterator[TaskId]:
        """The rest of the layer, as far as the CPU's experts."""
        yield TaskId(K.POST_ATTENTION, i, j, t)
        if self.cpu_experts[i]:
            yield TaskId(K.OFFLOAD_TOKENS, i, j, t)
            yield TaskId(K.CPU_EXPERTS, i, j, t)

    def finish_layer(self, t: int, i: int, j: int) -> Iterator[TaskId]:
        """Bring back the CPU experts' output; after the last layer, choose the next token."""
        if self.cpu_experts[i]:
            yield TaskId(K.LOAD_EXPERT_OUTPUT, i, j, t)
        if i == self.num_layers - 1:
            yield TaskId(K.SAMPLE, i, j, t)

    # -- lanes and dependencies -----------------------------------------------------------------

    def tasks(self, order: Iterable[TaskId]) -> Iterator[Task]:
        """Attach lane and dependencies to every task of an order."""
        waits = self._prefill_waits if self.phase is Phase.PREFILL else self._decode_waits
        for task_id in order:
            yield Task(task_id, self.lane(task_id), tuple(waits(task_id)))

    def lane(self, task_id: TaskId) -> Lane:
        """The lane that a task runs in."""
        if task_id.kind is K.ATTENTION:
            return Lane.CPU if self.attention_on_cpu(task_id.micro_batch) else Lane.GPU
        return _LANES[task_id.kind]

    def _decode_waits(self, x: TaskId) -> Iterator[TaskId]:
        t, i, j = x.step, x.layer, x.micro_batch
        match x.kind:
            case K.EMBED:
                if t > 0:
                    yield TaskId(K.SAMPLE, self.num_layers - 1, j, t - 1)
            case K.PRE_ATTENTION:
                if i == 0:
                    yield TaskId(K.EMBED, 0, j, t)
                else:
                    yield from self._layer_done(t, i - 1, j)
                if self.streams_kv(j) and (t, i) > (0, 0):  # its new keys and values must be gone
                    step, layer = divmod(t * self.num_layers + i - 1, self.num_layers)
                    yield TaskId(K.STORE_KV, layer, j, step)
                if self.streamed[i] and self.dense_pages:
                    yield TaskId(K.LOAD_PAGE, i, self.dense_pages - 1, t)
            case K.OFFLOAD_QKV | K.STORE_KV:
                yield TaskId(K.PRE_ATTENTION, i, j, t)
            case K.LOAD_KV:
                yield from self._kv_load_waits(t, i, j)
            case K.ATTENTION:
                if self.attention_on_cpu(j):
                    yield TaskId(K.OFFLOAD_QKV, i, j, t)
                else:
                    yield TaskId(K.PRE_ATTENTION, i, j, t)
                    if self.streams_kv(j):
                        yield TaskId(K.LOAD_KV, i, j, t)
            case K.LOAD_HIDDEN:
                yield TaskId(K.ATTENTION, i, j, t)
            case K.POST_ATTENTION:
                kind = K.LOAD_HIDDEN if self.attention_on_cpu(j) else K.ATTENTION
                yield TaskId(kind, i, j, t)
                if self.streamed[i]:
                    yield TaskId(K.LOAD_PAGE, i, self.num_pages - 1, t)
            case K.OFFLOAD_TOKENS:
                yield TaskId(K.POST_ATTENTION, i, j, t)
            case K.CPU_EXPERTS:
                yield TaskId(K.OFFLOAD_TOKENS, i, j, t)
            case K.LOAD_EXPERT_OUTPUT:
                yield TaskId(K.CPU_EXPERTS, i, j, t)
            case K.SAMPLE:
                yield from self._layer_done(t, i, j)
            case _:
                last_reader = TaskId(K.POST_ATTENTION, 0, self.num_micro_batches - 1, 0)
                yield from self._page_waits(x, last_reader)

    def _layer_done(self, t: int, i: int, j: int) -> Iterator[TaskId]:
        yield TaskId(K.POST_ATTENTION, i, j, t)
        if self.cpu_experts[i]:
            yield TaskId(K.LOAD_EXPERT_OUTPUT, i, j, t)

    def _kv_load_waits(self, t: int, i: int, j: int) -> Iterator[TaskId]:
        streaming = self._streaming
        loads_before = (t * self.num_layers + i) * len(streaming) + bisect_left(streaming, j)
        if loads_before >= BUFFERS:
            position, index = divmod(loads_before - BUFFERS, len(streaming))
            step, layer = divmod(position, self.num_layers)
            yield TaskId(K.ATTENTION, layer, streaming[index], step)
        if t > 0:
            yield TaskId(K.STORE_KV, i, j, t - 1)

    @cached_property
    def _streaming(self) -> tuple[int, ...]:
        """The micro-batches whose cache moves to the GPU layer by layer."""
        return tuple(k for k in range(self.num_micro_batches) if self.streams_kv(k))

    def _page_waits(self, x: TaskId, last_reader: TaskId) -> Iterator[TaskId]:
        """Edges of weight pages: slots on the GPU and pinned pages are overwritten in turn."""
        index = self.load_index(x.step, x.layer)
        if x.kind is K.LOAD_PAGE:
            if index >= WEIGHT_SLOTS:
                step, layer = self._loaded(index - WEIGHT_SLOTS)
                yield last_reader._replace(layer=layer, step=step)
            if self.staging:
                yield x._replace(kind=K.STAGE_PAGE)
            return
        assert x.kind is K.STAGE_PAGE, x
        pages_before = index * self.num_pages + x.micro_batch
        if pages_before >= STAGING_PAGES:
            load, page = divmod(pages_before - STAGING_PAGES, self.num_pages)
            step, layer = self._loaded(load)
            yield TaskId(K.LOAD_PAGE, layer, page, step)

    def _loaded(self, index: int) -> tuple[int, int]:
        """(step, layer) of the load with that index."""
        layers = [i for i, streamed in enumerate(self.streamed) if streamed]
        step, position = divmod(index, len(layers))
        return step, layers[position]

    def _prefill_waits(self, x: TaskId) -> Iterator[TaskId]:
        i, g, chunks = x.layer, x.micro_batch, self.num_micro_batches
        before = i * chunks + g - BUFFERS  # the chunk that used this chunk's buffers
        layer_before, chunk_before = divmod(before, chunks)
        match x.kind:
            case K.EMBED | K.LOAD_HIDDEN:
                if x.kind is K.LOAD_HIDDEN:
                    yield TaskId(K.STORE_HIDDEN, i - 1, g)
                if before >= 0:
                    last = layer_before == self.num_layers - 1
                    yield TaskId(K.SAMPLE if last else K.STORE_HIDDEN, layer_before, chunk_before)
            case K.PREFILL_LAYER:
                yield TaskId(K.EMBED if i == 0 else K.LOAD_HIDDEN, i, g)
                if self.streamed[i]:
                    yield TaskId(K.LOAD_PAGE, i, self.num_pages - 1)
                if before >= 0 and not self.kv_on_gpu[g]:
                    yield TaskId(K.STORE_KV, layer_before, chunk_before)
            case K.STORE_HIDDEN | K.STORE_KV | K.SAMPLE:
                yield TaskId(K.PREFILL_LAYER, i, g)
            case _:
                yield from self._page_waits(x, TaskId(K.PREFILL_LAYER, 0, chunks - 1))
