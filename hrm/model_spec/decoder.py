"""What the readers of config.json files share: the blocks of a decoder, and which layer has which."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, Final

from hrm.layers import LARGEST_SIZE, DenseFfn, GroupedQueryAttention, Layer, Mixer, RoutedExperts, Vectors
from hrm.model_spec.config_file import Keys
from hrm.model_spec.spec import MOST_LAYERS, ModelSpec

EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN: Final = (
    "num_experts_per_tok",
    "experts_per_token",
    "num_experts_per_token",
    "moe_top_k",
    "moe_topk",
    "moe_k",
    "top_k_experts",
)
SHARED_EXPERTS: Final = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
LAYER_TYPES: Final = ("full_attention", "sliding_attention", "chunked_attention", "linear_attention")
FULL, SLIDING, CHUNKED, LINEAR = LAYER_TYPES


def num_layers(keys: Keys) -> int:
    """How many layers the decoder has."""
    return keys.integer("num_hidden_layers", at_most=MOST_LAYERS)


def grouped_query(keys: Keys, *, biases: bool = False, output_bias: bool = False) -> GroupedQueryAttention:
    """Attention over all tokens, with biases of queries, keys and values, and of the output."""
    hidden_size, num_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    num_kv_heads = num_heads if keys.is_null("num_key_value_heads") else keys.integer("num_key_value_heads")
    given = keys.get("head_dim") is not None
    attention = GroupedQueryAttention(
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=keys.integer("head_dim") if given else whole_head(keys, "num_attention_heads", hidden_size),
    )
    of_qkv = biases * (attention.query_size + 2 * attention.kv_size)
    return attention.with_vectors(qkv_bias=of_qkv, output_bias=output_bias * hidden_size)


def biased_attention(keys: Keys, key: str = "attention_bias") -> GroupedQueryAttention:
    """Attention with biases of all its projections, or of none, as the key says."""
    has_biases = keys.truth(key)
    return grouped_query(keys, biases=has_biases, output_bias=has_biases)


def with_head_norms(attention: GroupedQueryAttention) -> GroupedQueryAttention:
    """The same with a norm of every query head and one of every key head."""
    return attention.with_vectors(query_norm=attention.head_dim, key_norm=attention.head_dim)


def whole_head(keys: Keys, heads: str, hidden_size: int) -> int:
    """The width of a head where all together are as wide as the hidden state."""
    count = keys.integer(heads)
    if hidden_size % count:
        raise keys.refusal(heads, f"must divide the hidden size {hidden_size} without a head_dim")
    return hidden_size // count


def routed_experts(keys: Keys, size: str, experts: str, **options: Any) -> RoutedExperts:
    """Experts; `size` and `experts` are the family's keys of an expert's width and of their number."""
    return RoutedExperts(
        hidden_size=keys.integer("hidden_size"),
        num_experts=keys.integer(experts, *(key for key in EXPERTS if key != experts)),
        experts_per_token=keys.integer(*EXPERTS_PER_TOKEN),
        intermediate_size=keys.integer(size),
        **options,
    )


def first_dense_experts(keys: Keys, *, corrected: bool) -> RoutedExperts:
    """Experts by DeepSeek's keys, and corrections of their scores."""
    shared = keys.integer(*SHARED_EXPERTS, at_least=0) * keys.integer("moe_intermediate_size")
    experts = routed_experts(keys, "moe_intermediate_size", "n_routed_experts", shared_intermediate_size=shared)
    return experts.with_vectors(score_correction=experts.num_experts) if corrected else experts


def first_dense(keys: Keys) -> range:
    """The dense layers, which are the first ones, by DeepSeek's key."""
    return range(keys.integer("first_k_dense_replace", at_least=0))


