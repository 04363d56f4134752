"""A mixture-of-experts transformer by its layers, from which parameters and bytes follow."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Final

from hrm.contract.temporaries import DEQUANTISED_IN_ORDER
from hrm.errors import ModelError
from hrm.formats import Format, Formats
from hrm.layers import LARGEST_MODEL, GroupedQueryAttention, Layer, RoutedExperts, TensorSpec, Unit, check_size
from hrm.layers.base import HashedOnce, Vectors, check_vectors, share
from hrm.layers.feed_forward import ExpertDivision
from hrm.numeric import Number

MOST_LAYERS: Final = 10**4
HEAD_BIAS: Final = "lm_head_bias"


@dataclass(frozen=True, kw_only=True)
class ModelSpec(HashedOnce):
    """A decoder: its layers in order, between a token embedding and an LM head with a final norm.

    Layers are of several `kinds`, in the order in which they first come, and `order` says which one
    each layer is; `of_layers` makes both of the layers themselves. Plans know routed experts of one
    class: those of all layers that have any are alike. `head_vectors` lie beside the final norm and
    the LM head: `final_norm_bias` and `lm_head_bias`, or by another name what only plans count.

    `published_dtype` says how a quantised checkpoint is published, in its own words, and changes no size: how
    matrices are packed here, their layers say. Where a model is a part of another, a workspace has room
    for FFNs that are `least_inner_size` wide, though no layer of the part has one, and there is room
    for the numbers of `least_reaches` ways to fill the rows of caches. It is what one of so many
    `ranks` has in tensor parallel; their vocabularies, one after the other, are the model's. Of a
    pipeline's stages only the first has the embedding, and only the last what comes after the layers.
    """

    name: str
    family: str
    kinds: tuple[Layer, ...]
    order: tuple[int, ...]
    vocab_size: int
    tied_embeddings: bool = False
    head_vectors: Vectors = ()
    least_inner_size: int = 0
    least_reaches: int = 0
    ranks: int = 1
    has_embedding: bool = True
    has_head: bool = True
    published_dtype: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        """Reject impossible dimensions (ModelError)."""
        self._require(
            0 < len(self.order) <= MOST_LAYERS,
            "order",
            f"<{len(self.order)} layers>",
            f"must be at least one and at most {MOST_LAYERS:,}",
        )
        distinct = len(set(self.kinds)) == len(self.kinds) and list(dict.fromkeys(self.order)) == [
            *range(len(self.kinds))
        ]
        self._require(
            distinct, "order", self.order, f"must name each of {len(self.kinds)} different kinds, in order from 0 on"
        )
        widths = {kind.hidden_size for kind in self.kinds}
        self._require(len(widths) == 1, "hidden_size", sorted(widths), "must be the same in all layers")
        try:
            check_size("vocab_size", self.vocab_size)
            check_vectors("head_vectors", self.head_vectors)
            check_size("least_inner_size", self.least_inner_size, at_least=0)
            check_size("least_reaches", self.least_reaches, at_least=0)
            check_size("ranks", self.ranks)
        except ModelError as error:
            raise ModelError(f"{self.name}: {error.where}", error.value, error.rule, error.remedy) from error
        self._require(self.num_expert_layers > 0, "kinds", "<none with experts>", "must have routed experts in some")
        self._require(
            self.parameters <= LARGEST_MODEL, "parameters", self.parameters, f"must be at most {LARGEST_MODEL:,}"
        )

    __hash__ = HashedOnce.__hash__

    def _require(self, holds: bool, name: str, value: object, rule: str) -> None:  # noqa: FBT001
        if not holds:
            raise ModelError(f"{self.name}: {name}", value, rule, "check the config")

    # -- layers -------------------------------------------------------------------------------

    @staticmethod
    def of_layers(layers: Iterable[Layer], *, name: str, family: str, vocab_size: int, **others: Any) -> "ModelSpec":
        """The model with these layers."""
        layers = tuple(layers)
        place: dict[Layer, int] = {}
        order = tuple(place.setdefault(layer, len(place)) for layer in layers)
        return ModelSpec(name=name, family=family, kinds=tuple(place), order=order, vocab_size=vocab_size, **others)

    def with_layers(self, layers: Iterable[Layer], **changes: Any) -> "ModelSpec":
        """The same with other layers, and other changes."""
        others = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in {"kinds", "order"}}
        return ModelSpec.of_layers(layers, **{**others, **changes})

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """All layers, in order."""
        return tuple(self.kinds[kind] for kind in self.order)

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return len(self.order)

    @property
    def hidden_size(self) -> int:
        """Elements of a token's hidden state."""
        return self.kinds[0].hidden_size

    @cached_property
    def residual_size(self) -> int:
        """Elements of a token's hidden state between layers, in all its streams."""
        return self.hidden_size * max(kind.mixer.streams for kind in self.kinds)

    @cached_property
    def pending_elements(self) -> int:
        """Elements of a token that wait for the sum of its experts, in any layer."""
        return max((block.pending_elements for kind in self.kinds for block in kind.ffn), default=0)

    @cached_property
    def num_expert_layers(self) -> int:
        """Layers with routed experts."""
        return sum(layer.has_experts for layer in self.layers)

    def layer_kind(self, layer: int) -> Layer:
        """What kind of layer the one with that index is."""
        return self.layers[layer]

    @cached_property
    def _layer_kinds(self) -> dict[Layer, int]:
        counts = Counter(self.order)
        return {kind: counts[place] for place, kind in enumerate(self.kinds)}

    def layer_kinds(self) -> dict[Layer, int]:
        """How many layers there are of each kind, in the order in which they first come."""
        return self._layer_kinds

    def alike(self, *, by_window: bool, by_ffn: bool) -> dict[Layer, int]:
        """How many layers there are of each kind, where windows or FFNs may make no difference.

        Of those that are then alike, one stands for all.
        """
        return self._alike[by_window, by_ffn]

    @cached_property
    def _alike(self) -> dict[tuple[bool, bool], dict[Layer, int]]:
        return {
            (by_window, by_ffn): dict(Counter(self._stand_in(layer, by_window, by_ffn) for layer in self.layers))
            for by_window in (False, True)
            for by_ffn in (False, True)
        }

    def _stand_in(self, layer: Layer, by_window: bool, by_ffn: bool) -> Layer:  # noqa: FBT001
        layer = layer if by_window else layer.without_window
        return layer if by_ffn else layer.with_ffn(self.kinds[0])

    def of_rank(self, ranks: int, division: ExpertDivision = ExpertDivision.INNER) -> "ModelSpec":
        """What one of so many GPUs in tensor parallel has of the model: the largest share, where they differ."""
        vocab_size = share(self.vocab_size, ranks)
        return self.with_layers(
            (layer.of_rank(ranks, division) for layer in self.layers),
            name=f"{self.name}, one of {ranks} ranks",
            vocab_size=vocab_size,
            head_vectors=tuple((name, vocab_size if name == HEAD_BIAS else size) for name, size in self.head_vectors),
            ranks=ranks,
        )

    @cached_property
    def widest_kind(self) -> Layer:
        """The kind of layer that attends to the most tokens, and caches the most of them."""
        return max(self.layer_kinds(), key=lambda kind: (kind.mixer.cached_elements > 0, not kind.window, kind.window))

    @cached_property
    def num_reaches(self) -> int:
        """In how many ways the rows of caches are filled: each has numbers of its own."""
        return max(self.least_reaches, len({kind.mixer.kept_rows for kind in self.layer_kinds()}))

    @cached_property
    def largest_packed(self) -> int:
        """Weights of the largest packed matrix, more if its columns have an order; 0 if there is none."""
        packed = ((each.packed, each.parameters) for kind in self.layer_kinds() for each in kind.tensors)
        sizes = (size * (DEQUANTISED_IN_ORDER if form.ordered else 1) for form, size in packed if form is not None)
        return max(sizes, default=0)

    @cached_property
    def packing(self) -> str:
        """Which matrices are packed, and how, in words: `experts in mxfp4`; empty if none are."""
        tensors = {tensor for kind in self.layer_kinds() for tensor in kind.tensors}
        formats = {
            routed: sorted({tensor.packed.name for tensor in tensors if tensor.packed and _is_routed(tensor) == routed})
            for routed in (True, False)
        }
        if formats[True] == formats[False]:
            return f"matrices in {' and '.join(formats[True])}" if formats[True] else ""
        plain = sorted(t.name for t in tensors if _is_routed(t) and t.packed is None and len(t.shape) > 1)
        but = f" (but {' and '.join(plain)})" if plain else ""
        named = (f"experts{but}", formats[True]), ("other matrices", formats[False])
        return ", ".join(f"{what} in {' and '.join(forms)}" for what, forms in named if forms)

    @cached_property
    def without_packing(self) -> "ModelSpec":
        """The same with no matrix packed."""
        return self.with_layers(replace(layer, packed=()) for layer in self.layers)

    @cached_property
    def total_parameters(self) -> int:
        """Parameters of all layers together."""
        return sum(count * kind.parameters for kind, count in self.layer_kinds().items())

    def dense_bytes(self, weights: Format) -> int:
        """Bytes outside routed experts of a layer with experts; the most, if they differ."""
        return max(kind.dense_bytes(weights) for kind in self.layer_kinds() if kind.has_experts)

    def plain_bytes(self, weights: Format) -> int:
        """Bytes of a layer without experts; the most, if they differ, and 0 if there is none."""
        return max((kind.dense_bytes(weights) for kind in self.layer_kinds() if not kind.has_experts), default=0)

    def expert_bytes(self, weights: Format) -> int:
        """Bytes of one routed expert."""
        return self.expert_kind.expert_bytes(weights)

    def layer_bytes(self, weights: Format) -> int:
        """Weight bytes of one layer with experts; the most, if they differ."""
        return self.dense_bytes(weights) + self.num_experts * self.expert_bytes(weights)

    def total_layer_bytes(self, weights: Format) -> int:
        """Weight bytes of all layers together."""
        return sum(count * kind.bytes_in(weights) for kind, count in self.layer_kinds().items())

    def bytes_in(self, weights: Format) -> int:
        """Bytes of all weights; tied embeddings count once."""
        return self.total_layer_bytes(weights) + int(weights.bytes_of(self._outside_layers))

    def kv_bytes_per_token(self, formats: Formats) -> int:
        """KV cache bytes of one token in all layers, those included whose window it may leave."""
        return sum(count * kind.mixer.cached_bytes(formats) for kind, count in self.layer_kinds().items())

    # -- routed experts -----------------------------------------------------------------------

    @cached_property
    def experts(self) -> RoutedExperts:
        """The routed experts of every layer that has any.

        Raises ModelError if there are several classes of them, of which no plan can be made.
        """
        blocks = [block for kind in self.layer_kinds() for block in kind.experts]
        classes = {
            (block.num_experts, block.experts_per_token, block.intermediate_size, block.expert_parameters, packed)
            for kind in self.layer_kinds()
            for block in kind.experts
            for packed in (tuple(tensor for tensor in kind.tensors_of(block) if tensor.unit is Unit.EXPERT),)
        }
        several = max(len(kind.experts) for kind in self.layer_kinds())
        self._require(
            len(classes) == several == 1,
            "kinds",
            f"<experts of {max(len(classes), several)} classes>",
            "must have routed experts of one class, alike in all layers, for a plan to count them",
        )
        return blocks[0]

    @cached_property
    def expert_kind(self) -> Layer:
        """The first layer that has those experts."""
        return next(kind for kind in self.layer_kinds() if self.experts in kind.experts)

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer that has any."""
        return self.experts.num_experts

    @property
    def experts_per_token(self) -> int:
        """Routed experts that each token goes to."""
        return self.experts.experts_per_token

    @property
    def intermediate_size(self) -> int:
        """The width of a routed expert."""
        return self.experts.intermediate_size

    @property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert."""
        return self.experts.expert_parameters

    def experts_hit(self, num_tokens: Number) -> Number:
        """Expected number of distinct experts of a layer that `num_tokens` reach; see `RoutedExperts.hit`."""
        return self.experts.hit(num_tokens)

    def with_frequencies(self, frequencies: Sequence[float]) -> "ModelSpec":
        """The same where experts are chosen with these shares of tokens, most favoured first."""
        measured = tuple(frequencies)
        return self.with_layers(layer.with_frequencies(measured) for layer in self.layers)

    # -- what is run: models whose layers are alike ---------------------------------------------

    @cached_property
    def attention(self) -> GroupedQueryAttention:
        """The attention of all layers, where it is alike in all but its window."""
        mixers = {kind.without_window.mixer for kind in self.layer_kinds()}
        assert len(mixers) == 1, "layers differ in their attention"
        (mixer,) = mixers
        assert isinstance(mixer, GroupedQueryAttention), mixer
        return mixer

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return self.attention.num_heads

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads."""
        return self.attention.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        return self.attention.head_dim

    @property
    def query_size(self) -> int:
        """Elements of one token's queries: heads × head_dim."""
        return self.attention.query_size

    @property
    def kv_size(self) -> int:
        """Elements of one token's keys (or values) in one layer."""
        return self.attention.kv_size

    # -- the whole ----------------------------------------------------------------------------

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the token embedding."""
        return sum(tensor.parameters for tensor in self.embedding_tensors)

    @property
    def embedding_tensors(self) -> tuple[TensorSpec, ...]:
        """What comes before the layers."""
        if not self.has_embedding:
            return ()
        return (TensorSpec("embedding", (self.vocab_size, self.hidden_size), Unit.MODEL, 0),)

    @property
    def head_tensors(self) -> tuple[TensorSpec, ...]:
        """What comes after the layers; the LM head, which may be tied to the embedding, is the last."""
        if not self.has_head:
            return ()
        return (
            TensorSpec("final_norm", (self.hidden_size,), Unit.MODEL),
            *(TensorSpec(name, (size,), Unit.MODEL, _split(name)) for name, size in self.head_vectors),
            TensorSpec("lm_head", (self.vocab_size, self.hidden_size), Unit.MODEL, 0),
        )

    @cached_property
    def head_parameters(self) -> int:
        """Parameters of what comes after the layers, whether or not the LM head is tied to the embedding."""
        return sum(tensor.parameters for tensor in self.head_tensors)

    @property
    def _outside_layers(self) -> int:
        is_head_too = self.tied_embeddings and self.has_head
        return self.head_parameters + (0 if is_head_too else self.embedding_parameters)

    @property
    def parameters(self) -> int:
        """All parameters; tied embeddings count once."""
        return self.total_parameters + self._outside_layers

    @property
    def active_parameters(self) -> int:
        """Parameters one token touches: those of its routed experts and all that is dense."""
        active = sum(count * kind.active_parameters for kind, count in self.layer_kinds().items())
        return active + self._outside_layers


def _split(name: str) -> int | None:
    """Of the vectors beside the LM head, its bias is divided as its rows are."""
    return 0 if name == HEAD_BIAS else None


def _is_routed(tensor: TensorSpec) -> bool:
    return tensor.unit is Unit.EXPERT
