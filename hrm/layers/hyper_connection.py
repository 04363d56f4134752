"""Hyper-connections: several residual streams, mixed before and after each block."""

from hrm.formats import Formats
from hrm.layers.base import TensorSpec, Unit
from hrm.layers.work import Kernel, Operator, gemms
from hrm.numeric import Number


def stream_tensors(name: str, streams: int, hidden_size: int, unit: Unit) -> tuple[TensorSpec, ...]:
    """What the weights of the mixing are projected by, for a block called `name`; none of one stream."""
    if streams == 1:
        return ()
    weights = _weights(streams)
    return (
        TensorSpec(f"{name}_streams", (weights, streams * hidden_size), unit),
        TensorSpec(f"{name}_streams_bias", (weights,), unit),
        TensorSpec(f"{name}_streams_scale", (3,), unit),
    )


def mix_streams(streams: int, hidden_size: int, formats: Formats, tokens: Number) -> Operator:
    """The weights of so many tokens, their streams as one before a block, and mixed with its output."""
    if streams == 1:
        return Operator()
    width = streams * hidden_size
    weights = gemms(tokens, _weights(streams) * width, width + _weights(streams), formats)
    flops = 2 * width * (1 + streams + 1)
    mixed = Kernel(tokens * flops, formats.compute.bytes_of(tokens, 3 * width + 2 * hidden_size), tokens)
    return Operator((weights, mixed), 2)


def _weights(streams: int) -> int:
    """One into a block for every stream, one out of it, and one from each stream to each."""
    return (2 + streams) * streams
