"""Readers of published config.json files, one for each `model_type`.

They follow the configuration and modelling code of transformers: which key decides what, and what
holds where a key is missing. Sizes must be given; what a config asks for beyond what a ModelSpec
can say is refused, naming the key. Layers that predict further tokens do not count.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from hrm.errors import ModelError
from hrm.layers import GatedDeltaNet, GroupedQueryAttention, LatentAttention, RoutedExperts
from hrm.model_spec.config_file import Keys
from hrm.model_spec.decoder import (
    CHUNKED,
    EXPERTS,
    EXPERTS_PER_TOKEN,
    FULL,
    LINEAR,
    SLIDING,
    grouped_query,
    interleaved,
    layer_types,
    model,
    num_layers,
    require_whole_attention,
    routed_experts,
    whole_head,
    windowed,
)
from hrm.model_spec.spec import MOST_LAYERS, ModelSpec


def spec_from_hf_config(config: dict[str, Any], where: str) -> ModelSpec:
    """The model that a Hugging Face config describes, named after the config's folder.

    Raises ModelError naming `where` and the key if the architecture is unknown, a key is missing or
    of another type, or asks for what no plan can say.
    """
    return read_spec(decoder_keys(config, where))


def read_spec(keys: Keys) -> ModelSpec:
    """The model that a decoder's keys describe, named after the folder of their file."""
    family = keys.get("model_type")
    reader = FAMILY_READERS.get(family) if isinstance(family, str) else None
    if reader is None:
        raise _unknown_architecture(keys)
    path = Path(keys.file)
    name = path.parent.name if path.name == "config.json" else path.stem
    try:
        spec = reader(keys)
    except ModelError as error:  # of a block, which does not know where its sizes are from
        where = error.where if error.where.startswith(keys.where) else f"{keys.where}: {error.where}"
        raise ModelError(where, error.value, error.rule, error.remedy) from error
    return replace(spec, name=name or str(family), family=str(family), published_dtype=_published_dtype(keys))


def decoder_keys(config: dict[str, Any], where: str) -> Keys:
    """The keys of a config, or of the text part within that of a multimodal model."""
    keys = Keys(config, where)
    outer = keys.get("model_type")
    if (isinstance(outer, str) and outer in FAMILY_READERS) or keys.get("text_config") is None:
        return keys
    text = keys.section("text_config").within(keys, "tie_word_embeddings", "quantization_config")
    return text.with_defaults(model_type=f"{outer}_text")


def _unknown_architecture(keys: Keys) -> ModelError:
    """Says which families are known, and of an unknown one with experts, what it would need."""
    known = f"must be one of {', '.join(FAMILY_READERS)}"
    if not any(keys.get(key) is not None for key in EXPERTS):
        rule = f"{known}; hrm plans mixture-of-experts models, and here is none of"
        return keys.refusal("model_type", f"{rule} {', '.join(EXPERTS)}", "use a mixture-of-experts model")
    needed = {
        "num_hidden_layers": (),
        "hidden_size": (),
        "moe_intermediate_size": ("intermediate_size",),
        "num_attention_heads": (),
        "num_key_value_heads": (),
        "vocab_size": (),
        "num_experts": EXPERTS,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
    }
    has: list[str] = []
    lacks: list[str] = []
    for key, aliases in needed.items():
        given = any(keys.get(name) is not None for name in (key, *aliases))
        (has if given else lacks).append(key)
    found = f"has {', '.join(has)} and lacks {', '.join(lacks) or 'none'}"
    return keys.refusal(
        "model_type",
        f"{known}; of the sizes that a reader needs, this config {found}",
        "use one of these, or add a reader to hrm/model_spec/families.py",
    )


def _published_dtype(keys: Keys) -> str:
    """How the weights are quantised; empty if they are not."""
    if keys.get("quantization_config") is None:
        return ""
    method = keys.section("quantization_config").get("quant_method")
    if not isinstance(method, str) or not method.isprintable():
        return "quantised"
    return {"mxfp4": "mxfp4 experts"}.get(method, method)


# -- the families -----------------------------------------------------------------------------