def model(
    keys: Keys,
    mixers: Mixer | Sequence[Mixer],
    experts: RoutedExperts,
    *,
    dense_layers: Collection[int] = (),
    dense_size: str = "intermediate_size",
    dense_biases: bool = False,
    head_vectors: Vectors = (),
) -> ModelSpec:
    """A model with these mixers, of every layer or of each, and experts in all but the dense layers.

    `dense_size` is the key of a dense layer's width, and `dense_biases` whether its matrices have biases.
    """
    each = [mixers] * num_layers(keys) if isinstance(mixers, Mixer) else mixers
    of_dense = ()
    if any(layer in dense_layers for layer in range(len(each))):
        dense = DenseFfn(hidden_size=experts.hidden_size, intermediate_size=keys.integer(dense_size))
        biases = {"dense_w13_bias": 2 * dense.intermediate_size, "dense_w2_bias": dense.hidden_size}
        of_dense = (dense.with_vectors(**biases) if dense_biases else dense,)
    layers = [
        Layer(mixer=mixer, ffn=of_dense if layer in dense_layers else (experts,)) for layer, mixer in enumerate(each)
    ]
    return of_layers(keys, layers, head_vectors=head_vectors)


def of_layers(keys: Keys, layers: Iterable[Layer], *, head_vectors: Vectors = ()) -> ModelSpec:
    """A model with these layers."""
    return ModelSpec.of_layers(
        layers,
        name=keys.where,  # for messages, until the spec has its own
        family="",
        vocab_size=keys.integer("vocab_size"),
        tied_embeddings=keys.truth("tie_word_embeddings"),
        head_vectors=head_vectors,
    )


def alike(keys: Keys, *names: str) -> Keys:
    """The same with one number in place of each of these lists, which have one for every layer."""
    numbers: dict[str, int] = {}
    for name in names:
        if not isinstance(keys.get(name), list):
            continue
        given = set(keys.integers(name))
        if len(given) != 1:
            raise keys.refusal(name, "must be the same in all layers, for a plan to count experts of one class")
        numbers[name] = given.pop()
    return replace(keys, values={**keys.values, **numbers})


def interleaved(keys: Keys, key: str) -> set[int]:
    """The dense layers where only every so many-th has experts."""
    every = keys.integer(key, default=1)
    return {layer for layer in range(num_layers(keys)) if (layer + 1) % every}


def layer_types(
    keys: Keys,
    default: Callable[[int], str] | None = None,
    *,
    used: bool = True,
    choices: tuple[str, ...] = LAYER_TYPES,
) -> tuple[str, ...]:
    """What each layer's attention is: its `layer_types`, or else what `default` says.

    Without either, every layer slides if there is a `sliding_window` and it is `used`.
    """
    types, count = keys.words("layer_types", choices), num_layers(keys)
    if types and len(types) != count:
        raise keys.refusal("layer_types", f"must have one of the {count} layers each")
    if SLIDING in types and not used:
        raise keys.refusal("use_sliding_window", f"must be true where layer_types has {SLIDING}")
    if types:
        return types
    every = SLIDING if used and keys.get("sliding_window") is not None else FULL
    return tuple(default(layer) if default else every for layer in range(count))


def windowed(
    keys: Keys, attention: GroupedQueryAttention, default: Callable[[int], str] | None = None, *, used: bool = True
) -> list[Mixer]:
    """The attention of each layer within the window that its type has.

    A window over all positions is none. What attends in chunks reaches a window's length at most.
    """
    types = layer_types(keys, default, used=used, choices=(FULL, SLIDING, CHUNKED))
    positions = keys.integer("max_position_embeddings", default=LARGEST_SIZE)
    of_type: dict[str, Mixer] = {FULL: attention}
    for kind, key in ((SLIDING, "sliding_window"), (CHUNKED, "attention_chunk_size")):
        if kind in types:
            size = keys.integer(key)
            of_type[kind] = replace(attention, window=size) if size < positions else attention
    return [of_type[kind] for kind in types]


def require_whole_attention(keys: Keys) -> None:
    """Raise ModelError if layers attend to less than their whole context."""
    if set(layer_types(keys, choices=(FULL, SLIDING, CHUNKED))) != {FULL}:
        key = "sliding_window" if keys.get("layer_types") is None else "layer_types"
        raise keys.refusal(key, "is not of this architecture, which attends to its whole context")
