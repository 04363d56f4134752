"""Feed-forward blocks: one dense FFN, or routed experts with shared ones."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Final, Literal, Self, final

from hrm.contract.launches import GROUPED_DTYPE, GROUPED_EXPERTS_LAUNCHES, LAUNCHES_PER_EXPERT, ROUTING_LAUNCHES
from hrm.contract.rows import ROUTING_BYTES
from hrm.formats import Format, Formats
from hrm.layers.base import (
    FeedForward,
    Section,
    Sections,
    TensorSpec,
    Unit,
    Vectors,
    check_vectors,
    share,
    vector_tensors,
)
from hrm.layers.hyper_connection import mix_streams, stream_tensors
from hrm.layers.work import Operator, gemms, linear, weighted
from hrm.numeric import Number, maximum, minimum, power

# Vectors of what is done to the sum of all experts: norms of it, and of what shared ones add, and a scale.
AFTER_EXPERTS: Final = ("routed_output_norm", "ffn_output_norm", "layer_scale")


def matrices(name: str, hidden: int, inner: int, unit: Unit, *, gated: bool = True) -> tuple[TensorSpec, ...]:
    """The two matrices of an FFN; the first one has the gate above what it scales."""
    parts = (inner,) * (1 + gated)
    return (
        TensorSpec(f"{name}w13" if gated else f"{name}w1", (sum(parts), hidden), unit, 0, parts),
        TensorSpec(f"{name}w2", (hidden, inner), unit, 1),
    )


def through(rows: Number, hidden: int, inner: int, formats: Formats, *, gated: bool = True) -> Operator:
    """An FFN that every token goes through."""
    parameters = (2 + gated) * hidden * inner
    return Operator((gemms(rows, parameters, 2 * hidden + 3 * inner, formats),), LAUNCHES_PER_EXPERT)


@final
@dataclass(frozen=True, kw_only=True)
class DenseFfn(FeedForward):
    """One FFN that every token goes through."""

    hidden_size: int
    intermediate_size: int
    gated: bool = True
    vectors: Vectors = ()
    block: Literal["dense_ffn"] = "dense_ffn"

    def __post_init__(self) -> None:
        """Reject impossible dimensions (ModelError)."""
        self.check_sizes("hidden_size", "intermediate_size")
        check_vectors("vectors", self.vectors)

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The norm and the matrices."""
        return (
            TensorSpec("ffn_norm", (self.hidden_size,), Unit.FFN),
            *matrices("dense_", self.hidden_size, self.intermediate_size, Unit.FFN, gated=self.gated),
            *vector_tensors(self.vectors, Unit.FFN),
        )

    @property
    def inner_size(self) -> int:
        """Its width."""
        return self.intermediate_size

    def dense(self, formats: Formats, tokens: Number) -> Operator:
        """The whole."""
        return through(tokens, self.hidden_size, self.intermediate_size, formats, gated=self.gated)

    def obstacle_to(self, ranks: int) -> str:
        """A width of less than a unit for each GPU; what is left over of it goes to some of them."""
        inner = self.intermediate_size
        return f"an FFN's {inner} inner units cannot be divided by {ranks}" if inner < ranks else ""

    def shares(self, ranks: int, whole: int) -> dict[str, int]:
        """A part of its width."""
        return {"intermediate_size": share(self.intermediate_size, ranks, whole)}

    @property
    def sections(self) -> Mapping[str, Sections]:
        """Biases of what is between its matrices."""
        inner = Section(self.intermediate_size)
        return {"dense_w1_bias": (inner,), "dense_w13_bias": (inner, inner)}


