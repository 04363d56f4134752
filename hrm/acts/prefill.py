"""The acts of prefill: chunks of prompts, computed on the GPU but for experts that may stay on the host.

The CPU adds its experts' output to the hidden states where these wait on the host between two layers. After the last
layer, when they do not go there, its output comes to the GPU instead.
"""

from typing import TYPE_CHECKING, Final

from hrm import operators
from hrm.acts.load import (
    Counts,
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
from hrm.tasks import Act, Buffer, BufferPart, Lane, Phase, TaskId, Touch

if TYPE_CHECKING:
    from hrm.schedules.pipeline import Pipeline

HIDDEN: Final = Buffer("hidden states of a chunk", BUFFERS)
KV: Final = Buffer("keys and values of a chunk", BUFFERS)
PREFIX: Final = Buffer("keys and values of a split prompt")
HOST_HIDDEN: Final = Buffer("hidden states of a chunk on the host")
HOST_KV: Final = Buffer("KV cache on the host", grows=True)
ROUTED: Final = Buffer("routed tokens of a chunk", BUFFERS)
HOST_ROUTED: Final = Buffer("routed tokens of a chunk on the host", BUFFERS)
BEFORE, AFTER = 0, 1  # a layer, or the CPU's experts: pieces of what lies in HIDDEN and HOST_HIDDEN
# And of what lies in HIDDEN where several ranks have parts of it: sums of these, and parts with attention's output.
SUM, ATTENDED_PART, ATTENDED_SUM, LAST_SUM = 2, 3, 4, 5
TOKENS, OUTPUT = 0, 1  # pieces of what lies in ROUTED


def _turn(p: "Pipeline", x: TaskId) -> int:
    return x.layer * p.num_micro_batches + x.index


def _hidden(p: "Pipeline", x: TaskId, piece: int) -> BufferPart:
    return HIDDEN.turn(_turn(p, x), piece)


def _kv(p: "Pipeline", x: TaskId) -> BufferPart:
    return KV.turn(_turn(p, x))


def _routed(p: "Pipeline", x: TaskId, piece: int) -> BufferPart:
    return ROUTED.turn(_turn(p, x), piece)


def _host_hidden(p: "Pipeline", x: TaskId) -> BufferPart:
    """Hidden states before a layer, on the host."""
    return (HOST_HIDDEN, x.index, x.layer, AFTER if p.cpu_experts[x.layer - 1] else BEFORE)


def _attended(p: "Pipeline", x: TaskId) -> Touch:
    """What attention touches besides hidden states and weights."""
    turn = _turn(p, x)
    # At worst a prompt goes on from every chunk to the next, and each part of it reads those before.
    prefix = ((PREFIX, 0, turn - 1, 0),) if x.index else ()
    kept = (PREFIX, 0, turn, 0)
    return (prefix, (kept,) if p.kv_on_gpu[x.index] else (kept, _kv(p, x)))


def _attention(p: "Pipeline", x: TaskId) -> Touch:
    reads, writes = _attended(p, x)
    weights = pages_up_to(p, x, p.dense_pages)
    return ((_hidden(p, x, SUM), *weights, *reads), (_hidden(p, x, ATTENDED_PART), *writes))


def _layer(p: "Pipeline", x: TaskId) -> Touch:
    reads, writes = ((), ()) if p.ranks > 1 else _attended(p, x)
    before = _hidden(p, x, ATTENDED_SUM if p.ranks > 1 else BEFORE)
    writes = (_hidden(p, x, AFTER), *writes)
    if p.cpu_experts[x.layer]:
        writes = (*writes, _routed(p, x, TOKENS))
    return ((before, *pages_up_to(p, x, p.num_pages), *reads), writes)


def _cpu_experts(p: "Pipeline", x: TaskId) -> Touch:
    added = (HOST_HIDDEN, x.index, x.layer + 1)
    reads = (HOST_ROUTED.turn(_turn(p, x)),)
    if x.layer < p.num_layers - 1:
        reads = (*reads, (*added, BEFORE))
    return (reads, ((*added, AFTER),))


def _after_layers(p: "Pipeline", x: TaskId) -> tuple[BufferPart, ...]:
    reads = (_hidden(p, x, AFTER),)
    return (*reads, _routed(p, x, OUTPUT)) if p.cpu_experts[x.layer] else reads


def _sample(p: "Pipeline", x: TaskId) -> Touch:
    return ((_hidden(p, x, LAST_SUM),) if p.ranks > 1 else _after_layers(p, x), ())


def _between_layers(c: Counts) -> Number:
    return (c.layers - 1) * c.pieces


def _if_last_on_cpu(c: Counts) -> Number:
    return c.pieces * (c.last_cpu_experts >= 1)


PAGES: Final = page_acts(Phase.PREFILL)
LOAD_PAGE: Final = PAGES[-1]
LOAD_PART, PART_EXPERTS = part_acts(
    Phase.PREFILL,
    hidden=lambda p, x: _hidden(p, x, AFTER),
    seconds=lambda x, _: x.costs.going_on(x, lambda tokens: x.costs.part_experts(tokens, x.part_experts)),
)
REDUCE_HIDDEN, REDUCE_ATTENTION, REDUCE_LAST = sum_acts(
    Phase.PREFILL,
    before=lambda p, x: ((_hidden(p, x, BEFORE),), (_hidden(p, x, SUM),)),
    attended=lambda p, x: ((_hidden(p, x, ATTENDED_PART),), (_hidden(p, x, ATTENDED_SUM),)),
    attended_s=lambda x, _: x.costs.going_on(x, x.costs.all_reduce),
    attended_by_ffn=True,
    last=lambda p, x: (_after_layers(p, x), (_hidden(p, x, LAST_SUM),)),
    last_s=lambda x, _: x.costs.of_ends(x.requests, x.costs.all_reduce),
)
EMBED: Final = to_gpu(
    letter="E",
    name="EMBED",
    words="token embeddings gathered on the host and moved to the GPU",
    phase=Phase.PREFILL,
    touches=lambda p, x: ((), (_hidden(p, x, BEFORE),)),
    count=each,
    moves=hidden_bytes,
    chained=True,
)
LOAD_HIDDEN: Final = to_gpu(
    letter="H",
    name="LOAD_HIDDEN",
    words="attention output (decode) or hidden states (prefill) to the GPU",
    phase=Phase.PREFILL,
    touches=lambda p, x: ((_host_hidden(p, x),), (_hidden(p, x, BEFORE),)),
    count=_between_layers,
    moves=hidden_bytes,
    chained=True,
)
PREFILL_ATTENTION: Final = Act(
    letter="J",
    name="PREFILL_ATTENTION",
    words="one layer over a chunk of prompts up to the output projection of a rank's heads",
    phase=Phase.PREFILL,
    lane=Lane.GPU,
    touches=_attention,
    count=of_a_rank,
    seconds=lambda x, _: x.costs.prefill_attention(x),
    attends=True,
    by_ffn=True,
    chained=True,
)
PREFILL_LAYER: Final = Act(
    letter="P",
    name="PREFILL_LAYER",
    words="one layer over a chunk of prompts, but for experts on the CPU or in parts",
    phase=Phase.PREFILL,
    lane=Lane.GPU,
    touches=_layer,
    count=in_each_layer,
    seconds=lambda x, _: x.costs.prefill_layer(x),
    attends=True,
    by_ffn=True,
    chained=True,
)
STORE_KV: Final = to_host(
    letter="V",
    name="STORE_KV",
    words="new keys and values to the host",
    phase=Phase.PREFILL,
    touches=lambda p, x: ((_kv(p, x),), ((HOST_KV, (x.layer, x.index), 1, 0),)),
    count=in_each_layer,
    moves=lambda x: x.stored_share * x.kind.mixer.cache_bytes(x.formats, x.tokens / x.context, x.tokens),
)
STORE_HIDDEN: Final = to_host(
    letter="O",
    name="STORE_HIDDEN",
    words="hidden states of a chunk of prompts to the host",
    phase=Phase.PREFILL,
    touches=lambda p, x: ((_hidden(p, x, AFTER),), ((HOST_HIDDEN, x.index, x.layer + 1, BEFORE),)),
    count=_between_layers,
    moves=hidden_bytes,
    chained=True,
)
OFFLOAD_TOKENS: Final = to_host(
    letter="X",
    name="OFFLOAD_TOKENS",
    words="normed tokens and their routing to the host",
    phase=Phase.PREFILL,
    touches=lambda p, x: ((_routed(p, x, TOKENS),), (HOST_ROUTED.turn(_turn(p, x)),)),
    count=if_experts_on_cpu,
    moves=lambda x: x.costs.going_on(x, lambda tokens: operators.routed_token_bytes(x.spec, x.formats, tokens)),
    of_cpu_experts=True,
    chained=True,
)
CPU_EXPERTS: Final = Act(
    letter="F",
    name="CPU_EXPERTS",
    words="experts that stay on the host, computed there",
    phase=Phase.PREFILL,
    lane=Lane.CPU,
    touches=_cpu_experts,
    count=if_experts_on_cpu,
    seconds=lambda x, _: x.costs.going_on(x, lambda tokens: x.costs.cpu_experts(tokens, x.host_experts)),
    host_bytes=lambda x: x.costs.going_on(x, lambda tokens: reached_expert_bytes(x, tokens)),
    of_cpu_experts=True,
    chained=True,
)
LOAD_EXPERT_OUTPUT: Final = to_gpu(
    letter="Y",
    name="LOAD_EXPERT_OUTPUT",
    words="their output to the GPU",
    phase=Phase.PREFILL,
    touches=lambda p, x: (((HOST_HIDDEN, x.index, x.layer + 1, AFTER),), (_routed(p, x, OUTPUT),)),
    count=_if_last_on_cpu,
    moves=lambda x: x.costs.going_on(x, lambda tokens: operators.hidden_bytes(x.spec, x.formats, tokens)),
    of_last=True,
    chained=True,
)
SAMPLE: Final = Act(
    letter="L",
    name="SAMPLE",
    words="final norm, LM head, and the choice of the next token",
    phase=Phase.PREFILL,
    lane=Lane.GPU,
    touches=_sample,
    count=each,
    seconds=lambda x, _: x.costs.sample_first(x.tokens, x.requests),
    chained=True,
    ends_step=True,
)
ALL: Final = (
    EMBED,
    LOAD_HIDDEN,
    REDUCE_HIDDEN,
    PREFILL_ATTENTION,
    REDUCE_ATTENTION,
    PREFILL_LAYER,
    PART_EXPERTS,
    STORE_KV,
    OFFLOAD_TOKENS,
    STORE_HIDDEN,
    CPU_EXPERTS,
    LOAD_EXPERT_OUTPUT,
    *PAGES,
    LOAD_PART,
    REDUCE_LAST,
    SAMPLE,
)
