"""DeepSeek and its kin: latent attention, and experts after dense layers at the start."""

from collections.abc import Collection

from hrm.layers import LatentAttention
from hrm.model_spec.config_file import Keys
from hrm.model_spec.decoder import first_dense, first_dense_experts, model, num_layers, require_whole_attention
from hrm.model_spec.spec import ModelSpec


def read_deepseek_v2(keys: Keys) -> ModelSpec:
    """DeepSeek-V2, whose scores have no corrections."""
    return _deepseek(keys, corrected=False, dense_layers=first_dense(keys))


def read_deepseek_v3(keys: Keys) -> ModelSpec:
    """DeepSeek-V3 and Kimi-K2."""
    return _deepseek(keys, corrected=True, dense_layers=first_dense(keys))


def read_glm4_lite(keys: Keys) -> ModelSpec:
    """GLM-4.7-Flash: as DeepSeek-V3, with dense layers where its list has them, or else the first."""
    return _deepseek(keys, corrected=True, dense_layers=dense_by_list(keys, default_first=1))


def dense_by_list(keys: Keys, default_first: int) -> Collection[int]:
    """The dense layers by `mlp_layer_types`, or else the first so many."""
    types, count = keys.words("mlp_layer_types", ("dense", "sparse")), num_layers(keys)
    if not types:
        return range(keys.integer("first_k_dense_replace", default=default_first, at_least=0))
    if len(types) != count:
        raise keys.refusal("mlp_layer_types", f"must have one of the {count} layers each")
    return {layer for layer, kind in enumerate(types) if kind == "dense"}


def _deepseek(keys: Keys, *, corrected: bool, dense_layers: Collection[int]) -> ModelSpec:
    require_whole_attention(keys)
    if keys.integer("moe_layer_freq", default=1) != 1:
        raise keys.refusal("moe_layer_freq", "must be 1: the modelling code knows dense layers at the start only")
    if keys.truth("mlp_bias"):
        raise keys.refusal("mlp_bias", "must be false", "use a model without biases in its FFNs")
    experts = first_dense_experts(keys, corrected=corrected)
    return model(keys, latent_attention(keys), experts, dense_layers=dense_layers)


def latent_attention(keys: Keys) -> LatentAttention:
    """Latent attention by DeepSeek's keys."""
    latent = LatentAttention(
        hidden_size=keys.integer("hidden_size"),
        num_heads=keys.integer("num_attention_heads"),
        kv_rank=keys.integer("kv_lora_rank"),
        rope_head_dim=keys.integer("qk_rope_head_dim"),
        nope_head_dim=keys.integer("qk_nope_head_dim"),
        value_head_dim=keys.integer("v_head_dim"),
        query_rank=keys.integer("q_lora_rank", default=0),
    )
    if keys.truth("attention_bias"):  # of both projections down and of the output's, not of those up
        downs = {"query_down_bias": latent.query_rank, "kv_down_bias": latent.cached_elements}
        latent = latent.with_vectors(**downs, output_bias=latent.hidden_size)
    return latent
