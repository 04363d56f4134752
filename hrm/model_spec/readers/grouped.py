"""Families with grouped-query attention over the whole context in every layer, and experts."""

from hrm.layers import GroupedQueryAttention, RoutedExperts, Vectors
from hrm.model_spec.config_file import Keys
from hrm.model_spec.decoder import (
    FULL,
    SLIDING,
    alike,
    biased_attention,
    first_dense,
    first_dense_experts,
    grouped_query,
    model,
    num_layers,
    require_whole_attention,
    routed_experts,
    whole_head,
    windowed,
    with_head_norms,
)
from hrm.model_spec.spec import MOST_LAYERS, ModelSpec


def read_mixtral(keys: Keys) -> ModelSpec:
    """Mixtral."""
    experts = routed_experts(keys, "intermediate_size", "num_local_experts")
    return model(keys, windowed(keys, grouped_query(keys)), experts)


def read_dbrx(keys: Keys) -> ModelSpec:
    """DBRX, with keys of its own in two sections."""
    ffn, attention = keys.section("ffn_config"), keys.section("attn_config")
    hidden_size = keys.integer("d_model")
    mixer = GroupedQueryAttention(
        hidden_size=hidden_size,
        num_heads=keys.integer("n_heads"),
        num_kv_heads=attention.integer("kv_n_heads"),
        head_dim=whole_head(keys, "n_heads", hidden_size),
    )
    experts = RoutedExperts(
        hidden_size=hidden_size,
        intermediate_size=ffn.integer("ffn_hidden_size"),
        num_experts=ffn.integer("moe_num_experts"),
        experts_per_token=ffn.integer("moe_top_k"),
    )
    return model(keys.with_defaults(num_hidden_layers=keys.integer("n_layers", at_most=MOST_LAYERS)), mixer, experts)


def read_glm4(keys: Keys) -> ModelSpec:
    """GLM-4.5 to 4.7."""
    require_whole_attention(keys)
    attention = grouped_query(keys, biases=keys.truth("attention_bias"))
    if keys.truth("use_qk_norm"):
        attention = with_head_norms(attention)
    return model(keys, attention, first_dense_experts(keys, corrected=True), dense_layers=first_dense(keys))


def read_phimoe(keys: Keys) -> ModelSpec:
    """Phi-3.5-MoE, whose norms have biases."""
    attention = biased_attention(keys)
    hidden_size = attention.hidden_size
    attention = attention.with_vectors(attention_norm_bias=hidden_size)
    experts = routed_experts(keys, "intermediate_size", "num_local_experts")
    experts = experts.with_vectors(ffn_norm_bias=hidden_size)
    of_head = (("final_norm_bias", hidden_size), *_lm_head_bias(keys, "lm_head_bias"))
    return model(keys, windowed(keys, attention), experts, head_vectors=of_head)


def read_olmoe(keys: Keys) -> ModelSpec:
    """OLMoE, which norms all queries together, and all keys."""
    keys = keys.with_defaults(num_key_value_heads=None)
    require_whole_attention(keys)
    attention = _with_whole_norms(biased_attention(keys))
    return model(keys, attention, routed_experts(keys, "intermediate_size", "num_experts"))


def read_minimax_m2(keys: Keys) -> ModelSpec:
    """MiniMax-M2, with norms as OLMoE and corrected scores."""
    attention = _with_whole_norms(grouped_query(keys.with_defaults(head_dim=128)))
    experts = routed_experts(keys, "intermediate_size", "num_local_experts")
    return model(keys, attention, experts.with_vectors(score_correction=experts.num_experts))


def read_granite(keys: Keys) -> ModelSpec:
    """Granite-MoE."""
    attention = biased_attention(keys.with_defaults(num_key_value_heads=None))
    return model(keys, attention, routed_experts(keys, "intermediate_size", "num_local_experts"))


def read_ernie4_5(keys: Keys) -> ModelSpec:
    """ERNIE-4.5, whose biases, if any, leave out the routed experts."""
    keys = keys.with_defaults(tie_word_embeddings=True)
    has_biases = keys.truth("use_bias")
    width = keys.integer("moe_intermediate_size")
    shared = width * keys.integer("moe_num_shared_experts", default=2, at_least=0)
    experts = routed_experts(keys, "moe_intermediate_size", "moe_num_experts", shared_intermediate_size=shared)
    biases = {"shared_w13_bias": 2 * shared, "shared_w2_bias": experts.hidden_size} if has_biases and shared else {}
    experts = experts.with_vectors(score_correction=experts.num_experts, **biases)
    return model(
        keys,
        biased_attention(keys, "use_bias"),
        experts,
        dense_layers=_ernie_dense_layers(keys),
        dense_biases=has_biases,
        head_vectors=_lm_head_bias(keys, "use_bias"),
    )


def read_dots(keys: Keys) -> ModelSpec:
    """dots.llm1: as GLM-4.5 with norms of heads, and windows in the last layers if it has any."""
    attention = with_head_norms(biased_attention(keys.with_defaults(num_key_value_heads=None)))
    limited = keys.integer("max_window_layers", default=62, at_least=0)
    used = keys.get("sliding_window") is not None
    mixers = windowed(keys, attention, lambda layer: SLIDING if used and layer >= limited else FULL)
    dense = range(keys.integer("first_k_dense_replace", default=0, at_least=0))
    return model(keys, mixers, first_dense_experts(keys, corrected=True), dense_layers=dense)


def read_hunyuan(keys: Keys) -> ModelSpec:
    """Hunyuan-A13B, whose config has a number for every layer where one would do."""
    keys = alike(keys.with_defaults(num_key_value_heads=None), "moe_intermediate_size", "moe_topk", "num_shared_expert")
    size = "intermediate_size" if keys.get("moe_intermediate_size") is None else "moe_intermediate_size"
    shared = keys.integer("num_shared_expert", default=1, at_least=0) * keys.integer(size)
    experts = routed_experts(keys, size, "num_experts", shared_intermediate_size=shared)
    return model(keys, with_head_norms(biased_attention(keys)), experts)


def read_bailing(keys: Keys) -> ModelSpec:
    """Ling and Ring up to 2.0: as GLM-4.5, corrected in groups of experts only."""
    attention = grouped_query(keys, biases=keys.truth("use_qkv_bias"), output_bias=keys.truth("use_bias"))
    if keys.truth("use_qk_norm"):
        attention = with_head_norms(attention)
    experts = first_dense_experts(keys, corrected=keys.get("n_group") is not None)
    return model(keys, attention, experts, dense_layers=first_dense(keys))


def _ernie_dense_layers(keys: Keys) -> set[int]:
    """All but every so many-th from the first to the last with experts; -1 for the last of all."""
    count = num_layers(keys)
    first = keys.integer("moe_layer_start_index", default=1, at_least=0)
    last = keys.integer("moe_layer_end_index", default=-1, at_least=-1)
    every = keys.integer("moe_layer_interval", default=1)
    last = count - 1 if last == -1 else last
    return {layer for layer in range(count) if (layer + 1) % every or not first <= layer <= last}


def _lm_head_bias(keys: Keys, key: str) -> Vectors:
    """The bias of the LM head, if the key says that there is one."""
    return (("lm_head_bias", keys.integer("vocab_size")),) if keys.truth(key) else ()


def _with_whole_norms(attention: GroupedQueryAttention) -> GroupedQueryAttention:
    return attention.with_vectors(query_norm=attention.query_size, key_norm=attention.kv_size)
