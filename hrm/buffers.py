"""Every buffer of a run: what it is for, at which level, how many there are in turn, and the bytes of one.

The search adds them up for many policies at once, a plan for one, and the executor allocates them, so
what is planned is what is allocated.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

from hrm.contract.rings import BUFFERS, EXPERT_SLOTS, STAGING_PAGES, WEIGHT_SLOTS
from hrm.contract.rows import COUNT_BYTES, KV_BLOCK_TOKENS, LOGIT_BYTES, REQUEST_NUMBER_BYTES, TOKEN_NUMBER_BYTES
from hrm.formats import ALIGNMENT_BYTES, Format, Formats
from hrm.layers import Layer
from hrm.model_spec import ModelSpec
from hrm.model_spec.workspace import workspace_bytes
from hrm.numeric import Number, maximum, minimum
from hrm.operators import routed_token_bytes
from hrm.placement import Place
from hrm.policy import Policy
from hrm.schedules import pages_of
from hrm.tasks import Device, Phase


class Purpose(StrEnum):
    """What memory is for."""

    RESIDENT_WEIGHTS = "resident_weights"
    WEIGHT_SLOTS = "weight_slots"
    EXPERT_SLOTS = "expert_slots"
    KV_CACHE = "kv_cache"
    KV_BUFFERS = "kv_buffers"
    EXCHANGE = "exchange"
    PREFILL_BUFFERS = "prefill_buffers"
    PREFIX_BUFFER = "prefix_buffer"
    WORKSPACE = "workspace"
    LOGITS = "logits"
    WEIGHTS = "weights"
    STAGING = "staging"
    PREFILL_HIDDEN = "prefill_hidden"


class Allocation(NamedTuple):
    """Memory for one purpose at one level: `turns` of `size` bytes each."""

    purpose: Purpose
    level: Device
    turns: Number
    size: Number

    @property
    def num_bytes(self) -> Number:
        """All turns together."""
        return self.turns * self.size


def by_purpose(buffers: Iterable[Allocation]) -> dict[Purpose, Number]:
    """Bytes of the buffers of one level, each of which has a purpose of its own."""
    return {buffer.purpose: buffer.num_bytes for buffer in buffers}


def bytes_by_purpose(buffers: Iterable[Allocation]) -> dict[Purpose, int]:
    """The same where they are those of one policy."""
    return {purpose: int(num_bytes) for purpose, num_bytes in by_purpose(buffers).items()}


class _OfModel(NamedTuple):
    """Bytes that a model has in given formats, whatever the policy.

    `residual` is a token's hidden state between layers, `routed` a token with its routing on its way to the CPU's
    experts. Of a request decode has buffers for `exchanged`, for `with_experts` more where these are on the CPU, and
    for `held`, which waits on the GPU while attention is computed. A split prompt keeps `prefix_state` on the GPU, or
    `prefix_token` for each of its tokens. `for_attention` and `for_experts` are what the CPU needs of all layers for
    these. `counts` are those of tokens of each expert.
    """

    residual: int
    routed: int
    exchanged: int
    with_experts: int
    held: int
    prefix_state: int
    prefix_token: int
    head: int
    embedding: int
    for_attention: int
    for_experts: int
    counts: int


@lru_cache(maxsize=64)  # searches ask it of the same model thousands of times
def _of_model(spec: ModelSpec, formats: Formats) -> _OfModel:
    compute, weights, kinds = formats.compute, formats.weights, spec.layer_kinds()
    mixers = [kind.mixer for kind in kinds]
    computed = compute.bytes_of(spec.residual_size + max(mixer.returned_elements for mixer in mixers))
    sent = max(mixer.sent_bytes(formats) for mixer in mixers)
    routed = int(routed_token_bytes(spec, formats, 1))
    return _OfModel(
        residual=compute.bytes_of(spec.residual_size),
        routed=routed,
        exchanged=computed + sent + spec.num_reaches * REQUEST_NUMBER_BYTES,
        with_experts=compute.bytes_of(spec.hidden_size) + routed,
        held=compute.bytes_of(max(mixer.held_elements for mixer in mixers)),
        prefix_state=max(mixer.state_bytes(formats) for mixer in mixers),
        prefix_token=max(mixer.prefix_bytes(formats) for mixer in mixers),
        head=weights.bytes_of(spec.head_parameters),
        embedding=weights.bytes_of(spec.embedding_parameters),
        for_attention=sum(count * kind.mixer.host_bytes(weights) for kind, count in kinds.items()),
        for_experts=sum(count * block.host_bytes(weights) for kind, count in kinds.items() for block in kind.ffn),
        counts=COUNT_BYTES * spec.num_layers * spec.experts.all_experts,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What buffers depend on, of one policy or, with arrays for numbers, of many.

    `kv_tokens` is the cache of one micro-batch in tokens. Truths are 0 or 1: `streams_kv` and
    `cpu_attention` say whether any cache is streamed, or attended over on the host, `cpu_experts` and
    `cpu_prefill_experts` whether the CPU computes experts in decode, or in prefill. Of the layers'
    weights, `resident_bytes` stay on the GPU and `host_bytes` do not, at most
    `largest_streamed_bytes` of one layer stream whole, and move through `staging_slots` of `page_bytes`;
    experts that stream in parts do so in parts of at most `part_bytes`.

    A stage of a pipeline keeps the caches of all `batches` under way, and hidden states until the next
    stage has them.
    """

    spec: ModelSpec
    formats: Formats
    batch_size: Number
    micro_batch_size: Number
    num_micro_batches: Number
    gpu_kv_micro_batches: Number
    kv_tokens: Number
    chunk_tokens: Number
    prefix_tokens: Number
    streams_kv: Number
    cpu_attention: Number
    cpu_experts: Number
    cpu_prefill_experts: Number
    resident_dense: Number
    resident_bytes: Number = 0
    host_bytes: Number = 0
    largest_streamed_bytes: Number = 0
    staging_slots: Number = 0
    page_bytes: Number = 0
    part_bytes: Number = 0
    batches: int = 1

    @staticmethod
    def of_policy(spec: ModelSpec, policy: Policy, *, batches: int = 1) -> "Needs":
        """What the buffers of one policy depend on."""
        weights, layers = policy.formats.weights, policy.layers_by_form(spec)
        on_host = sum(len(alike) * policy.host_bytes(spec, alike[0]) for alike in layers)
        # Prefill streams all that decode does.
        largest = max(policy.streamed_bytes(spec, alike[0], Phase.PREFILL) for alike in layers)
        return Needs(
            spec=spec,
            formats=policy.formats,
            batch_size=policy.batch_size,
            micro_batch_size=policy.micro_batch_size,
            num_micro_batches=policy.num_micro_batches,
            gpu_kv_micro_batches=policy.gpu_kv_micro_batches,
            kv_tokens=policy.kv_tokens_per_micro_batch,
            chunk_tokens=policy.prefill_chunk_tokens,
            prefix_tokens=policy.prefix_buffer_tokens,
            streams_kv=int(policy.streams_kv),
            cpu_attention=int(policy.kv_caches_at(Place.HOST) > 0),
            cpu_experts=int(policy.ffn is Device.CPU and on_host > 0),
            cpu_prefill_experts=int(policy.prefill_ffn is Device.CPU and on_host > 0),
            resident_dense=int(policy.resident_dense),
            resident_bytes=spec.total_layer_bytes(weights) - on_host,
            host_bytes=on_host,
            largest_streamed_bytes=largest,
            staging_slots=STAGING_PAGES * policy.staging,
            page_bytes=page_bytes(largest, pages_of(policy)),
            part_bytes=policy.part_bytes(spec),
            batches=batches,
        )

    @property
    def places(self) -> Number:
        """Requests that decode buffers have places for: whole micro-batches, where several batches share them."""
        return self.batch_size if self.batches == 1 else self.num_micro_batches * self.micro_batch_size

    def on_gpu(self) -> tuple[Allocation, ...]:
        """The buffers at the GPU's level."""
        spec, compute, of_model = self.spec, self.formats.compute, _of_model(self.spec, self.formats)
        cached = cache_bytes(spec, self.formats, self.micro_batch_size, self.kv_tokens)
        of_layer = layer_cache_bytes(spec, self.formats, self.micro_batch_size, self.kv_tokens)
        ending = minimum(self.batch_size, self.chunk_tokens)  # prompts that may end in a chunk, however short
        token = of_model.residual + TOKEN_NUMBER_BYTES + self.cpu_prefill_experts * of_model.routed
        chunk = self.chunk_tokens * token + layer_cache_bytes(spec, self.formats, ending, self.chunk_tokens)
        request = of_model.exchanged + self.cpu_experts * of_model.with_experts + of_model.held
        at_once = maximum(self.micro_batch_size, self.chunk_tokens)
        workspace = workspace_bytes(spec, at_once, compute, longest_tokens=self.kv_tokens)
        rows = (
            (Purpose.RESIDENT_WEIGHTS, 1, self.resident_bytes + of_model.head),
            (Purpose.WEIGHT_SLOTS, WEIGHT_SLOTS, self.largest_streamed_bytes),
            (Purpose.EXPERT_SLOTS, EXPERT_SLOTS, self.part_bytes),
            (Purpose.KV_CACHE, self.batches * self.gpu_kv_micro_batches, cached),
            (Purpose.KV_BUFFERS, self.streams_kv * BUFFERS, of_layer),
            (Purpose.EXCHANGE, self.places, request),
            (Purpose.PREFILL_BUFFERS, BUFFERS, chunk),
            (Purpose.PREFIX_BUFFER, 1, prefix_bytes(spec, self.formats, self.prefix_tokens)),
            (Purpose.WORKSPACE, 1, workspace + of_model.counts),
            (Purpose.LOGITS, 1, logits_bytes(spec, compute, self.micro_batch_size)),
        )
        return tuple(Allocation(purpose, Device.GPU, turns, size) for purpose, turns, size in rows)

    def on_host(self) -> tuple[Allocation, ...]:
        """The buffers at the host's level.

        What the CPU needs of a layer for attention or experts lies there also where the layer is
        resident on the GPU.
        """
        spec, of_model = self.spec, _of_model(self.spec, self.formats)
        cached = cache_bytes(spec, self.formats, self.micro_batch_size, self.kv_tokens)
        for_both = self.cpu_attention * of_model.for_attention + self.cpu_experts * of_model.for_experts
        off_gpu = self.num_micro_batches - self.gpu_kv_micro_batches
        request = of_model.exchanged + self.cpu_experts * of_model.with_experts
        sent = (self.batches > 1) * of_model.residual
        in_chunk = self.cpu_prefill_experts * self.chunk_tokens
        at_once = maximum(self.micro_batch_size, in_chunk)
        token = of_model.residual + TOKEN_NUMBER_BYTES
        rows = (
            (Purpose.WEIGHTS, 1, self.host_bytes + of_model.embedding + self.resident_dense * for_both),
            (Purpose.STAGING, self.staging_slots, self.page_bytes),
            (Purpose.KV_CACHE, self.batches * off_gpu, cached),
            (Purpose.EXCHANGE, self.places, request + sent),
            (Purpose.PREFILL_BUFFERS, BUFFERS, in_chunk * of_model.routed),
            (Purpose.PREFILL_HIDDEN, self.num_micro_batches, self.kv_tokens * token),
            (Purpose.WORKSPACE, self.cpu_experts, workspace_bytes(spec, at_once, self.formats.compute)),
        )
        return tuple(Allocation(purpose, Device.CPU, turns, size) for purpose, turns, size in rows)


