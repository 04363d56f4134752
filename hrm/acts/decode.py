"""The acts of decode: one new token for every request of a batch that goes on."""

from typing import TYPE_CHECKING, Final

from hrm import operators
from hrm.acts.load import (
    Counts,
    Load,
    each,
    hidden_bytes,
    if_experts_on_cpu,
    in_each_layer,
    of_a_rank,
    reached_expert_bytes,
    to_gpu,
    to_host,
)
from hrm.acts.pages import page_acts, pages_up_to
from hrm.acts.parts import part_acts
from hrm.acts.sums import sum_acts
from hrm.contract.rings import BUFFERS
from hrm.numeric import Number
from hrm.tasks import Act, Buffer, BufferPart, Device, Lane, Phase, TaskId, Touch

if TYPE_CHECKING:
    from hrm.schedules.pipeline import Pipeline

KV_BUFFERS: Final = Buffer("KV buffers", BUFFERS)
HOST_KV: Final = Buffer("KV cache on the host", grows=True)
TOKEN: Final = Buffer("last tokens")
# Each of the rest has a place for every micro-batch.
HIDDEN: Final = Buffer("hidden states")
QKV: Final = Buffer("queries, keys and values")
HOST_QKV: Final = Buffer("queries, keys and values on the host")
OUTPUT: Final = Buffer("attention output")
HOST_OUTPUT: Final = Buffer("attention output on the host")
ROUTED: Final = Buffer("routed tokens")
HOST_ROUTED: Final = Buffer("routed tokens on the host")
EXPERT_OUTPUT: Final = Buffer("experts' output")
HOST_EXPERT_OUTPUT: Final = Buffer("experts' output on the host")
# Pieces of what lies in HIDDEN before a layer: what each of several ranks has of it and their sum, and the same again
# with attention's output.
PART, SUM, ATTENDED_PART, ATTENDED_SUM = 0, 1, 2, 3
LOADED, STEPPED = 0, 1  # pieces of what lies in KV_BUFFERS: the cache, and the states in it after the new token


def _at(p: "Pipeline", x: TaskId) -> int:
    """The version of what is made anew in every layer of every step."""
    return x.step * p.num_layers + x.layer


def _hidden(p: "Pipeline", x: TaskId, *, after: int = 0, piece: int = PART) -> BufferPart:
    """Hidden states before a layer, or after it."""
    return (HIDDEN, x.index, x.step * (p.num_layers + 1) + x.layer + after, piece)


def _kv_buffer(p: "Pipeline", x: TaskId, piece: int = LOADED) -> BufferPart:
    return KV_BUFFERS.turn(p.kv_load_index(x.step, x.layer, x.index), piece)


def _handed_on(source: Buffer, target: Buffer, p: "Pipeline", x: TaskId) -> Touch:
    at = _at(p, x)
    return (((source, x.index, at, 0),), ((target, x.index, at, 0),))


def _pre_attention(p: "Pipeline", x: TaskId) -> Touch:
    weights = pages_up_to(p, x, p.dense_pages)
    reads = (_hidden(p, x, piece=SUM),) if p.ranks > 1 else _before_layer(p, x)
    return ((*reads, *weights), ((QKV, x.index, _at(p, x), 0),))


def _before_layer(p: "Pipeline", x: TaskId) -> tuple[BufferPart, ...]:
    """Hidden states, and what the CPU's experts add to them."""
    if x.layer > 0 and p.cpu_experts[x.layer - 1]:
        return (_hidden(p, x), (EXPERT_OUTPUT, x.index, _at(p, x) - 1, 0))
    return (_hidden(p, x),)


def _output_projection(p: "Pipeline", x: TaskId) -> Touch:
    reads = ((OUTPUT, x.index, _at(p, x), 0), _hidden(p, x, piece=SUM), *pages_up_to(p, x, p.dense_pages))
    return (reads, (_hidden(p, x, piece=ATTENDED_PART),))


def _attention_on_gpu(p: "Pipeline", x: TaskId) -> Touch:
    reads, written = ((QKV, x.index, _at(p, x), 0),), (OUTPUT, x.index, _at(p, x), 0)
    if p.attends_with_weights(x.layer):
        reads = (*reads, *pages_up_to(p, x, p.dense_pages))
    if not p.streams_kv(x.index):
        return (reads, (written,))
    states = (_kv_buffer(p, x, STEPPED),) if p.has_state(x.layer) else ()
    return ((*reads, _kv_buffer(p, x)), (written, *states))


def _store_kv(p: "Pipeline", x: TaskId) -> Touch:
    """A new token's keys and values, or the whole state that attention has made of the one before."""
    stored = _kv_buffer(p, x, STEPPED) if p.has_state(x.layer) else (QKV, x.index, _at(p, x), 0)
    return ((stored,), ((HOST_KV, (x.layer, x.index), x.step + 1, 0),))


