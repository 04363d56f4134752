"""The acts of prefill: chunks of prompts, all computed on the GPU."""

from typing import TYPE_CHECKING, Final

from hrm.acts.load import Counts, each, hidden_bytes, in_each_layer
from hrm.acts.pages import page_acts, pages_up_to
from hrm.contract.rings import BUFFERS
from hrm.numeric import Number
from hrm.tasks import Act, Buffer, Lane, Part, Phase, TaskId, Touch

if TYPE_CHECKING:
    from hrm.schedules.pipeline import Pipeline

HIDDEN: Final = Buffer("hidden states of a chunk", BUFFERS)
KV: Final = Buffer("keys and values of a chunk", BUFFERS)
PREFIX: Final = Buffer("keys and values of a split prompt")
HOST_HIDDEN: Final = Buffer("hidden states of a chunk on the host")
HOST_KV: Final = Buffer("KV cache on the host", grows=True)
BEFORE, AFTER = 0, 1  # a layer: pieces of what lies in HIDDEN


def _turn(p: "Pipeline", x: TaskId) -> int:
    return x.layer * p.num_micro_batches + x.index


def _hidden(p: "Pipeline", x: TaskId, piece: int) -> Part:
    return HIDDEN.turn(_turn(p, x), piece)


def _kv(p: "Pipeline", x: TaskId) -> Part:
    return KV.turn(_turn(p, x))


def _layer(p: "Pipeline", x: TaskId) -> Touch:
    turn = _turn(p, x)
    # At worst a prompt goes on from every chunk to the next, and each part of it reads those before.
    prefix = ((PREFIX, 0, turn - 1, 0),) if x.index else ()
    kept = (PREFIX, 0, turn, 0)
    reads = (_hidden(p, x, BEFORE), *pages_up_to(p, x, p.num_pages), *prefix)
    if p.kv_on_gpu[x.index]:
        return (reads, (_hidden(p, x, AFTER), kept))
    return (reads, (_hidden(p, x, AFTER), kept, _kv(p, x)))


def _between_layers(c: Counts) -> Number:
    return (c.layers - 1) * c.pieces


STAGE_PAGE, LOAD_PAGE = page_acts(Phase.PREFILL)
EMBED: Final = Act(
    letter="E",
    name="EMBED",
    words="token embeddings gathered on the host and moved to the GPU",
    phase=Phase.PREFILL,
    lane=Lane.H2D,
    touches=lambda p, x: ((), (_hidden(p, x, BEFORE),)),
    count=each,
    moves=hidden_bytes,
    seconds=lambda x, num_bytes: x.costs.h2d_to_all(num_bytes),
    chained=True,
)
LOAD_HIDDEN: Final = Act(
    letter="H",
    name="LOAD_HIDDEN",
    words="attention output (decode) or hidden states (prefill) to the GPU",
    phase=Phase.PREFILL,
    lane=Lane.H2D,
    touches=lambda p, x: (((HOST_HIDDEN, x.index, x.layer, 0),), (_hidden(p, x, BEFORE),)),
    count=_between_layers,
    moves=hidden_bytes,
    seconds=lambda x, num_bytes: x.costs.h2d_to_all(num_bytes),
    chained=True,
)
PREFILL_LAYER: Final = Act(
    letter="P",
    name="PREFILL_LAYER",
    words="one whole layer over a chunk of prompts",
    phase=Phase.PREFILL,
    lane=Lane.GPU,
    touches=_layer,
    count=in_each_layer,
    seconds=lambda x, _: x.costs.prefill_layer(x),
    attends=True,
    by_ffn=True,
    chained=True,
)
STORE_KV: Final = Act(
    letter="V",
    name="STORE_KV",
    words="new keys and values to the host",
    phase=Phase.PREFILL,
    lane=Lane.D2H,
    touches=lambda p, x: ((_kv(p, x),), ((HOST_KV, (x.layer, x.index), 1, 0),)),
    count=in_each_layer,
    moves=lambda x: x.stored_share * x.kind.mixer.cache_bytes(x.formats, x.tokens / x.context, x.tokens),
    seconds=lambda x, num_bytes: x.costs.d2h(num_bytes),
)
STORE_HIDDEN: Final = Act(
    letter="O",
    name="STORE_HIDDEN",
    words="hidden states of a chunk of prompts to the host",
    phase=Phase.PREFILL,
    lane=Lane.D2H,
    touches=lambda p, x: ((_hidden(p, x, AFTER),), ((HOST_HIDDEN, x.index, x.layer + 1, 0),)),
    count=_between_layers,
    moves=hidden_bytes,
    seconds=lambda x, num_bytes: x.costs.d2h(num_bytes),
    chained=True,
)
SAMPLE: Final = Act(
    letter="L",
    name="SAMPLE",
    words="final norm, LM head, and the choice of the next token",
    phase=Phase.PREFILL,
    lane=Lane.GPU,
    touches=lambda p, x: ((_hidden(p, x, AFTER),), ()),
    count=each,
    seconds=lambda x, _: x.costs.first_tokens(x.requests),
    chained=True,
    ends_step=True,
)
ALL: Final = (EMBED, LOAD_HIDDEN, PREFILL_LAYER, STORE_KV, STORE_HIDDEN, LOAD_PAGE, STAGE_PAGE, SAMPLE)
