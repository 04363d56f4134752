"""A mixture-of-experts transformer by its dimensions, from which parameters and bytes follow."""

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

from hrm.errors import ModelError
from hrm.formats import Format
from hrm.model_spec.latent import LatentAttention
from hrm.numeric import Number, minimum

# Beyond these a number is a mistake; below, 64-bit integers count any plan's bytes.
MOST_LAYERS: Final = 10**4
LARGEST_SIZE: Final = 10**8
LARGEST_MODEL: Final = 10**15

_SIZES: Final = (
    "num_layers",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "num_experts",
    "experts_per_token",
    "vocab_size",
    "matrices_per_expert",
)
_OPTIONAL_SIZES: Final = (
    "shared_intermediate_size",
    "num_dense_layers",
    "dense_intermediate_size",
    "other_layer_parameters",
    "other_router_parameters",
    "other_expert_parameters",
    "other_head_parameters",
)
_LATENT_SIZES: Final = ("kv_rank", "rope_head_dim", "nope_head_dim", "value_head_dim")


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What tells one layer's cost from another's.

    Without experts a layer has one dense FFN; `window` is how many tokens its attention reaches
    back at most, 0 for all.
    """

    has_experts: bool = True
    window: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Dimensions of a decoder whose layers are attention followed by routed experts.

    The first `num_dense_layers` have one FFN of `dense_intermediate_size` instead. Shared experts,
    `shared_intermediate_size` wide together, compute every token in the layers with experts.
    `attention_windows` limits each layer's attention to so many tokens (sliding, or a chunk), 0 for
    no limit; it is empty if no layer is limited. With latent attention, `head_dim` is that of a
    query, nope and rope part together, and every head has keys of its own.

    `matrices_per_expert` is 3 for the gated FFN (w1, w2, w3) that all supported families use;
    shared and dense FFNs have as many. The `other_…` parameters are the small vectors: of a layer
    outside its FFN (biases, norms of queries and keys, sinks); beside a router's matrix (biases,
    the shared experts' gate); of one expert; of the LM head and final norm (biases).

    `published_dtype` says how a quantised checkpoint is stored and changes no size here: plans are
    made in the dtype that they choose. `expert_frequencies` are the shares of tokens that go to the
    experts, from the most favoured to the least, as measured; empty for uniform routing.
    """

    name: str
    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_experts: int
    experts_per_token: int
    vocab_size: int
    tied_embeddings: bool = False
    matrices_per_expert: int = 3
    shared_intermediate_size: int = 0
    num_dense_layers: int = 0
    dense_intermediate_size: int = 0
    latent_attention: LatentAttention | None = None
    attention_windows: tuple[int, ...] = ()
    other_layer_parameters: int = 0
    other_router_parameters: int = 0
    other_expert_parameters: int = 0
    other_head_parameters: int = 0
    published_dtype: str = field(default="", compare=False)
    expert_frequencies: tuple[float, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        """Reject impossible dimensions (ModelError)."""
        for name in _SIZES:
            self._check_integer(name, getattr(self, name), at_least=1)
        for name in _OPTIONAL_SIZES:
            self._check_integer(name, getattr(self, name), at_least=0)
        self._require(
            self.num_heads % self.num_kv_heads == 0,
            "num_kv_heads",
            self.num_kv_heads,
            f"must divide num_heads {self.num_heads}",
        )
        self._require(
            self.experts_per_token <= self.num_experts,
            "experts_per_token",
            self.experts_per_token,
            f"must be at most num_experts {self.num_experts}",
        )
        self._require(
            self.num_dense_layers < self.num_layers,
            "num_dense_layers",
            self.num_dense_layers,
            f"must be below num_layers {self.num_layers}: some layer must have experts",
        )
        self._require(
            self.dense_intermediate_size > 0 or self.num_dense_layers == 0,
            "dense_intermediate_size",
            self.dense_intermediate_size,
            f"must be positive where there are dense layers, {self.num_dense_layers} here",
        )
        if self.latent_attention is not None:
            self._check_latent(self.latent_attention)
        self._check_windows()
        frequencies = self.expert_frequencies
        self._require(
            not frequencies
            or (
                len(frequencies) == self.num_experts
                and 0 <= min(frequencies) <= max(frequencies)
                and max(frequencies) <= 1
            ),
            "expert_frequencies",
            frequencies,
            f"must be shares between 0 and 1 of the {self.num_experts} experts, or none",
        )
        self._require(
            self.parameters <= LARGEST_MODEL, "parameters", self.parameters, f"must be at most {LARGEST_MODEL:,}"
        )

    def _require(self, holds: bool, name: str, value: object, rule: str) -> None:  # noqa: FBT001
        if not holds:
            raise ModelError(f"{self.name}: {name}", value, rule, "check the config")

    def _check_integer(self, name: str, value: Any, *, at_least: int) -> None:
        rule = "must be a positive integer" if at_least else "must be an integer of at least 0"
        at_most = MOST_LAYERS if name == "num_layers" else LARGEST_SIZE
        if name.startswith("other_"):  # counts of parameters, not sizes
            at_most = LARGEST_MODEL
        self._require(type(value) is int and at_least <= value <= at_most, name, value, f"{rule}, at most {at_most:,}")

    def _check_latent(self, latent: LatentAttention) -> None:
        for name in _LATENT_SIZES:
            self._check_integer(f"latent_attention.{name}", getattr(latent, name), at_least=1)
        self._check_integer("latent_attention.query_rank", latent.query_rank, at_least=0)
        self._require(
            self.head_dim == latent.query_head_dim,
            "head_dim",
            self.head_dim,
            f"must be nope_head_dim + rope_head_dim of latent attention, {latent.query_head_dim}",
        )
        self._require(
            self.num_kv_heads == self.num_heads,
            "num_kv_heads",
            self.num_kv_heads,
            f"must be num_heads {self.num_heads} with latent attention",
        )

    def _check_windows(self) -> None:
        windows = self.attention_windows
        self._require(
            type(windows) is tuple and len(windows) in {0, self.num_layers},
            "attention_windows",
            f"<{type(windows).__name__} of {len(windows)}>",
            f"must be a tuple with one window for each of the {self.num_layers} layers, or empty",
        )
        for layer, window in enumerate(windows):
            self._check_integer(f"attention_windows[{layer}]", window, at_least=0)

    # -- attention ----------------------------------------------------------------------------

    @property
    def query_size(self) -> int:
        """Elements of one token's queries: heads × head_dim."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of one token's keys (or values) in one layer; not for latent attention.

        There a cached token is neither key nor value; see `kv_elements`.
        """
        assert self.latent_attention is None, "latent attention caches no keys and values"
        return self.num_kv_heads * self.head_dim

    @property
    def kv_elements(self) -> int:
        """Elements that one token adds to one layer's cache."""
        latent = self.latent_attention
        return 2 * self.kv_size if latent is None else latent.cached_elements

    @property
    def attention_output_size(self) -> int:
        """Elements of one token's attention output, before the output projection."""
        if self.latent_attention is None:
            return self.query_size
        return self.num_heads * self.latent_attention.value_head_dim

    @property
    def attention_flops_per_context_token(self) -> int:
        """FLOPs of one new token's decode attention over one cached token in one layer.

        Latent attention is counted in its absorbed form.
        """
        latent = self.latent_attention
        if latent is None:
            return 4 * self.query_size
        return latent.absorbed_flops_per_context_token(self.num_heads)

    @property
    def qkv_parameters(self) -> int:
        """Parameters of one layer's query, key and value projections.

        With latent attention, of those to queries and to what is cached, with the norms between.
        """
        latent = self.latent_attention
        if latent is None:
            return self.hidden_size * (self.query_size + 2 * self.kv_size)
        return latent.projection_parameters(self.hidden_size, self.num_heads)

    @property
    def latent_up_parameters(self) -> int:
        """Parameters that project a layer's cached vectors up to keys and values; else 0.

        In the absorbed form they are applied to the new tokens, never to the cache.
        """
        latent = self.latent_attention
        return 0 if latent is None else latent.up_parameters(self.num_heads)

    @property
    def output_parameters(self) -> int:
        """Parameters of one layer's attention output projection."""
        return self.attention_output_size * self.hidden_size

    # -- feed-forward networks ----------------------------------------------------------------

    @property
    def router_parameters(self) -> int:
        """Parameters of one layer's router, with what lies beside its matrix."""
        return self.hidden_size * self.num_experts + self.other_router_parameters

    @property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert."""
        return self._ffn_parameters(self.intermediate_size) + self.other_expert_parameters

    @property
    def shared_parameters(self) -> int:
        """Parameters of one layer's shared experts together."""
        return self._ffn_parameters(self.shared_intermediate_size)

    @property
    def dense_ffn_parameters(self) -> int:
        """Parameters of the one FFN of a layer without experts."""
        return self._ffn_parameters(self.dense_intermediate_size)

    def _ffn_parameters(self, width: int) -> int:
        return self.matrices_per_expert * self.hidden_size * width

    def experts_hit(self, num_tokens: Number) -> Number:
        """Expected number of distinct experts that `num_tokens` reach.

        Tokens are routed independently, uniformly or with the measured frequencies.
        """
        if not self.expert_frequencies:
            miss = (1 - self.experts_per_token / self.num_experts) ** num_tokens
            return self.num_experts * (1 - miss)
        if isinstance(num_tokens, (int, float)):
            return sum(1 - (1 - share) ** num_tokens for share in self.expert_frequencies)
        import numpy as np

        distinct, of_each = np.unique(num_tokens, return_inverse=True)
        misses = np.power.outer(1 - np.array(self.expert_frequencies), distinct)
        return (self.num_experts - misses.sum(0))[of_each].reshape(np.shape(num_tokens))

    def kv_copies(self, ranks: int) -> int:
        """How many of `ranks` GPUs in tensor parallel hold the same element of the KV cache.

        Heads are divided; where they are fewer than GPUs, or compressed into one, they are
        repeated.
        """
        heads = self.num_kv_heads if self.latent_attention is None else 1
        return max(1, ranks // heads)

    # -- layers -------------------------------------------------------------------------------

    @property
    def num_expert_layers(self) -> int:
        """Layers with routed experts."""
        return self.num_layers - self.num_dense_layers

    def layer_kind(self, layer: int) -> LayerKind:
        """What kind of layer the one with that index is."""
        window = self.attention_windows[layer] if self.attention_windows else 0
        return LayerKind(layer >= self.num_dense_layers, window)

    def layer_kinds(self) -> dict[LayerKind, int]:
        """How many layers there are of each kind, in the order in which they first come."""
        return dict(_layer_kinds(self.num_layers, self.num_dense_layers, self.attention_windows))

    @property
    def widest_kind(self) -> LayerKind:
        """The kind of layer that attends to the most tokens."""
        return max(self.layer_kinds(), key=lambda kind: kind.window or math.inf)

    def num_experts_of(self, kind: LayerKind) -> int:
        """Routed experts of a layer of that kind."""
        return self.num_experts if kind.has_experts else 0

    def context_in(self, kind: LayerKind, context: Number) -> Number:
        """Tokens that attention reaches in a layer of that kind, of `context` in all.

        Attention in chunks reaches at most so many: half of them on average in a long context.
        """
        return minimum(context, kind.window) if kind.window else context

    @property
    def dense_parameters(self) -> int:
        """Parameters of a layer with experts, outside those that are routed."""
        return (
            self.qkv_parameters
            + self.latent_up_parameters
            + self.output_parameters
            + self.router_parameters
            + self.shared_parameters
            + 2 * self.hidden_size  # two norms
            + self.other_layer_parameters
        )

    def dense_parameters_of(self, kind: LayerKind) -> int:
        """Parameters outside routed experts of a layer of that kind."""
        if kind.has_experts:
            return self.dense_parameters
        replaced = self.router_parameters + self.shared_parameters
        return self.dense_parameters - replaced + self.dense_ffn_parameters

    def layer_bytes_of(self, kind: LayerKind, weights: Format) -> int:
        """Weight bytes of a layer of that kind."""
        experts = self.num_experts_of(kind) * self.expert_parameters
        return weights.bytes_of(self.dense_parameters_of(kind) + experts)

    def layer_bytes(self, weights: Format) -> int:
        """Weight bytes of one layer with experts."""
        return self.layer_bytes_of(LayerKind(), weights)

    def total_layer_bytes(self, weights: Format) -> int:
        """Weight bytes of all layers together."""
        dense = self.num_dense_layers * self.layer_bytes_of(LayerKind(has_experts=False), weights)
        return dense + self.num_expert_layers * self.layer_bytes(weights)

    def kv_bytes_per_token_layer(self, cache: Format) -> int:
        """KV cache bytes of one token in one layer."""
        return cache.bytes_of(self.kv_elements)

    def kv_bytes_per_token(self, cache: Format) -> int:
        """KV cache bytes of one token in all layers, those included whose window it may leave."""
        return self.num_layers * self.kv_bytes_per_token_layer(cache)

    # -- the whole ----------------------------------------------------------------------------

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the token embedding."""
        return self.vocab_size * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """Parameters of the LM head with the final norm, whether or not tied to the embedding."""
        return self.embedding_parameters + self.hidden_size + self.other_head_parameters

    @property
    def parameters(self) -> int:
        """All parameters; tied embeddings count once."""
        dense = self.num_dense_layers * self.dense_parameters_of(LayerKind(has_experts=False))
        experts = self.dense_parameters + self.num_experts * self.expert_parameters
        embedding = 0 if self.tied_embeddings else self.embedding_parameters
        return dense + self.num_expert_layers * experts + embedding + self.head_parameters

    @property
    def active_parameters(self) -> int:
        """Parameters one token touches: those of its routed experts and all that is dense."""
        idle = (self.num_experts - self.experts_per_token) * self.expert_parameters
        return self.parameters - self.num_expert_layers * idle


@cache  # asked for by every cost
def _layer_kinds(
    num_layers: int, num_dense_layers: int, attention_windows: tuple[int, ...]
) -> tuple[tuple[LayerKind, int], ...]:
    windows, dense = attention_windows or (0,) * num_layers, num_dense_layers
    return tuple(
        (LayerKind(has_experts, window), count)
        for has_experts, part in ((False, windows[:dense]), (True, windows[dense:]))
        for window, count in Counter(part).items()
    )