def _post_attention(p: "Pipeline", x: TaskId) -> Touch:
    before = ((OUTPUT, x.index, _at(p, x), 0), _hidden(p, x))
    if p.ranks > 1:
        before = (_hidden(p, x, piece=ATTENDED_SUM),)
    reads = (*before, *pages_up_to(p, x, p.num_pages))
    writes = (_hidden(p, x, after=1),)
    if p.cpu_experts[x.layer]:
        writes = (*writes, (ROUTED, x.index, _at(p, x), 0))
    return (reads, writes)


def _after_layers(p: "Pipeline", x: TaskId) -> tuple[BufferPart, ...]:
    reads = (_hidden(p, x, after=1),)
    return (*reads, (EXPERT_OUTPUT, x.index, _at(p, x), 0)) if p.cpu_experts[x.layer] else reads


def _sample(p: "Pipeline", x: TaskId) -> Touch:
    reads = (_hidden(p, x, after=1, piece=SUM),) if p.ranks > 1 else _after_layers(p, x)
    return (reads, ((TOKEN, x.index, x.step + 1, 0),))


def _if_attended_on_cpu(c: Counts) -> Number:
    return in_each_layer(c) * c.cpu_attention


def _if_streamed(c: Counts) -> Number:
    return in_each_layer(c) * c.streams_kv


def _cache_bytes(x: Load) -> Number:
    return x.kind.mixer.reached_bytes(x.formats, x.tokens, x.context)


def _attended_bytes(x: Load) -> Number:
    attended = x.kind.mixer.attended_bytes(x.formats, x.tokens, x.context)
    return x.costs.runtime.attention_passes * attended