def page_bytes(largest_streamed_bytes: Number, num_pages: Number) -> Number:
    """Bytes of a page of the layer that streams most; pages begin where units of weights may."""
    return ALIGNMENT_BYTES * -(-largest_streamed_bytes // (num_pages * ALIGNMENT_BYTES))


def logits_bytes(spec: ModelSpec, compute: Format, requests: Number) -> Number:
    """Logits of so many requests, as they are multiplied and as they are chosen from.

    Of several ranks each computes a part of the vocabulary, and has all of its share of the requests
    twice: as it comes from the others, and in order.
    """
    computed = spec.has_head * requests * (spec.vocab_size * LOGIT_BYTES + compute.bytes_of(spec.vocab_size))
    if spec.ranks == 1:
        return computed
    return computed + 2 * -(-requests // spec.ranks) * spec.ranks * spec.vocab_size * LOGIT_BYTES


def cache_bytes(spec: ModelSpec, formats: Formats, micro_batch_size: Number, kv_tokens: Number) -> Number:
    """Bytes of a micro-batch's cache in all layers together.

    `kv_tokens` is what it holds in a layer without a window; with one, no request needs more than
    the window and the block that it ends in.
    """
    total = 0 * kv_tokens
    for kind, layers in spec.layer_kinds().items():
        total = total + layers * cache_bytes_in(kind, formats, micro_batch_size, kv_tokens)
    return total


def cache_bytes_in(kind: Layer, formats: Formats, micro_batch_size: Number, kv_tokens: Number) -> Number:
    """The same in one layer."""
    held = kv_tokens
    if kind.window:
        held = minimum(kv_tokens, micro_batch_size * (kind.window + KV_BLOCK_TOKENS))
    return kind.mixer.cache_bytes(formats, micro_batch_size, held)


def layer_cache_bytes(spec: ModelSpec, formats: Formats, requests: Number, tokens: Number) -> Number:
    """The most that any one layer's cache takes for so many requests and tokens."""
    each = (kind.mixer.cache_bytes(formats, requests, tokens) for kind in spec.layer_kinds())
    return maximum(*each)


def prefix_bytes(spec: ModelSpec, formats: Formats, tokens: Number) -> Number:
    """Bytes that a split prompt of so many tokens keeps on the GPU of earlier parts, in any layer; 0 of none."""
    of_model = _of_model(spec, formats)
    state, in_all = of_model.prefix_state, tokens * of_model.prefix_token
    return maximum(in_all, minimum(tokens, 1) * state) if state else in_all
