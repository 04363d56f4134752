"""What the readers of config.json files share: a plain decoder, and what may be unusual in it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from hrm.model_spec.config_file import Keys
from hrm.model_spec.latent import LatentAttention
from hrm.model_spec.spec import LARGEST_SIZE, ModelSpec

EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts")
EXPERTS_PER_TOKEN: Final = ("num_experts_per_tok", "experts_per_token", "moe_top_k")
LAYER_TYPES: Final = ("full_attention", "sliding_attention", "chunked_attention")
FULL, SLIDING, CHUNKED = LAYER_TYPES
_OTHER_MODEL: Final = "use another model: plans know dense layers at the start only"


def decoder(keys: Keys, *, expert_size: str, experts: str, latent: LatentAttention | None = None) -> ModelSpec:
    """A decoder with experts in every layer and nothing unusual.

    `expert_size` and `experts` are the family's keys of an expert's width and of their number.
    """
    hidden_size, num_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
    if latent is not None:
        num_kv_heads, head_dim = num_heads, latent.query_head_dim
    else:
        as_many = keys.is_null("num_key_value_heads")
        num_kv_heads = num_heads if as_many else keys.integer("num_key_value_heads")
        has_head_dim = keys.get("head_dim") is not None
        head_dim = keys.integer("head_dim") if has_head_dim else whole_head(keys, "num_attention_heads", hidden_size)
    return ModelSpec(
        name=keys.where,  # for messages, until the spec has its own
        family="",
        num_layers=keys.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=keys.integer(expert_size),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_experts=keys.integer(experts, *(key for key in EXPERTS if key != experts)),
        experts_per_token=keys.integer(*EXPERTS_PER_TOKEN),
        vocab_size=keys.integer("vocab_size"),
        tied_embeddings=keys.truth("tie_word_embeddings"),
        latent_attention=latent,
    )


def whole_head(keys: Keys, heads: str, hidden_size: int) -> int:
    """The width of a head where all together are as wide as the hidden state."""
    num_heads = keys.integer(heads)
    if hidden_size % num_heads:
        raise keys.refusal(heads, f"must divide the hidden size {hidden_size} without a head_dim")
    return hidden_size // num_heads


def attention_biases(spec: ModelSpec, *, output: bool) -> int:
    """Biases of the query, key and value projections, and of the output's if it has one."""
    return spec.query_size + spec.kv_elements + (spec.hidden_size if output else 0)


def with_dense_layers(spec: ModelSpec, keys: Keys, count: int, size_key: str) -> ModelSpec:
    """The spec with that many dense layers first, their FFN's width under the key."""
    size = keys.integer(size_key) if count else 0
    return replace(spec, num_dense_layers=count, dense_intermediate_size=size)


def leading(keys: Keys, key: str, dense_layers: set[int]) -> int:
    """How many layers are dense, given which; ModelError unless they are the first ones."""
    if dense_layers != set(range(len(dense_layers))):
        raise keys.refusal(key, "must leave no layer dense but the first ones", _OTHER_MODEL)
    return len(dense_layers)


def require_every_layer(keys: Keys, key: str) -> None:
    """Refuse experts in every second or third layer only."""
    if keys.integer(key, default=1) != 1:
        raise keys.refusal(key, "must be 1: no layer dense but the first ones", _OTHER_MODEL)


def with_windows(
    spec: ModelSpec, keys: Keys, default: Callable[[int], str] | None = None, *, used: bool = True
) -> ModelSpec:
    """The spec with the windows of `layer_types`, or else of what `default` says of each layer.

    Without either, a `sliding_window` limits every layer if it is `used`. A window over all
    positions is none. What attends in chunks reaches a window's length at most.
    """
    types = keys.words("layer_types", LAYER_TYPES)
    if types and len(types) != spec.num_layers:
        raise keys.refusal("layer_types", f"must have one of the {spec.num_layers} layers each")
    if SLIDING in types and not used:
        raise keys.refusal("use_sliding_window", f"must be true where layer_types has {SLIDING}")
    if not types:
        sliding = used and keys.get("sliding_window") is not None
        every = SLIDING if sliding else FULL
        types = tuple(default(layer) if default else every for layer in range(spec.num_layers))
    positions = keys.integer("max_position_embeddings", default=LARGEST_SIZE)
    sizes = {FULL: 0}
    for kind, key in ((SLIDING, "sliding_window"), (CHUNKED, "attention_chunk_size")):
        if kind in types:
            size = keys.integer(key)
            sizes[kind] = size if size < positions else 0
    windows = tuple(sizes[kind] for kind in types)
    return replace(spec, attention_windows=windows if any(windows) else ())


def without_windows(spec: ModelSpec, keys: Keys) -> ModelSpec:
    """The spec itself; ModelError if its layers attend to less than their whole context."""
    if with_windows(spec, keys).attention_windows:
        key = "sliding_window" if keys.get("layer_types") is None else "layer_types"
        raise keys.refusal(key, "is not of this architecture, which attends to its whole context")
    return spec