def _read_mixtral(keys: Keys) -> ModelSpec:
    experts = routed_experts(keys, "intermediate_size", "num_local_experts")
    return model(keys, windowed(keys, grouped_query(keys)), experts)


def _read_dbrx(keys: Keys) -> ModelSpec:
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


def _qwen_dense_layers(keys: Keys) -> set[int]:
    return interleaved(keys, "decoder_sparse_step") | set(keys.integers("mlp_only_layers"))


def _qwen_shared(keys: Keys) -> RoutedExperts:
    """Experts beside shared ones that a gate of their own scales."""
    return routed_experts(
        keys,
        "moe_intermediate_size",
        "num_experts",
        shared_intermediate_size=keys.integer("shared_expert_intermediate_size"),
        vectors=(("shared_gate", keys.integer("hidden_size")),),
    )


def _read_qwen2(keys: Keys) -> ModelSpec:
    used = keys.truth("use_sliding_window")
    limited = keys.integer("max_window_layers", default=28, at_least=0) if used else 0
    attention = grouped_query(keys, biases=keys.truth("qkv_bias", default=True))
    mixers = windowed(
        keys, attention, used=used, default=lambda layer: SLIDING if layer % 2 == 0 and layer < limited else FULL
    )
    return model(keys, mixers, _qwen_shared(keys), dense_layers=_qwen_dense_layers(keys))


def _read_qwen3(keys: Keys) -> ModelSpec:
    mixers = windowed(keys, _qwen3_attention(keys), used=keys.truth("use_sliding_window"))
    experts = routed_experts(keys, "moe_intermediate_size", "num_experts")
    return model(keys, mixers, experts, dense_layers=_qwen_dense_layers(keys))


def _qwen3_attention(keys: Keys) -> GroupedQueryAttention:
    has_biases = keys.truth("attention_bias")
    attention = grouped_query(keys, biases=has_biases, output_bias=has_biases)
    return attention.with_vectors(query_norm=attention.head_dim, key_norm=attention.head_dim)


def _read_qwen3_next(keys: Keys) -> ModelSpec:
    """Three of four layers with a gated delta rule, the fourth with attention and an output gate."""
    keys = keys.with_defaults(head_dim=256)
    full = _qwen3_attention(keys)
    # A gate has a bias where the queries have one.
    biases = {"gate_bias": full.query_size} if keys.truth("attention_bias") else {}
    full = replace(full.with_vectors(**biases), output_gate=True)
    linear = GatedDeltaNet(
        hidden_size=full.hidden_size,
        num_key_heads=keys.integer("linear_num_key_heads", default=16),
        num_value_heads=keys.integer("linear_num_value_heads", default=32),
        key_head_dim=keys.integer("linear_key_head_dim", default=128),
        value_head_dim=keys.integer("linear_value_head_dim", default=128),
        conv_kernel=keys.integer("linear_conv_kernel_dim", default=4),
    )
    interval = keys.integer("full_attention_interval", default=4)
    types = layer_types(keys, lambda layer: LINEAR if (layer + 1) % interval else FULL, choices=(FULL, LINEAR))
    mixers = [linear if kind == LINEAR else full for kind in types]
    return model(keys, mixers, _qwen_shared(keys), dense_layers=_qwen_dense_layers(keys))


def _read_deepseek(keys: Keys) -> ModelSpec:
    """DeepSeek-V2, whose scores have no corrections."""
    return _deepseek(keys, corrected=False)


def _read_deepseek_v3(keys: Keys) -> ModelSpec:
    return _deepseek(keys, corrected=True)


def _deepseek(keys: Keys, *, corrected: bool) -> ModelSpec:
    require_whole_attention(keys)
    if keys.integer("moe_layer_freq", default=1) != 1:
        raise keys.refusal("moe_layer_freq", "must be 1: the modelling code knows dense layers at the start only")
    if keys.truth("mlp_bias"):
        raise keys.refusal("mlp_bias", "must be false", "use a model without biases in its FFNs")
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
    return model(keys, latent, _first_dense_experts(keys, corrected=corrected), dense_layers=_first_dense(keys))


