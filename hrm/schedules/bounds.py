"""What a step of decode takes at least in an order in which lanes work in turn, whatever their own work is."""

from typing import Final, NamedTuple

from hrm.numeric import Number, maximum, minimum, where

Terms = tuple[Number, ...]
_HALF: Final = 0.5
_TWO: Final = 2
_NEXT_TO_NOTHING: Final = 1e-9


class StepWork(NamedTuple):
    """The seconds of work of a decode step, and what the order's bounds depend on; numbers or arrays.

    `weights_s` is the part of the H2D lane that moves weights, `attention_s` and `cpu_attention_s` those of the GPU and
    the CPU which are attention, and `exchange_s` is what moves to and from that on the CPU. `cpu_attention` and
    `streams_kv` are shares of the micro-batches, whose attention is launched `lookahead` of them ahead.
    """

    gpu_s: Number
    cpu_s: Number
    h2d_s: Number
    d2h_s: Number
    weights_s: Number
    attention_s: Number
    cpu_attention_s: Number
    exchange_s: Number
    num_micro_batches: Number
    lookahead: Number
    cpu_attention: Number
    streams_kv: Number


def cgopipe(step: StepWork) -> Terms:
    """CGOPipe overlaps all lanes, as far as micro-batches in flight allow.

    With a lookahead of two, to which alone these terms apply, the GPU begins a layer of a micro-batch when it has ended
    that of the one two before. So where one cache of three in a row is on the GPU, that of the middle one, the CPU
    waits for the GPU to end what the first and to begin what the last has to do. Where the GPU has half of the caches
    or more, no two in a row go to the CPU, and while one is away the GPU has nothing else to do than to end the layer
    of the one before and to begin that of the one after, with attention if that is on the GPU.
    """
    share = step.cpu_attention
    between_s = (1 - share) * (step.gpu_s - step.attention_s)
    moved_s = minimum((1 - share) / maximum(share, _NEXT_TO_NOTHING), 1) * step.exchange_s
    in_turn_s = (step.lookahead <= _TWO) * (step.cpu_attention_s + moved_s + between_s)
    others = minimum(share, _HALF)
    beside_s = (step.lookahead <= _TWO) * (1 - 2 * others) / (1 - others) * step.attention_s
    return (in_turn_s, (share <= _HALF) * (in_turn_s + beside_s))


def fastdecode(step: StepWork) -> Terms:
    """A layer's weights move whole, ahead of the hidden states of its micro-batches from the second on."""
    n = step.num_micro_batches
    behind = maximum(n * step.cpu_attention - step.lookahead, 0) / n
    return (step.weights_s + behind * step.gpu_s,)


def flexgen(step: StepWork) -> Terms:
    """A layer's weights move whole, ahead of the first cache; attention on the CPU runs in turn with the GPU.

    This is of layers alike, and longer than it takes if some have no weights to load.
    """
    n, weights_s = step.num_micro_batches, step.weights_s
    on_cpu = step.cpu_attention > 0
    behind = on_cpu + (step.streams_kv > 0)
    small_s = step.h2d_s - weights_s
    in_turn_s = step.gpu_s + step.cpu_s + step.d2h_s + small_s
    # The first micro-batch's attention, and that of caches on the GPU, runs meanwhile.
    serial_s = weights_s + in_turn_s * maximum(n * step.cpu_attention - 1, 0) / n
    return (
        behind * where(on_cpu, serial_s, weights_s + small_s),
        behind * where(on_cpu, in_turn_s, weights_s + step.gpu_s),
        behind * where(on_cpu, in_turn_s, weights_s + step.cpu_s),
    )


def deepspeed(step: StepWork) -> Terms:
    """The next layer's weights are loaded only once the last one's buffer is free."""
    return step.weights_s, step.gpu_s + step.cpu_s + step.d2h_s + step.h2d_s - step.weights_s
