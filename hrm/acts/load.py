"""What acts are asked about: how many tasks a phase has, and what one of them has to do."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from hrm import operators
from hrm.formats import Formats
from hrm.layers import Layer
from hrm.model_spec import ModelSpec
from hrm.numeric import Number
from hrm.tasks import Act, Lane

if TYPE_CHECKING:
    from hrm.costs import Costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What decides how many tasks a decode step, or the whole of prefill, has; for one policy or a grid of them.

    `pieces` is the number of micro-batches, or of chunks in prefill, and `pages` those of a layer. The rest are shares:
    of the micro-batches attended on the CPU and those whose cache streams to the GPU, of the layers with experts on the
    CPU, of those one that the last layer is among them, and 1 if weights are staged. A layer's experts stream in
    `parts` as a mean, the last layer's in `last_parts`. With several `ranks` it is one of them that has the tasks.
    """

    layers: int
    pieces: Number
    pages: Number
    cpu_attention: Number = 0
    streams_kv: Number = 0
    cpu_experts: Number = 0
    last_cpu_experts: Number = 0
    parts: Number = 0
    last_parts: Number = 0
    staging: Number = 0
    ranks: int = 1
    in_layers: Number = field(init=False)  # pieces in all layers

    def __post_init__(self) -> None:
        """Work out once what most acts ask for."""
        object.__setattr__(self, "in_layers", self.layers * self.pieces)


class Load(NamedTuple):
    """What a task of one layer has to do; numbers, or arrays for a grid of policies.

    In decode, `tokens` is the mean number of active requests in a micro-batch and `context` their mean context. In
    prefill, `tokens` is prompt tokens in a chunk, `context` the mean prompt length, `requests` the prompts that end in
    a chunk and `stored_share` the part of the keys and values that goes to the host. `kind` is the layer's and
    `is_last` says that it is the model's last; `last` is what that one has to do, if it is told apart. Of its experts
    `gpu_experts` are there and computed on the GPU, `host_experts` are not: the CPU computes them, or they stream in
    parts of `part_experts`. `page_bytes` is what one page of its weights holds, and `known` are numbers worked out
    `once`. A plain tuple, as searches make one for every kind of layer and task.
    """

    costs: "Costs"
    kind: Layer
    tokens: Number
    context: Number
    known: dict[Hashable, Number]
    is_last: bool = False
    last: "Load | None" = None
    requests: Number = 0
    stored_share: Number = 1
    gpu_experts: Number = 0
    host_experts: Number = 0
    part_experts: Number = 0
    page_bytes: Number = 0

    @property
    def spec(self) -> ModelSpec:
        """The model's dimensions."""
        return self.costs.spec

    @property
    def formats(self) -> Formats:
        """What weights, caches and hidden states are stored in."""
        return self.costs.formats

    def once(self, key: Hashable, work_out: Callable[[], Number]) -> Number:
        """A number that is the same for all layers that the key does not tell apart, worked out for the first."""
        if key not in self.known:
            self.known[key] = work_out()
        return self.known[key]


def each(c: Counts) -> Number:
    """One task for every micro-batch or chunk."""
    return c.pieces


def in_each_layer(c: Counts) -> Number:
    """One task for every micro-batch or chunk in every layer."""
    return c.in_layers


def of_a_rank(c: Counts) -> Number:
    """One task for every micro-batch or chunk in every layer of one of several ranks."""
    return in_each_layer(c) * (c.ranks > 1)


def if_experts_on_cpu(c: Counts) -> Number:
    """One task for every micro-batch or chunk in every layer with experts on the CPU."""
    return in_each_layer(c) * c.cpu_experts


def of_each_part(c: Counts) -> Number:
    """One task for every micro-batch or chunk and every part in which experts stream."""
    return in_each_layer(c) * c.parts


def reached_expert_bytes(x: Load, tokens: Number) -> Number:
    """Weights of the CPU's experts that so many tokens are expected to reach."""
    return x.spec.experts.hit(tokens, x.host_experts) * x.costs.expert_bytes


def hidden_bytes(x: Load) -> Number:
    """Hidden states of a task's tokens."""
    return operators.hidden_bytes(x.spec, x.formats, x.tokens)


# Acts that move what they hand over across a link of pinned memory.
to_gpu = partial(Act, lane=Lane.H2D, seconds=lambda x, num_bytes: x.costs.h2d(num_bytes))
to_host = partial(Act, lane=Lane.D2H, seconds=lambda x, num_bytes: x.costs.d2h(num_bytes))
