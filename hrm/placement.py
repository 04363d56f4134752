"""Where a layer's weights and a micro-batch's cache lie, and their bytes at each place.

What is told is counted: it may be of one layer, of the mean of several or of all together, and of
one policy or of many at once, with arrays for numbers.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from hrm.formats import Format
from hrm.layers import Layer
from hrm.model_spec import ModelSpec
from hrm.numeric import Number

Layers = Iterable[tuple[Layer, Number]]  # how many there are of each kind, or which share


class Place(Enum):
    """Where something lies and is used: data on the GPU is used there, other data is moved or not."""

    GPU = "stays on the GPU"
    STREAMED = "lies on the host and moves to the GPU to be used"
    IN_PARTS = "lies on the host and moves to the GPU in parts, each of which makes room for another"
    HOST = "lies on the host and is used there"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What of the layers' weights is at which place.

    Some routed experts of a layer stay on the GPU. The others are streamed, with `in_parts` some of
    them at a time, or with `cpu_experts` computed on the host. All else of a layer stays on the GPU if
    `resident_dense`, and else is streamed. All three are 0 or 1.
    """

    spec: ModelSpec
    weights: Format
    resident_dense: Number
    cpu_experts: Number = 0
    in_parts: Number = 0

    def bytes_at(self, place: Place, layers: Layers, resident_experts: Number) -> Number:
        """Bytes of these layers at a place; `resident_experts` are those of all of them together."""
        dense, experts = 0, 0
        for kind, count in layers:
            dense = dense + count * kind.dense_bytes(self.weights)
            experts = experts + count * kind.num_experts
        others = experts - resident_experts
        match place:
            case Place.GPU:
                dense, experts = self.resident_dense * dense, resident_experts
            case Place.STREAMED:
                whole = (1 - self.cpu_experts) * (1 - self.in_parts)
                dense, experts = (1 - self.resident_dense) * dense, whole * others
            case Place.IN_PARTS:
                dense, experts = 0, (1 - self.cpu_experts) * self.in_parts * others
            case Place.HOST:
                dense, experts = 0, self.cpu_experts * others
        return dense + experts * self.spec.expert_bytes(self.weights)

    def bytes_in_all(self, place: Place, resident_experts: Number) -> Number:
        """Bytes at a place of all the model's layers, which have so many resident experts together."""
        return self.bytes_at(place, self.spec.layer_kinds().items(), resident_experts)


def experts_of_layers(spec: ModelSpec) -> tuple[int, ...]:
    """How many experts each layer has: what is resident if all are."""
    return tuple(layer.num_experts for layer in spec.layers)


def caches_at(place: Place, *, number: Number, on_gpu: Number, gpu_attention: Number) -> Number:
    """How many of a batch's micro-batches have their KV cache at a place, of `number` in all.

    The caches that do not stay on the GPU are streamed if attention is to run there.
    """
    match place:
        case Place.GPU:
            return on_gpu
        case Place.STREAMED:
            return (number - on_gpu) * gpu_attention
        case Place.HOST:
            return (number - on_gpu) * (1 - gpu_attention)
        case Place.IN_PARTS:
            return 0 * number