def _first_dense_experts(keys: Keys, *, corrected: bool) -> RoutedExperts:
    """Experts by DeepSeek's keys, and corrections of their scores."""
    shared = keys.integer("n_shared_experts", at_least=0) * keys.integer("moe_intermediate_size")
    experts = routed_experts(keys, "moe_intermediate_size", "n_routed_experts", shared_intermediate_size=shared)
    return experts.with_vectors(score_correction=experts.num_experts) if corrected else experts


def _first_dense(keys: Keys) -> range:
    return range(keys.integer("first_k_dense_replace", at_least=0))


def _read_gpt_oss(keys: Keys) -> ModelSpec:
    keys = keys.with_defaults(head_dim=64)
    has_biases = keys.truth("attention_bias", default=True)
    attention = grouped_query(keys, biases=has_biases, output_bias=has_biases)
    attention = attention.with_vectors(sinks=attention.num_heads)
    experts = routed_experts(keys, "intermediate_size", "num_local_experts")
    biases = (("w13_bias", 2 * experts.intermediate_size), ("w2_bias", experts.hidden_size))
    experts = replace(experts.with_vectors(router_bias=experts.num_experts), expert_vectors=biases)
    return model(keys, windowed(keys, attention, lambda layer: FULL if layer % 2 else SLIDING), experts)


def _read_llama4(keys: Keys) -> ModelSpec:
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
    has_biases = keys.truth("attention_bias")
    attention = grouped_query(keys, biases=has_biases, output_bias=has_biases)
    experts = routed_experts(keys, "intermediate_size", "num_local_experts")
    experts = replace(experts, shared_intermediate_size=experts.intermediate_size)
    mixers = windowed(keys, attention, lambda layer: CHUNKED if rotary[layer] else FULL)
    return model(keys, mixers, experts, dense_layers=dense, dense_size="intermediate_size_mlp")


def _read_glm4(keys: Keys) -> ModelSpec:
    require_whole_attention(keys)
    attention = grouped_query(keys, biases=keys.truth("attention_bias"))
    if keys.truth("use_qk_norm"):
        attention = attention.with_vectors(query_norm=attention.head_dim, key_norm=attention.head_dim)
    return model(keys, attention, _first_dense_experts(keys, corrected=True), dense_layers=_first_dense(keys))


def _read_phimoe(keys: Keys) -> ModelSpec:
    has_biases, hidden_size = keys.truth("attention_bias"), keys.integer("hidden_size")
    attention = grouped_query(keys, biases=has_biases, output_bias=has_biases)
    attention = attention.with_vectors(attention_norm_bias=hidden_size)
    experts = routed_experts(keys, "intermediate_size", "num_local_experts")
    experts = experts.with_vectors(ffn_norm_bias=hidden_size)
    head_biases = keys.truth("lm_head_bias") * keys.integer("vocab_size")
    return model(keys, windowed(keys, attention), experts, other_head_parameters=head_biases + hidden_size)


def _read_olmoe(keys: Keys) -> ModelSpec:
    keys = keys.with_defaults(num_key_value_heads=None)
    require_whole_attention(keys)
    has_biases = keys.truth("attention_bias")
    attention = grouped_query(keys, biases=has_biases, output_bias=has_biases)
    attention = attention.with_vectors(query_norm=attention.query_size, key_norm=attention.kv_size)
    return model(keys, attention, routed_experts(keys, "intermediate_size", "num_experts"))


FAMILY_READERS: Final[dict[str, Callable[[Keys], ModelSpec]]] = {
    "mixtral": _read_mixtral,
    "dbrx": _read_dbrx,
    "qwen2_moe": _read_qwen2,
    "qwen3_moe": _read_qwen3,
    "qwen3_next": _read_qwen3_next,
    "deepseek_v2": _read_deepseek,
    "deepseek_v3": _read_deepseek_v3,
    "kimi_k2": _read_deepseek_v3,
    "gpt_oss": _read_gpt_oss,
    "llama4_text": _read_llama4,
    "glm4_moe": _read_glm4,
    "phimoe": _read_phimoe,
    "olmoe": _read_olmoe,
}
