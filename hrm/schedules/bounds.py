"""What a step of decode takes at least in an order in which lanes work in turn, whatever their own work is."""

from typing import Final, NamedTuple

from hrm.numeric import Number, is_zero, maximum, minimum, where
from hrm.schedules.orders import LOOKAHEAD

Terms = tuple[Number, ...]
_HALF: Final = 0.5


class StepWork(NamedTuple):
    """The seconds of work of a decode step, and what the order's bounds depend on; numbers or arrays.

    `weights_s` is the part of the H2D lane that moves weights, and `attention_s` that of the GPU which is attention.
    Micro-batches that attend on the CPU are away from the GPU for `away_s`, all of them together. `cpu_attention` and
    `streams_kv` are shares of the micro-batches.
    """

    gpu_s: Number
    cpu_s: Number
    h2d_s: Number
    d2h_s: Number
    weights_s: Number
    attention_s: Number
    away_s: Number
    num_micro_batches: Number
    cpu_attention: Number
    streams_kv: Number


def cgopipe(step: StepWork) -> Terms:
    """CGOPipe overlaps all lanes, as far as micro-batches in flight allow.

    While one of them is away to the CPU's attention, the GPU ends the layer of the one before and begins that of the
    one after, with attention if that is on the GPU. If no two in a row go to the CPU, as is so where it has half of them
    at most, these whiles come in turn, and the rest of the GPU's work between them.
    """
    share = step.cpu_attention
    apart = (share > 0) & (share <= _HALF)
    if is_zero(apart):
        return (0.0,)
    others = minimum(share, _HALF)
    rest_s = (1 - others) * (step.gpu_s - step.attention_s) + (1 - 2 * others) / (1 - others) * step.attention_s
    return (apart * (step.away_s + rest_s),)


def fastdecode(step: StepWork) -> Terms:
    """A layer's weights move whole, ahead of the hidden states of its micro-batches from the second on."""
    n = step.num_micro_batches
    behind = maximum(n * step.cpu_attention - LOOKAHEAD, 0) / n
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
