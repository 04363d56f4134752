"""Which tasks a policy needs, whatever the order they are issued in.

A schedule only decides the order of issue. What tasks touch is told by their acts (`hrm.acts`), and what each waits for
follows from that (`hazards`).
"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from hrm.acts import WEIGHT_ACTS, WeightActs, decode, prefill
from hrm.acts.pages import on_its_way
from hrm.contract.rings import EXPERT_SLOTS
from hrm.model_spec import ModelSpec
from hrm.policy import Policy
from hrm.tasks import Device, Phase, TaskId


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The shape of one phase: all that decides which tasks there are.

    `kv_on_gpu[j]` says whether micro-batch j's KV cache lives on the GPU, `streamed[i]` whether
    layer i has weights to load whole, `cpu_experts[i]` whether some of its experts run on the CPU,
    `parts[i]`, if any layer's, in how many parts they stream (0 if they do not), and
    `states[i]`, if any layer's, whether its cache is a state that each token makes anew. Of
    `attention_weights[i]` likewise, whether attention itself reads some of the layer's weights. A
    layer's weights move in `num_pages` pages, the first `dense_pages` of which hold projections
    (0 if those are resident). Of several `ranks` it is what each of them does. In prefill
    `num_micro_batches` counts chunks of prompts. Parts of a split prompt lie in successive chunks, and
    each leaves its keys and values on the GPU to the next: their layers run in turn in one lane, so no
    edge has to say so.
    """

    phase: Phase = Phase.DECODE
    num_layers: int
    num_micro_batches: int
    num_steps: int = 1
    attention: Device = Device.CPU
    kv_on_gpu: tuple[bool, ...] = ()
    streamed: tuple[bool, ...] = ()
    cpu_experts: tuple[bool, ...] = ()
    parts: tuple[int, ...] = ()
    states: tuple[bool, ...] = ()
    attention_weights: tuple[bool, ...] = ()
    num_pages: int = 1
    dense_pages: int = 0
    staging: bool = False
    ranks: int = 1

    @staticmethod
    def of_policy(spec: ModelSpec, policy: Policy, *, num_steps: int = 1) -> "Pipeline":
        """The decode pipeline of a policy; the schedule sets the number of pages."""
        return Pipeline(
            num_layers=spec.num_layers,
            num_micro_batches=policy.num_micro_batches,
            num_steps=num_steps,
            attention=policy.attention,
            kv_on_gpu=tuple(policy.kv_on_gpu(j) for j in range(policy.num_micro_batches)),
            streamed=policy.streamed(spec, Phase.DECODE),
            cpu_experts=_experts_on_cpu(spec, policy, Phase.DECODE),
            parts=policy.parts(spec, Phase.DECODE),
            states=tuple(layer.mixer.state_bytes(policy.formats) > 0 for layer in spec.layers),
            attention_weights=tuple(layer.mixer.host_parameters > 0 for layer in spec.layers),
            dense_pages=0 if policy.resident_dense else 1,
            staging=policy.staging,
            ranks=spec.ranks,
        )

    @staticmethod
    def of_prefill(spec: ModelSpec, policy: Policy, *, num_chunks: int) -> "Pipeline":
        """The prefill pipeline of a policy."""
        return Pipeline(
            phase=Phase.PREFILL,
            num_layers=spec.num_layers,
            num_micro_batches=num_chunks,
            kv_on_gpu=(policy.gpu_kv_micro_batches == policy.num_micro_batches,) * num_chunks,
            streamed=policy.streamed(spec, Phase.PREFILL),
            cpu_experts=_experts_on_cpu(spec, policy, Phase.PREFILL),
            parts=policy.parts(spec, Phase.PREFILL),
            dense_pages=0 if policy.resident_dense else 1,
            staging=policy.staging,
            ranks=spec.ranks,
        )

    def with_pages(self, num_pages: int, dense_share: float = 1.0) -> "Pipeline":
        """The same pipeline moving each layer in `num_pages`, projections in the first share."""
        dense_pages = math.ceil(dense_share * num_pages) if self.dense_pages else 0
        return replace(self, num_pages=num_pages, dense_pages=dense_pages)

    @property
    def weight_acts(self) -> WeightActs:
        """The acts of its phase by which weights move."""
        return WEIGHT_ACTS[self.phase]

    # -- which tasks there are ------------------------------------------------------------------

    def attention_on_cpu(self, j: int) -> bool:
        """Whether micro-batch j attends on the CPU: its cache is there and the policy says so."""
        return self.attention is Device.CPU and not self.kv_on_gpu[j]

    def streams_kv(self, j: int) -> bool:
        """Whether micro-batch j's cache moves to the GPU layer by layer."""
        return self.attention is Device.GPU and not self.kv_on_gpu[j]

    def has_state(self, i: int) -> bool:
        """Whether layer i keeps a state of each sequence."""
        return bool(self.states) and self.states[i]

    def attends_with_weights(self, i: int) -> bool:
        """Whether attention of layer i reads weights: those are in the slot since its projections."""
        return bool(self.attention_weights) and self.attention_weights[i]

    def parts_of(self, i: int) -> int:
        """In how many parts the experts of layer i stream; 0 if they do not."""
        return self.parts[i] if self.parts else 0

    def next_layer(self, t: int, i: int) -> tuple[int, int] | None:
        """(step, layer) after layer i of step t; None after the last."""
        if i + 1 < self.num_layers:
            return t, i + 1
        return (t + 1, 0) if t + 1 < self.num_steps else None

    def load_index(self, t: int, i: int) -> int:
        """How many layers were loaded before layer i of step t."""
        before = self._loads_before
        return t * before[-1] + before[i]

    def part_number(self, t: int, i: int, index: int) -> int:
        """How many parts of experts were loaded before the one of that index in layer i of step t."""
        return t * self._parts_before[-1] + self._parts_before[i] + index

    def _part_at(self, number: int) -> tuple[int, int, int] | None:
        """(step, layer, index) of the part that is loaded after so many; None after the last."""
        before = self._parts_before
        t, rest = divmod(number, before[-1])
        i = bisect_right(before, rest) - 1
        return (t, i, rest - before[i]) if t < self.num_steps else None

    def kv_load_index(self, t: int, i: int, j: int) -> int:
        """How many caches were loaded before that of layer i and micro-batch j in step t."""
        before = self._kv_loads_before
        return (t * self.num_layers + i) * before[-1] + before[j]

    @cached_property
    def _loads_before(self) -> tuple[int, ...]:
        return tuple(accumulate(self.streamed, initial=0))

    @cached_property
    def _parts_before(self) -> tuple[int, ...]:
        return tuple(accumulate((self.num_micro_batches * count for count in self.parts), initial=0))

    @cached_property
    def _kv_loads_before(self) -> tuple[int, ...]:
        return tuple(accumulate(map(self.streams_kv, range(self.num_micro_batches)), initial=0))

    # -- orders are put together from these -----------------------------------------------------

    def load_pages(self, where: tuple[int, int] | None, first: int = 0, last: int | None = None) -> Iterator[TaskId]:
        """Load pages [first, last) of the layer at (step, layer), staging each first if need be.

        With those of the very first layer come the parts of experts that fill their slots.
        """
        if where is None:
            return
        t, i = where
        for page in range(first, self.num_pages if last is None else last) if self.streamed[i] else ():
            for act in on_its_way(self.weight_acts.pages, self):
                yield TaskId(act, i, page, t)
        if where == (0, 0) and any(self.parts):
            for number in range(EXPERT_SLOTS):
                yield from self._load_part(number)

    def _load_part(self, number: int) -> Iterator[TaskId]:
        """Load the part that comes after so many others, if there are more."""
        if (there := self._part_at(number)) is not None:
            t, i, index = there
            yield TaskId(self.weight_acts.load_part, i, index, t)

    def _part_experts(self, t: int, i: int, j: int) -> Iterator[TaskId]:
        """A micro-batch's or chunk's experts part by part; each makes room for the part to be loaded next."""
        parts = self.parts_of(i)
        for index in range(j * parts, (j + 1) * parts):
            yield TaskId(self.weight_acts.part_experts, i, index, t)
            yield from self._load_part(self.part_number(t, i, index) + EXPERT_SLOTS)

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
            yield TaskId(decode.LOAD_KV, i, j, t)

    def embed(self, t: int, i: int, j: int) -> Iterator[TaskId]:
        """Move a micro-batch's token embeddings to the GPU, before the first layer."""
        if i == 0:
            yield TaskId(decode.EMBED, i, j, t)

    def before_attention(self, t: int, i: int, j: int) -> Iterator[TaskId]:
        """Everything up to queries, keys and values."""
        if self.ranks > 1:
            yield TaskId(decode.REDUCE_HIDDEN, i, j, t)
        yield TaskId(decode.PRE_ATTENTION, i, j, t)

    def attend(self, t: int, i: int, j: int) -> Iterator[TaskId]:
        """Attention of a micro-batch with the transfers of its new tokens."""
        if self.attention_on_cpu(j):
            yield TaskId(decode.OFFLOAD_QKV, i, j, t)
            yield TaskId(decode.CPU_ATTENTION, i, j, t)
            return
        acts = [decode.ATTENTION]
        if self.streams_kv(j):  # new keys and values are there before attention, a new state is not
            acts.insert(self.has_state(i), decode.STORE_KV)
        for act in acts:
            yield TaskId(act, i, j, t)

    def load_hidden(self, t: int, i: int, j: int) -> Iterator[TaskId]:
        """Move the attention output to the GPU, if it was made on the CPU."""
        if self.attention_on_cpu(j):
            yield TaskId(decode.LOAD_HIDDEN, i, j, t)

    def after_attention(self, t: int, i: int, j: int) -> Iterator[TaskId]:
        """The rest of the layer, as far as the CPU's experts."""
        if self.ranks > 1:
            yield TaskId(decode.OUTPUT_PROJECTION, i, j, t)
            yield TaskId(decode.REDUCE_ATTENTION, i, j, t)
        yield TaskId(decode.POST_ATTENTION, i, j, t)
        yield from self._part_experts(t, i, j)
        if self.cpu_experts[i]:
            yield TaskId(decode.OFFLOAD_TOKENS, i, j, t)
            yield TaskId(decode.CPU_EXPERTS, i, j, t)

    def finish_layer(self, t: int, i: int, j: int) -> Iterator[TaskId]:
        """Bring back the CPU experts' output; after the last layer, choose the next token."""
        if self.cpu_experts[i]:
            yield TaskId(decode.LOAD_EXPERT_OUTPUT, i, j, t)
        if i == self.num_layers - 1:
            if self.ranks > 1:
                yield TaskId(decode.REDUCE_LAST, i, j, t)
            yield TaskId(decode.SAMPLE, i, j, t)

    def prefill_layer(self, i: int, g: int) -> Iterator[TaskId]:
        """A layer over a chunk on the GPU; one of several ranks sums up with the others in between."""
        if self.ranks > 1:
            yield TaskId(prefill.REDUCE_HIDDEN, i, g)
            yield TaskId(prefill.PREFILL_ATTENTION, i, g)
            yield TaskId(prefill.REDUCE_ATTENTION, i, g)
        yield TaskId(prefill.PREFILL_LAYER, i, g)
        yield from self._part_experts(0, i, g)

    def end_prefill(self, g: int) -> Iterator[TaskId]:
        """After the last layer of a chunk: bring back the CPU experts' output, choose the first tokens."""
        last = self.num_layers - 1
        if self.cpu_experts[last]:
            yield TaskId(prefill.LOAD_EXPERT_OUTPUT, last, g)
        if self.ranks > 1:
            yield TaskId(prefill.REDUCE_LAST, last, g)
        yield TaskId(prefill.SAMPLE, last, g)


def _experts_on_cpu(spec: ModelSpec, policy: Policy, phase: Phase) -> tuple[bool, ...]:
    """Whether each layer has experts that the CPU computes in a phase."""
    on_cpu = policy.ffn_in(phase) is Device.CPU
    return tuple(
        on_cpu and count < layer.num_experts for layer, count in zip(spec.layers, policy.resident_experts, strict=True)
    )
