"""DeepSeek and its kin: latent attention, and experts after dense layers at the start."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from hrm.layers import DenseFfn, Indexer, LatentAttention, Layer
from hrm.model_spec.config_file import Keys
from hrm.model_spec.decoder import (
    first_dense,
    first_dense_experts,
    model,
    num_layers,
    of_layers,
    require_whole_attention,
    routed_experts,
)
from hrm.model_spec.spec import MOST_LAYERS, ModelSpec


def read_deepseek_v2(keys: Keys) -> ModelSpec:
    """DeepSeek-V2, whose scores have no corrections."""
    return _deepseek(keys, corrected=False, dense_layers=first_dense(keys))


def read_deepseek_v3(keys: Keys) -> ModelSpec:
    """DeepSeek-V3 and Kimi-K2."""
    return _deepseek(keys, corrected=True, dense_layers=first_dense(keys))


def read_glm4_lite(keys: Keys) -> ModelSpec:
    """GLM-4.7-Flash: as DeepSeek-V3, with dense layers where its list has them, or else the first."""
    return _deepseek(keys, corrected=True, dense_layers=dense_by_list(keys, default_first=1))


def read_deepseek_v32(keys: Keys) -> ModelSpec:
    """DeepSeek-V3.2: as DeepSeek-V3, with an indexer in every layer."""
    return _indexed(keys, [False] * num_layers(keys))


def read_glm5(keys: Keys) -> ModelSpec:
    """GLM-5: as DeepSeek-V3.2, where some layers may use what an earlier one's indexer chose."""
    keys = keys.with_defaults(index_topk=2048, index_head_dim=128, index_n_heads=32)
    types, count = keys.words("indexer_types", ("full", "shared")), num_layers(keys)
    pattern = keys.get("index_topk_pattern")
    if not types and isinstance(pattern, str) and set(pattern) <= {"F", "S"}:
        types = tuple("full" if letter == "F" else "shared" for letter in pattern)
    if types and len(types) != count:
        raise keys.refusal("indexer_types", f"must have one of the {count} layers each")
    every = keys.integer("index_topk_freq", default=1)
    offset = keys.integer("index_skip_topk_offset", default=2, at_least=0)
    by_rule = (max(layer - offset + 1, 0) % every > 0 for layer in range(count))
    return _indexed(keys, [kind == "shared" for kind in types] or list(by_rule))


def _indexed(keys: Keys, is_shared: Sequence[bool]) -> ModelSpec:
    latent = latent_attention(keys)
    indexer = Indexer(
        num_heads=keys.integer("index_n_heads"),
        head_dim=keys.integer("index_head_dim"),
        top_k=keys.integer("index_topk"),
    )
    mixers = [replace(latent, indexer=replace(indexer, shared=shared)) for shared in is_shared]
    experts = first_dense_experts(keys, corrected=True)
    return model(keys, mixers, experts, dense_layers=dense_by_list(keys, default_first=3))


def read_longcat(keys: Keys) -> ModelSpec:
    """LongCat-Flash: of two layers with a dense FFN each, the first has experts beside it.

    The config counts both as one. Some of the experts return the token itself.
    """
    width = keys.integer("ffn_hidden_size")
    experts = routed_experts(
        keys,
        "expert_ffn_hidden_size",
        "n_routed_experts",
        shared_intermediate_size=width,
        zero_experts=keys.integer("zero_expert_num", default=0, at_least=0),
    )
    experts = experts.with_vectors(score_correction=experts.num_experts + experts.zero_experts)
    latent, dense = latent_attention(keys), DenseFfn(hidden_size=experts.hidden_size, intermediate_size=width)
    pairs = keys.integer("num_layers", at_most=MOST_LAYERS // 2)
    return of_layers(keys, [Layer(mixer=latent, ffn=(ffn,)) for _ in range(pairs) for ffn in (experts, dense)])


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
