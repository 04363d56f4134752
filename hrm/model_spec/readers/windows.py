"""Families whose layers alternate between their whole context and a part of it."""

from collections.abc import Collection, Sequence
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
    with_head_norms,
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
    rotated = llama4_rotated_layers(keys, count)
    experts = routed_experts(keys, "intermediate_size", "num_local_experts")
    experts = replace(experts, shared_intermediate_size=experts.intermediate_size)
    mixers = windowed(keys, biased_attention(keys), lambda layer: CHUNKED if rotated[layer] else FULL)
    return model(keys, mixers, experts, dense_layers=dense, dense_size="intermediate_size_mlp")


def llama4_rotated_layers(keys: Keys, count: int) -> tuple[bool, ...]:
    """In which of so many layers of Llama-4 positions are rotated: as a list says, or in all but every so many-th."""
    rotated = keys.integers("no_rope_layers")
    if not rotated:
        interval = keys.integer("no_rope_layer_interval", default=4)
        rotated = tuple((layer + 1) % interval for layer in range(count))
    if len(rotated) < count:
        raise keys.refusal("no_rope_layers", f"must have one of the {count} layers each")
    return tuple(each != 0 for each in rotated[:count])


def read_mimo_v2(keys: Keys) -> ModelSpec:
    """MiMo-V2: narrower values than keys, and twice the key heads and sinks within windows."""
    count = num_layers(keys)
    keys = keys.with_defaults(head_dim=192, v_head_dim=128)
    whole = replace(grouped_query(keys), value_head_dim=keys.integer("v_head_dim"))
    twice = {"swa_num_key_value_heads": 2 * whole.num_kv_heads}
    local = replace(whole, num_kv_heads=keys.with_defaults(**twice).integer("swa_num_key_value_heads"))
    if keys.get("sliding_window_size") is None:
        window = keys.integer("sliding_window")
    else:  # of tokens before the newest one
        window = keys.integer("sliding_window_size") + 1
    biased = keys.truth("attention_bias")
    whole, local = (
        each.with_vectors(qkv_bias=biased * each.projected_size) for each in (whole, replace(local, window=window))
    )
    local = local.with_vectors(sinks=local.num_heads)
    pattern = _of_layers(keys, "hybrid_layer_pattern", [layer > 0 and (layer + 1) % 6 > 0 for layer in range(count)])
    types = layer_types(keys, lambda layer: SLIDING if pattern[layer] else FULL, choices=(FULL, SLIDING))
    sparse = _of_layers(keys, "moe_layer_freq", [layer > 0 for layer in range(count)])
    kinds = keys.words("mlp_layer_types", ("dense", "sparse")) or ["sparse" if each else "dense" for each in sparse]
    dense = {layer for layer, kind in enumerate(kinds) if kind == "dense"}
    experts = routed_experts(keys, "moe_intermediate_size", "n_routed_experts")
    experts = experts.with_vectors(score_correction=experts.num_experts)
    return model(keys, [local if kind == SLIDING else whole for kind in types], experts, dense_layers=dense)


def _of_layers(keys: Keys, key: str, default: Sequence[int]) -> Sequence[int]:
    """A number for every layer, and maybe more for layers that predict further tokens."""
    given = keys.integers(key)
    if given and len(given) < len(default):
        raise keys.refusal(key, f"must have one of the {len(default)} layers each")
    return given or default


def read_step(keys: Keys) -> ModelSpec:
    """Step-3.5 and 3.7: windows with more heads, and a gate of every head."""
    count = num_layers(keys)
    if keys.get("num_attention_groups") is not None:
        keys = keys.with_defaults(num_key_value_heads=keys.integer("num_attention_groups"))
    whole = with_head_norms(biased_attention(keys))
    local = replace(whole, num_heads=_step_sliding_heads(keys, whole.num_heads))
    whole, local = (each.with_vectors(head_gate=each.num_heads * each.hidden_size) for each in (whole, local))
    types = keys.words("layer_types", (FULL, SLIDING))[:count] or (FULL,) * count
    if SLIDING in types:
        local = replace(local, window=keys.integer("sliding_window"))
    shared = keys.integer("share_expert_dim", "share_expert_dims")
    experts = routed_experts(keys, "moe_intermediate_size", "n_routed_experts", shared_intermediate_size=shared)
    experts = experts.with_vectors(score_correction=experts.num_experts)
    mixers = [local if kind == SLIDING else whole for kind in types]
    return model(keys, mixers, experts, dense_layers=_step_dense_layers(keys))


def _step_sliding_heads(keys: Keys, default: int) -> int:
    if keys.get("attention_other_setting") is not None:
        return keys.section("attention_other_setting").integer("num_attention_heads", default=default)
    return keys.integer("num_sliding_attention_heads", default=default)


def _step_dense_layers(keys: Keys) -> Collection[int]:
    """By a list of kinds, a text with the numbers of those with experts, or all but the first ones."""
    kinds, listed = keys.words("mlp_layer_types", ("dense", "sparse")), keys.get("moe_layers_enum")
    if kinds:
        return {layer for layer, kind in enumerate(kinds) if kind == "dense"}
    if isinstance(listed, str):
        numbers = [number.strip() for number in listed.split(",")]
        if not all(number.isdecimal() and len(number) < 6 for number in numbers):
            raise keys.refusal("moe_layers_enum", "must be numbers of layers with commas between them")
        return set(range(num_layers(keys))) - {int(number) for number in numbers}
    return range(keys.integer("first_k_dense_replace", default=3, at_least=0))


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
        each = keys.section("per_layer_config")
        padded = str(layer).zfill(len(str(num_layers(keys) - 1)))  # so that they sort
        own = each.section(padded if each.get(str(layer)) is None else str(layer))
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
