"""What the config.json of every built-in model says, as far as sizes follow from it."""

from typing import Any, Final

_MIXTRAL: Final = {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
    "max_position_embeddings": 32768, "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
_QWEN3: Final = {
    "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
    "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960,
    "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "sliding_window": None,
    "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
_DEEPSEEK: Final = {
    "model_type": "deepseek_v2", "attention_bias": False, "first_k_dense_replace": 1,
    "hidden_size": 5120, "intermediate_size": 12288, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "moe_intermediate_size": 1536, "moe_layer_freq": 1,
    "n_group": 8, "n_routed_experts": 160, "n_shared_experts": 2, "num_attention_heads": 128,
    "num_experts_per_tok": 6, "num_hidden_layers": 60, "num_key_value_heads": 128,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "tie_word_embeddings": False, "topk_group": 3, "topk_method": "group_limited_greedy",
    "v_head_dim": 128, "vocab_size": 102400,
}  # fmt: skip
_FP8: Final = {"fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
_DEEPSEEK_V3: Final = {
    **_DEEPSEEK, "model_type": "deepseek_v3", "first_k_dense_replace": 3, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256,
    "n_shared_experts": 1, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1, "quantization_config": _FP8, "topk_group": 4,
    "topk_method": "noaux_tc", "vocab_size": 129280,
}  # fmt: skip
_GPT_OSS: Final = {
    "model_type": "gpt_oss", "attention_bias": True, "experts_per_token": 4, "head_dim": 64,
    "hidden_size": 2880, "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072, "num_attention_heads": 64, "num_experts_per_tok": 4,
    "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "sliding_window": 128, "tie_word_embeddings": False, "vocab_size": 201088,
}  # fmt: skip

PUBLISHED: Final[dict[str, dict[str, Any]]] = {
    "mixtral-8x7b": _MIXTRAL,
    "mixtral-8x22b": {
        **_MIXTRAL, "hidden_size": 6144, "intermediate_size": 16384, "num_attention_heads": 48,
        "num_hidden_layers": 56, "max_position_embeddings": 65536,
    },
    "dbrx": {
        "model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 40,
        "vocab_size": 100352, "tie_word_embeddings": False,
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000},
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    },
    "qwen3-30b-a3b": _QWEN3,
    "qwen3-235b-a22b": {
        **_QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "max_window_layers": 94,
        "moe_intermediate_size": 1536, "num_attention_heads": 64, "num_hidden_layers": 94,
    },
    "qwen2-57b-a14b": {
        "model_type": "qwen2_moe", "decoder_sparse_step": 1, "hidden_size": 3584,
        "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28,
        "moe_intermediate_size": 2560, "num_attention_heads": 28, "num_experts": 64,
        "num_experts_per_tok": 8, "num_hidden_layers": 28, "num_key_value_heads": 4,
        "shared_expert_intermediate_size": 20480, "sliding_window": 65536,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
    },
    "deepseek-v2-lite": {
        **_DEEPSEEK, "hidden_size": 2048, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64,
        "num_attention_heads": 16, "num_hidden_layers": 27, "num_key_value_heads": 16,
        "q_lora_rank": None, "topk_group": 1, "topk_method": "greedy",
    },
    "deepseek-v2": _DEEPSEEK,
    "deepseek-v3": _DEEPSEEK_V3,
    "kimi-k2": {
        **_DEEPSEEK_V3, "model_type": "kimi_k2", "first_k_dense_replace": 1, "n_group": 1,
        "n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64,
        "num_nextn_predict_layers": 0, "topk_group": 1, "vocab_size": 163840,
    },
    "gpt-oss-20b": _GPT_OSS,
    "gpt-oss-120b": {
        **_GPT_OSS, "num_hidden_layers": 36, "num_local_experts": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 18,
    },
    "llama-4-scout": {
        "model_type": "llama4",
        "text_config": {
            "model_type": "llama4_text", "attention_bias": False, "attention_chunk_size": 8192,
            "head_dim": 128, "hidden_size": 5120, "interleave_moe_layer_step": 1,
            "intermediate_size": 8192, "intermediate_size_mlp": 16384,
            "max_position_embeddings": 10485760, "no_rope_layers": [], "num_attention_heads": 40,
            "num_experts_per_tok": 1, "num_hidden_layers": 48, "num_key_value_heads": 8,
            "num_local_experts": 16, "use_qk_norm": True, "vocab_size": 202048,
        },
        "vision_config": {"model_type": "llama4_vision_model", "hidden_size": 1408},
    },
    "glm-4.5-air": {
        "model_type": "glm4_moe", "attention_bias": True, "first_k_dense_replace": 1,
        "head_dim": 128, "hidden_size": 4096, "intermediate_size": 10944,
        "max_position_embeddings": 131072, "moe_intermediate_size": 1408, "n_group": 1,
        "n_routed_experts": 128, "n_shared_experts": 1, "num_attention_heads": 96,
        "num_experts_per_tok": 8, "num_hidden_layers": 46, "num_key_value_heads": 8,
        "num_nextn_predict_layers": 1, "partial_rotary_factor": 0.5,
        "tie_word_embeddings": False, "use_qk_norm": False, "vocab_size": 151552,
    },
    "phi-3.5-moe": {
        "model_type": "phimoe", "attention_bias": True, "hidden_size": 4096,
        "intermediate_size": 6400, "lm_head_bias": True, "max_position_embeddings": 131072,
        "num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "num_local_experts": 16, "sliding_window": 131072,
        "tie_word_embeddings": False, "vocab_size": 32064,
    },
    "olmoe-1b-7b": {
        "model_type": "olmoe", "attention_bias": False, "clip_qkv": None, "hidden_size": 2048,
        "intermediate_size": 1024, "max_position_embeddings": 4096, "num_attention_heads": 16,
        "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "tie_word_embeddings": False, "vocab_size": 50304,
    },
}  # fmt: skip


def decoder_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of the text part."""
    return config.get("text_config", config)


def changed(name: str, **changes: Any) -> dict[str, Any]:
    """A published config with keys of its text part changed."""
    config = PUBLISHED[name]
    if "text_config" in config:
        return {**config, "text_config": {**config["text_config"], **changes}}
    return {**config, **changes}


def without(name: str, *keys: str) -> dict[str, Any]:
    """A published config without those keys of its text part."""
    kept = {key: value for key, value in decoder_keys(PUBLISHED[name]).items() if key not in keys}
    return {**PUBLISHED[name], "text_config": kept} if "text_config" in PUBLISHED[name] else kept