PAGES: Final = page_acts(Phase.DECODE)
LOAD_PAGE: Final = PAGES[-1]
LOAD_PART, PART_EXPERTS = part_acts(
    Phase.DECODE,
    hidden=lambda p, x: _hidden(p, x, after=1),
    seconds=lambda x, _: x.costs.part_experts(x.tokens, x.part_experts),
)
REDUCE_HIDDEN, REDUCE_ATTENTION, REDUCE_LAST = sum_acts(
    Phase.DECODE,
    before=lambda p, x: (_before_layer(p, x), (_hidden(p, x, piece=SUM),)),
    attended=lambda p, x: ((_hidden(p, x, piece=ATTENDED_PART),), (_hidden(p, x, piece=ATTENDED_SUM),)),
    last=lambda p, x: (_after_layers(p, x), (_hidden(p, x, after=1, piece=SUM),)),
)
EMBED: Final = to_gpu(
    letter="E",
    name="EMBED",
    words="token embeddings gathered on the host and moved to the GPU",
    phase=Phase.DECODE,
    touches=lambda p, x: (((TOKEN, x.index, x.step, 0),), (_hidden(p, x),)),
    count=each,
    moves=hidden_bytes,
)
PRE_ATTENTION: Final = Act(
    letter="A",
    name="PRE_ATTENTION",
    words="norm, query, key and value projections, rotary embedding",
    phase=Phase.DECODE,
    lane=Lane.GPU,
    touches=_pre_attention,
    count=in_each_layer,
    seconds=lambda x, _: x.costs.pre_attention(x.tokens, x.kind),
    chained=True,
)
OFFLOAD_QKV: Final = to_host(
    letter="Q",
    name="OFFLOAD_QKV",
    words="queries, keys and values of the new tokens to the host",
    phase=Phase.DECODE,
    touches=lambda p, x: _handed_on(QKV, HOST_QKV, p, x),
    count=_if_attended_on_cpu,
    moves=lambda x: x.tokens * x.kind.mixer.sent_bytes(x.formats),
    chained=True,
)
LOAD_KV: Final = Act(
    letter="K",
    name="LOAD_KV",
    words="a micro-batch's KV cache of one layer to the GPU",
    phase=Phase.DECODE,
    lane=Lane.H2D,
    touches=lambda p, x: (((HOST_KV, (x.layer, x.index), x.step, 0),), (_kv_buffer(p, x),)),
    count=_if_streamed,
    moves=_cache_bytes,
    seconds=lambda x, num_bytes: x.costs.load_kv(num_bytes),
    attends=True,
)
STORE_KV: Final = to_host(
    letter="V",
    name="STORE_KV",
    words="new keys and values to the host",
    phase=Phase.DECODE,
    touches=_store_kv,
    count=_if_streamed,
    moves=lambda x: x.kind.mixer.cache_bytes(x.formats, x.tokens, x.tokens),
)
ATTENTION: Final = Act(
    letter="B",
    name="ATTENTION",
    words="attention over the KV cache, on either device",
    phase=Phase.DECODE,
    lane=Lane.GPU,
    touches=_attention_on_gpu,
    count=lambda c: in_each_layer(c) * (1 - c.cpu_attention),
    seconds=lambda x, _: x.costs.attention(Device.GPU, x.tokens, x.context, x.kind),
    attends=True,
    chained=True,
)
CPU_ATTENTION: Final = Act(
    letter="B",
    name="ATTENTION",
    words="attention over the KV cache, on either device",
    phase=Phase.DECODE,
    lane=Lane.CPU,
    touches=lambda p, x: _handed_on(HOST_QKV, HOST_OUTPUT, p, x),
    count=_if_attended_on_cpu,
    seconds=lambda x, _: x.costs.attention(Device.CPU, x.tokens, x.context, x.kind),
    host_bytes=_attended_bytes,
    attends=True,
    chained=True,
)
LOAD_HIDDEN: Final = to_gpu(
    letter="H",
    name="LOAD_HIDDEN",
    words="attention output (decode) or hidden states (prefill) to the GPU",
    phase=Phase.DECODE,
    touches=lambda p, x: _handed_on(HOST_OUTPUT, OUTPUT, p, x),
    count=_if_attended_on_cpu,
    moves=lambda x: x.tokens * x.kind.mixer.returned_bytes(x.formats),
    chained=True,
)
OUTPUT_PROJECTION: Final = Act(
    letter="T",
    name="OUTPUT_PROJECTION",
    words="output projection of a rank's heads",
    phase=Phase.DECODE,
    lane=Lane.GPU,
    touches=_output_projection,
    count=of_a_rank,
    seconds=lambda x, _: x.costs.output_projection(x.tokens, x.kind),
    chained=True,
)
POST_ATTENTION: Final = Act(
    letter="C",
    name="POST_ATTENTION",
    words="output projection, norm, router, and the experts on the GPU but for those that come in parts",
    phase=Phase.DECODE,
    lane=Lane.GPU,
    touches=_post_attention,
    count=in_each_layer,
    seconds=lambda x, _: x.costs.post_attention(x.tokens, x.gpu_experts, x.kind),
    by_ffn=True,
    chained=True,
)
OFFLOAD_TOKENS: Final = to_host(
    letter="X",
    name="OFFLOAD_TOKENS",
    words="normed tokens and their routing to the host",
    phase=Phase.DECODE,
    touches=lambda p, x: _handed_on(ROUTED, HOST_ROUTED, p, x),
    count=if_experts_on_cpu,
    moves=lambda x: operators.routed_token_bytes(x.spec, x.formats, x.tokens),
    chained=True,
)
CPU_EXPERTS: Final = Act(
    letter="F",
    name="CPU_EXPERTS",
    words="experts that stay on the host, computed there",
    phase=Phase.DECODE,
    lane=Lane.CPU,
    touches=lambda p, x: _handed_on(HOST_ROUTED, HOST_EXPERT_OUTPUT, p, x),
    count=if_experts_on_cpu,
    seconds=lambda x, _: x.costs.cpu_experts(x.tokens, x.host_experts),
    host_bytes=lambda x: reached_expert_bytes(x, x.tokens),
    chained=True,
)
LOAD_EXPERT_OUTPUT: Final = to_gpu(
    letter="Y",
    name="LOAD_EXPERT_OUTPUT",
    words="their output to the GPU",
    phase=Phase.DECODE,
    touches=lambda p, x: _handed_on(HOST_EXPERT_OUTPUT, EXPERT_OUTPUT, p, x),
    count=if_experts_on_cpu,
    moves=hidden_bytes,
    chained=True,
)
SAMPLE: Final = Act(
    letter="L",
    name="SAMPLE",
    words="final norm, LM head, and the choice of the next token",
    phase=Phase.DECODE,
    lane=Lane.GPU,
    touches=_sample,
    count=each,
    seconds=lambda x, _: x.costs.sample(x.tokens),
    ends_step=True,
)
ALL: Final = (
    EMBED,
    REDUCE_HIDDEN,
    PRE_ATTENTION,
    OFFLOAD_QKV,
    LOAD_KV,
    STORE_KV,
    ATTENTION,
    CPU_ATTENTION,
    LOAD_HIDDEN,
    OUTPUT_PROJECTION,
    REDUCE_ATTENTION,
    POST_ATTENTION,
    PART_EXPERTS,
    OFFLOAD_TOKENS,
    CPU_EXPERTS,
    LOAD_EXPERT_OUTPUT,
    *PAGES,
    LOAD_PART,
    REDUCE_LAST,
    SAMPLE,
)
