"""Families whose layers alternate between their whole context and a part of it."""

from dataclasses import replace

from hrm.layers import LARGEST_SIZE, GroupedQueryAttention, Mixer, RoutedExperts
from hrm.model_spec.config_file import Keys
from hrm.model_spec.decoder import (
    CHUNKED,
    FULL,
    SLIDING,
    biased_attention,
    grouped_query,
    interleaved,
    layer_types,
    model,
    num_layers,
    routed_experts,
    windowed,
)
from hrm.model_spec.spec import ModelSpec


def read_gpt_oss(keys: Keys) -> ModelSpec:
    """gpt-oss: sinks, and biases wherever there is a matrix."""
    keys = keys.with_defaults(head_dim=64, attention_bias=True)
    attention = biased_attention(keys)
    attention = attention.with_vectors(sinks=attention.num_heads)
    experts = routed_experts(keys, "intermediate_size", "num_local_experts")
    biases = (("w13_bias", 2 * experts.intermediate_size), ("w2_bias", experts.hidden_size))
    experts = replace(experts.with_vectors(router_bias=experts.num_experts), expert_vectors=biases)
    return model(keys, windowed(keys, attention, lambda layer: FULL if layer % 2 else SLIDING), experts)


def read_llama4(keys: Keys) -> ModelSpec:
    """The text part of Llama-4: chunks where positions are rotated, a shared expert beside the one."""
    keys, count = keys.with_defaults(head_dim=128), num_layers(keys)
    if keys.get("moe_layers") is None:
        dense = interleaved(keys, "interleave_moe_layer_step")
    else:
        dense = set(range(count)) - set(keys.integers("moe_layers"))
    rotary = keys.integers("no_rope_layers")
    if not rotary:
        interval = keys.integer("no_rope_layer_interval", default=4)
        rotary = tuple((layer + 1) % interval for layer in range(count))
    if len(rotary) < count:
        raise keys.refusal("no_rope_layers", f"must have one of the {count} layers each")
    experts = routed_experts(keys, "intermediate_size", "num_local_experts")
    experts = replace(experts, shared_intermediate_size=experts.intermediate_size)
    mixers = windowed(keys, biased_attention(keys), lambda layer: CHUNKED if rotary[layer] else FULL)
    return model(keys, mixers, experts, dense_layers=dense, dense_size="intermediate_size_mlp")


def read_gemma4(keys: Keys) -> ModelSpec:
    """The text part of Gemma-4 with experts: five layers within a window to one over all tokens."""
    keys = keys.with_defaults(tie_word_embeddings=True, hidden_size_per_layer_input=256)
    if not keys.truth("enable_moe_block"):
        raise keys.refusal("enable_moe_block", "must be true: without it the model has no experts")
    for key in ("hidden_size_per_layer_input", "num_kv_shared_layers"):
        if keys.integer(key, default=0, at_least=0):
            raise keys.refusal(key, "must be 0: no Gemma-4 with experts has another", "use Gemma-4-26B-A4B")
    return model(keys, _gemma4_mixers(keys), _gemma4_experts(keys))


def _gemma4_mixers(keys: Keys) -> list[Mixer]:
    """Layers over all tokens have wider heads, and may project keys and values by one matrix."""
    types = layer_types(keys, lambda layer: SLIDING if (layer + 1) % 6 else FULL, choices=(FULL, SLIDING))
    local = grouped_query(keys.with_defaults(head_dim=256))
    window, positions = keys.integer("sliding_window"), keys.integer("max_position_embeddings", default=LARGEST_SIZE)
    local = replace(local, window=window if window < positions else 0)
    has_biases = keys.truth("attention_bias")
    # The last layer sees all tokens, whatever its type says.
    mixers = (
        _gemma4_whole(keys, layer, local) if kind == FULL else local for layer, kind in enumerate((*types[:-1], FULL))
    )
    return [_gemma4_vectors(mixer, has_biases) for mixer in mixers]


def _gemma4_whole(keys: Keys, layer: int, local: GroupedQueryAttention) -> GroupedQueryAttention:
    """A layer over all tokens; its sizes are told for all such layers, or for each by newer configs."""
    shared = keys.truth("attention_k_eq_v")
    if keys.get("per_layer_config") is None:
        head_dim = keys.integer("global_head_dim", default=512)
        kv_heads = keys.integer("num_global_key_value_heads", default=local.num_kv_heads) if shared else None
    else:
        own = keys.section("per_layer_config").section(str(layer))
        head_dim = own.integer("head_dim")
        kv_heads = own.integer("num_key_value_heads", default=local.num_kv_heads)
    kv_heads = local.num_kv_heads if kv_heads is None else kv_heads
    return replace(local, head_dim=head_dim, num_kv_heads=kv_heads, values_from_keys=shared, window=0)


def _gemma4_vectors(attention: GroupedQueryAttention, has_biases: bool) -> GroupedQueryAttention:  # noqa: FBT001
    hidden, head_dim = attention.hidden_size, attention.head_dim
    biases = {"qkv_bias": attention.projected_size, "output_bias": hidden} if has_biases else {}
    return attention.with_vectors(query_norm=head_dim, key_norm=head_dim, attention_output_norm=hidden, **biases)


def _gemma4_experts(keys: Keys) -> RoutedExperts:
    """The dense MLP beside the experts is a shared one, with norms of its own before and after."""
    shared = keys.integer("intermediate_size")
    experts = routed_experts(keys, "moe_intermediate_size", "num_experts", shared_intermediate_size=shared)
    hidden = experts.hidden_size
    return experts.with_vectors(
        router_scale=hidden,
        expert_scale=experts.num_experts,
        shared_norm=hidden,
        shared_output_norm=hidden,
        routed_output_norm=hidden,
        ffn_output_norm=hidden,
        layer_scale=1,
    )
