"""A plain decoder by its dimensions: one kind of attention, experts alike wherever there are any."""

from dataclasses import asdict, dataclass

from hrm.errors import ModelError
from hrm.layers import DenseFfn, FeedForward, GroupedQueryAttention, LatentAttention, Layer, RoutedExperts
from hrm.layers.base import LARGEST_MODEL, Vectors, check_size
from hrm.model_spec.spec import MOST_LAYERS, ModelSpec
from hrm.strict import also_read


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSizes:
    """The ranks and head sizes of latent attention; see `LatentAttention`."""

    kv_rank: int
    rope_head_dim: int
    nope_head_dim: int
    value_head_dim: int
    query_rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimensions:
    """How most models can be told, and policy files before there were layers told them.

    The first `num_dense_layers` have one FFN of `dense_intermediate_size` instead of experts.
    `attention_windows` has one window for each layer, 0 for none; it is empty if no layer has one.
    With latent attention, `head_dim` is that of a query, nope and rope part together, and every
    head has keys of its own. The `other_…` parameters are the small vectors: of a layer outside its
    FFN, beside a router's matrix, of one expert, and of the LM head and final norm.
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
    latent_attention: LatentSizes | None = None
    attention_windows: tuple[int, ...] = ()
    other_layer_parameters: int = 0
    other_router_parameters: int = 0
    other_expert_parameters: int = 0
    other_head_parameters: int = 0
    published_dtype: str = ""
    expert_frequencies: tuple[float, ...] = ()

    @property
    def spec(self) -> ModelSpec:
        """The model; ModelError naming it and the field if dimensions are impossible."""
        try:
            return self._spec()
        except ModelError as error:
            where = error.where if error.where.startswith(self.name) else f"{self.name}: {error.where}"
            raise ModelError(where, error.value, error.rule, error.remedy) from error

    def _spec(self) -> ModelSpec:
        check_size("num_layers", self.num_layers, at_most=MOST_LAYERS)
        check_size("num_dense_layers", self.num_dense_layers, at_least=0, at_most=self.num_layers)
        check_size("matrices_per_expert", self.matrices_per_expert, at_least=2, at_most=3)
        experts = RoutedExperts(
            hidden_size=self.hidden_size,
            num_experts=self.num_experts,
            experts_per_token=self.experts_per_token,
            intermediate_size=self.intermediate_size,
            shared_intermediate_size=self.shared_intermediate_size,
            gated=self.matrices_per_expert == 3,
            vectors=_others(self.other_router_parameters),
            expert_vectors=_others(self.other_expert_parameters),
            frequencies=self.expert_frequencies,
        )
        ffns: list[FeedForward] = [experts] * (self.num_layers - self.num_dense_layers)
        if self.num_dense_layers:
            dense = DenseFfn(
                hidden_size=self.hidden_size, intermediate_size=self.dense_intermediate_size, gated=experts.gated
            )
            ffns = [dense] * self.num_dense_layers + ffns
        windows = self._windows()
        return ModelSpec.of_layers(
            (Layer(mixer=self._mixer(window), ffn=(ffn,)) for window, ffn in zip(windows, ffns, strict=True)),
            name=self.name,
            family=self.family,
            vocab_size=self.vocab_size,
            tied_embeddings=self.tied_embeddings,
            head_vectors=_others(self.other_head_parameters),
            published_dtype=self.published_dtype,
        )

    def _windows(self) -> tuple[int, ...]:
        if not self.attention_windows:
            return (0,) * self.num_layers
        if len(self.attention_windows) != self.num_layers:
            raise ModelError(
                "attention_windows",
                f"<{len(self.attention_windows)} windows>",
                f"must be one for each of the {self.num_layers} layers, or none",
                "check the config",
            )
        return self.attention_windows

    def _mixer(self, window: int) -> GroupedQueryAttention | LatentAttention:
        vectors = _others(self.other_layer_parameters)
        if self.latent_attention is None:
            return GroupedQueryAttention(
                hidden_size=self.hidden_size,
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                window=window,
                vectors=vectors,
            )
        latent = LatentAttention(
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            window=window,
            vectors=vectors,
            **asdict(self.latent_attention),
        )
        latent.require(latent.head_dim == self.head_dim, "head_dim", f"must be head_dim {self.head_dim}")
        return latent


def _others(parameters: int) -> Vectors:
    check_size("other parameters", parameters, at_least=0, at_most=LARGEST_MODEL)
    return (("other", parameters),) if parameters else ()


also_read(ModelSpec, Dimensions, "num_layers", lambda told: told.spec)