@final
@dataclass(frozen=True, kw_only=True)
class RoutedExperts(FeedForward):
    """Experts of one size of which a router chooses some for each token, and shared ones.

    The shared ones, `shared_intermediate_size` wide together, compute every token. `vectors` lie
    beside the router's matrix, `expert_vectors` in every expert. `frequencies` are the shares of
    tokens that go to the experts, from the most favoured to the least, as measured; empty for
    uniform routing. A layer may have several such blocks: experts of several classes.

    With a `latent_size` routed experts work on so many elements, to which one matrix projects a token
    down and from which another projects what they return up. Of what tokens choose, `zero_experts`
    more return the token itself and cost nothing. The hidden state has `streams`.
    """

    hidden_size: int
    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    gated: bool = True
    latent_size: int = 0
    zero_experts: int = 0
    streams: int = 1
    vectors: Vectors = ()
    expert_vectors: Vectors = ()
    frequencies: tuple[float, ...] = field(default=(), compare=False)
    block: Literal["routed_experts"] = "routed_experts"

    def __post_init__(self) -> None:
        """Reject impossible dimensions (ModelError)."""
        self.check_sizes("hidden_size", "num_experts", "experts_per_token", "intermediate_size", "streams")
        self.check_sizes("shared_intermediate_size", "latent_size", "zero_experts", at_least=0)
        count, frequencies = self.num_experts, self.frequencies
        self.require(self.experts_per_token <= count, "experts_per_token", f"must be at most num_experts {count}")
        shares = not frequencies or (len(frequencies) == count and 0 <= min(frequencies) <= max(frequencies) <= 1)
        self.require(shares, "frequencies", f"must be shares between 0 and 1 of the {count} experts, or none")
        check_vectors("vectors", self.vectors)
        check_vectors("expert_vectors", self.expert_vectors)

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The norm, the router, the shared experts' matrices, and those of one routed expert."""
        hidden, shared, latent = self.hidden_size, self.shared_intermediate_size, self.latent_size
        down, up = (
            TensorSpec("latent_down", (latent, hidden), Unit.FFN),
            TensorSpec("latent_up", (hidden, latent), Unit.FFN),
        )
        return (
            TensorSpec("ffn_norm", (hidden,), Unit.FFN),
            TensorSpec("router", (self.num_experts + self.zero_experts, hidden), Unit.FFN),
            *((down, up) if latent else ()),
            *(matrices("shared_", hidden, shared, Unit.FFN, gated=self.gated) if shared else ()),
            *stream_tensors("ffn", self.streams, hidden, Unit.FFN),
            *vector_tensors(self.vectors, Unit.FFN),  # after matrices, which are read fastest where they are aligned
            *matrices("", self.expert_hidden_size, self.intermediate_size, Unit.EXPERT, gated=self.gated),
            *vector_tensors(self.expert_vectors, Unit.EXPERT),
        )

    @property
    def expert_hidden_size(self) -> int:
        """Elements that an expert is given of a token, and returns."""
        return self.latent_size or self.hidden_size

    @cached_property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert."""
        return sum(tensor.parameters for tensor in self.tensors if tensor.unit is Unit.EXPERT)

    @property
    def inner_size(self) -> int:
        """The width of an expert or of all shared ones."""
        return max(self.intermediate_size, self.shared_intermediate_size)

    @property
    def pending_elements(self) -> int:
        """The experts' sum and that of what else is added, if something is done to them."""
        return 2 * self.hidden_size * any(name in AFTER_EXPERTS for name, _ in self.vectors)

    @property
    def host_tensors(self) -> tuple[str, ...]:
        """What is done to the sum: where the CPU computes experts, it is complete there."""
        return AFTER_EXPERTS

    def routing_bytes(self, compute: Format) -> int:
        """Logits and probabilities of all experts, and the chosen ones with their sorted form."""
        choices = self.num_experts + self.zero_experts
        scores = compute.bytes_of(choices) + 8 * choices
        return scores + (ROUTING_BYTES + 36) * self.experts_per_token

    def hit(self, num_tokens: Number) -> Number:
        """Expected number of distinct experts that `num_tokens` reach.

        Tokens are routed independently, uniformly or with the measured frequencies.
        """
        if not self.frequencies:
            miss = power(1 - self.computed_per_token / self.num_experts, num_tokens)
            return self.num_experts * (1 - miss)
        if isinstance(num_tokens, (int, float)):
            return sum(1 - (1 - share) ** num_tokens for share in self.frequencies)
        import numpy as np

        distinct, of_each = np.unique(num_tokens, return_inverse=True)
        misses = np.power.outer(1 - np.array(self.frequencies), distinct)
        return (self.num_experts - misses.sum(0))[of_each].reshape(np.shape(num_tokens))

    def dense(self, formats: Formats, tokens: Number) -> Operator:
        """The router, the shared experts, and the projections down and up around the routed ones."""
        router = Operator((linear(tokens, self.hidden_size, self.num_experts + self.zero_experts, formats),))
        router += mix_streams(self.streams, self.hidden_size, formats, tokens)
        if self.latent_size:
            router += Operator(2 * (linear(tokens, self.hidden_size, self.latent_size, formats),), 2)
        if not self.shared_intermediate_size:
            return router
        return router + through(tokens, self.hidden_size, self.shared_intermediate_size, formats, gated=self.gated)

    @property
    def computed_per_token(self) -> float:
        """Of the experts that a token goes to, those that compute anything, on average."""
        if not self.zero_experts:
            return self.experts_per_token
        return self.experts_per_token * self.num_experts / (self.num_experts + self.zero_experts)

    def run(self, formats: Formats, tokens: Number, num_experts: Number) -> Operator:
        """What falls on `num_experts` of the experts."""
        share = num_experts / self.num_experts
        hit = share * self.hit(tokens)
        routed = share * self.computed_per_token * tokens
        kernel = weighted(
            2 * self.expert_parameters * routed,
            self.expert_parameters * hit,
            formats.compute.bytes_of(2 * self.expert_hidden_size + 3 * self.intermediate_size, routed),
            maximum(routed / maximum(hit, 1e-9), 1.0),
            formats,
        )
        # As a mean over layers, less than one expert means that some layers have none.
        any_here = minimum(num_experts, 1)
        one_by_one = any_here * ROUTING_LAUNCHES + hit * LAUNCHES_PER_EXPERT
        grouped = any_here * GROUPED_EXPERTS_LAUNCHES
        saved = one_by_one - grouped if formats.weights.name == formats.compute.name == GROUPED_DTYPE else 0
        return Operator((kernel,), any_here, unfused_launches=one_by_one - any_here, saved_by_grouping=saved)

    def obstacle_to(self, ranks: int) -> str:
        """The width of an expert is divided, and what shared ones have together."""
        inner, shared = self.intermediate_size, self.shared_intermediate_size
        if 0 < shared < ranks:
            return f"the shared experts' {shared} inner units cannot be divided by {ranks}"
        return f"an expert's {inner} inner units cannot be divided by {ranks}" if inner % ranks else ""

    def shares(self, ranks: int, whole: int) -> dict[str, int]:
        """A part of the width of every expert, and of the shared ones."""
        inner, shared = self.intermediate_size, self.shared_intermediate_size
        return {
            "intermediate_size": share(inner, ranks, whole),
            "shared_intermediate_size": share(shared, ranks, whole),
        }

    @property
    def sections(self) -> Mapping[str, Sections]:
        """Biases of what is between the matrices of shared and of routed experts."""
        inner, shared = Section(self.intermediate_size), Section(self.shared_intermediate_size)
        of_shared = {"shared_w1_bias": (shared,), "shared_w13_bias": (shared, shared)}
        return {**of_shared, "w1_bias": (inner,), "w13_bias": (inner, inner)}

    def of_rank(self, ranks: int, whole: int = 1) -> Self:
        """The same of an expert's own vectors."""
        narrow = super().of_rank(ranks, whole)
        return replace(narrow, expert_vectors=self.vectors_of_rank(self.expert_vectors, narrow))
