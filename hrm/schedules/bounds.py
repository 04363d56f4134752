"""What a step of decode takes at least in an order in which lanes work in turn, whatever their own work is."""

from typing import NamedTuple

from hrm.numeric import Number, maximum, where
from hrm.schedules.orders import LOOKAHEAD
from hrm.tasks import Lane

Terms = tuple[Number, ...]


class StepWork(NamedTuple):
    """The seconds of work of a decode step, and what the order's bounds depend on; numbers or arrays.

    `weights_s` is the part of the H2D lane that moves weights. `cpu_attention` and `streams_kv` are shares of the
    micro-batches.
    """

    gpu_s: Number
    cpu_s: Number
    h2d_s: Number
    d2h_s: Number
    weights_s: Number
    num_micro_batches: Number
    cpu_attention: Number
    streams_kv: Number

    @staticmethod
    def of(lanes: dict[Lane, Number], *, weights_s: Number, n: Number, cpu: Number, streams: Number) -> "StepWork":
        """Of the seconds of each lane."""
        gpu_s, cpu_s, h2d_s, d2h_s = (lanes[lane] for lane in (Lane.GPU, Lane.CPU, Lane.H2D, Lane.D2H))
        return StepWork(gpu_s, cpu_s, h2d_s, d2h_s, weights_s, n, cpu, streams)


def cgopipe(_: StepWork) -> Terms:
    """CGOPipe overlaps all lanes, as far as micro-batches in flight allow."""
    return ()


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
