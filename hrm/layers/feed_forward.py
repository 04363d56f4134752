"""Feed-forward blocks: one dense FFN, or routed experts with shared ones."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
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
from hrm.layers.choices import Choices
from hrm.layers.hyper_connection import mix_streams, stream_tensors
from hrm.layers.work import Operator, gemms, linear, weighted
from hrm.numeric import Number, maximum, minimum

# Vectors of what is done to the sum of all experts: norms of it, and of what shared ones add, and a scale.
AFTER_EXPERTS: Final = ("routed_output_norm", "ffn_output_norm", "layer_scale")


class ExpertDivision(StrEnum):
    """How GPUs in tensor parallel divide routed experts: each by its inner size, or into as many whole ones each."""

    INNER = "inner"
    WHOLE = "whole"

    @property
    def words(self) -> str:
        """The same, for people."""
        return "experts divided by their inner size" if self is ExpertDivision.INNER else "whole experts in each rank"


def matrices(
    name: str, hidden: int, inner: int, unit: Unit, *, gated: bool = True, divided: bool = True
) -> tuple[TensorSpec, ...]:
    """The two matrices of an FFN; the first one has the gate above what it scales.

    GPUs in tensor parallel have a part of its inner size each, if it is `divided`.
    """
    parts = (inner,) * (1 + gated)
    return (
        TensorSpec(f"{name}w13" if gated else f"{name}w1", (sum(parts), hidden), unit, 0 if divided else None, parts),
        TensorSpec(f"{name}w2", (hidden, inner), unit, 1 if divided else None),
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

    With `expert_ranks` it is what one of so many GPUs has whose experts are not divided: `num_experts` of
    them, one after the other, and the router of all that these GPUs have together.

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
    expert_ranks: int = 1
    vectors: Vectors = ()
    expert_vectors: Vectors = ()
    frequencies: tuple[float, ...] = field(default=(), compare=False)
    block: Literal["routed_experts"] = "routed_experts"

    def __post_init__(self) -> None:
        """Reject impossible dimensions (ModelError)."""
        self.check_sizes("hidden_size", "num_experts", "experts_per_token", "intermediate_size", "streams")
        self.check_sizes("expert_ranks")
        self.check_sizes("shared_intermediate_size", "latent_size", "zero_experts", at_least=0)
        count, frequencies = self.all_experts, self.frequencies
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
            TensorSpec("router", (self.router_size, hidden), Unit.FFN),
            *((down, up) if latent else ()),
            *(matrices("shared_", hidden, shared, Unit.FFN, gated=self.gated) if shared else ()),
            *stream_tensors("ffn", self.streams, hidden, Unit.FFN),
            *vector_tensors(self.vectors, Unit.FFN),  # after matrices, which are read fastest where they are aligned
            *matrices(
                "",
                self.expert_hidden_size,
                self.intermediate_size,
                Unit.EXPERT,
                gated=self.gated,
                divided=self.expert_ranks == 1,
            ),
            *vector_tensors(self.expert_vectors, Unit.EXPERT),
        )

    @property
    def all_experts(self) -> int:
        """The experts of all GPUs together: those that tokens choose from, but for zero experts."""
        return self.num_experts * self.expert_ranks

    @property
    def router_size(self) -> int:
        """How many a token chooses from."""
        return self.all_experts + self.zero_experts

    def experts_of(self, rank: int) -> range:
        """Which of all experts one of several GPUs has, which of each may be a part."""
        first = rank * self.num_experts if self.expert_ranks > 1 else 0
        return range(first, first + self.num_experts)

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
        scores = compute.bytes_of(self.router_size) + 8 * self.router_size
        return scores + (ROUTING_BYTES + 36) * self.experts_per_token

    @cached_property
    def choices(self) -> Choices:
        """How tokens choose among all experts."""
        return Choices(
            experts=self.all_experts,
            per_token=self.experts_per_token,
            idle=self.zero_experts,
            ranks=self.expert_ranks,
            frequencies=self.frequencies,
        )

    def hit(self, num_tokens: Number, num_experts: Number | None = None) -> Number:
        """Expected number of distinct ones of so many experts, else of all here, that `num_tokens` reach.

        Of several GPUs that have whole experts it is that of the one where it is greatest.
        """
        return self.choices.reached(num_tokens, self.num_experts if num_experts is None else num_experts)

    def dense(self, formats: Formats, tokens: Number) -> Operator:
        """The router, the shared experts, and the projections down and up around the routed ones."""
        router = Operator((linear(tokens, self.hidden_size, self.router_size, formats),))
        router += mix_streams(self.streams, self.hidden_size, formats, tokens)
        if self.latent_size:
            router += Operator(2 * (linear(tokens, self.hidden_size, self.latent_size, formats),), 2)
        if not self.shared_intermediate_size:
            return router
        return router + through(tokens, self.hidden_size, self.shared_intermediate_size, formats, gated=self.gated)

    @property
    def computed_per_token(self) -> float:
        """Of the experts that a token goes to, those here that compute anything, on average."""
        here = self.choices.computed_per_token
        return here if self.expert_ranks == 1 else here / self.expert_ranks

    def run(self, formats: Formats, tokens: Number, num_experts: Number) -> Operator:
        """What falls on `num_experts` of the experts; of several GPUs that have whole ones, where it is most."""
        hit = self.hit(tokens, num_experts)
        routed = self.choices.fallen_on(tokens, num_experts)
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
        """The width of an expert is divided, unless GPUs have whole ones, and what shared ones have together."""
        inner, shared = self.intermediate_size, self.shared_intermediate_size
        if 0 < shared < ranks:
            return f"the shared experts' {shared} inner units cannot be divided by {ranks}"
        if self.expert_ranks == 1 and inner % ranks:
            return f"an expert's {inner} inner units cannot be divided by {ranks}"
        return ""

    def shares(self, ranks: int, whole: int) -> dict[str, int]:
        """A part of the width of every expert, unless GPUs have whole ones, and of the shared ones."""
        inner, shared = self.intermediate_size, self.shared_intermediate_size
        return {
            "intermediate_size": share(inner, ranks, whole) if self.expert_ranks == 1 else inner,
            "shared_intermediate_size": share(shared, ranks, whole),
        }

    @property
    def sections(self) -> Mapping[str, Sections]:
        """Biases of what is between the matrices of shared experts, and of routed ones that are divided."""
        inner, shared = Section(self.intermediate_size), Section(self.shared_intermediate_size)
        of_shared = {"shared_w1_bias": (shared,), "shared_w13_bias": (shared, shared)}
        if self.expert_ranks > 1:
            return of_shared
        return {**of_shared, "w1_bias": (inner,), "w13_bias": (inner, inner)}

    def with_experts_shared_out(self, ranks: int) -> Self:
        """What one of so many GPUs has of it that each have as many whole experts, before all else is divided."""
        return replace(self, num_experts=self.num_experts // ranks, expert_ranks=ranks)

    def of_rank(self, ranks: int, whole: int = 1) -> Self:
        """The same of an expert's own vectors."""
        narrow = super().of_rank(ranks, whole)
        return replace(narrow, expert_vectors=self.vectors_of_rank(self.expert_vectors, narrow))
