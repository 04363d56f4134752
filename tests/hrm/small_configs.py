"""Small models of every family, and how many elements transformers stores of a model."""

import torch

from tests.hrm.published_configs import decoder_keys

# Text parts to which transformers gives a head in the whole model only.
HEADLESS = {
    "qwen3_vl_moe_text": "Qwen3VLMoeTextModel",
    "qwen3_omni_moe_text": "Qwen3OmniMoeThinkerTextModel",
    "step3p5": "Step3p7TextModel",
}


def transformers_config(config):
    """The same as transformers' own configuration, which knows Kimi K2 as a DeepSeek-V3."""
    from transformers import AutoConfig

    keys = {**decoder_keys(config)}
    keys.pop("quantization_config", None)
    model_type = keys.pop("model_type")
    return AutoConfig.for_model("deepseek_v3" if model_type == "kimi_k2" else model_type, **keys)


def stored_elements(config):
    """Elements of all that a checkpoint of this configuration stores; ties count once."""
    import transformers

    headless = HEADLESS.get(config.model_type)
    with torch.device("meta"):
        if headless is None:
            model = transformers.AutoModelForCausalLM.from_config(config)
        else:
            model = getattr(transformers, headless)(config)
    tensors = model.state_dict(keep_vars=True).values()
    head = (
        config.vocab_size * config.hidden_size if headless and not getattr(config, "tie_word_embeddings", False) else 0
    )
    return head + sum({id(tensor): tensor.numel() for tensor in tensors}.values())


# Small models of every family, changed in what decides how many parameters there are.
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "vocab_size": 40,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}
SMALL_GQA = {**SMALL, "num_key_value_heads": 2}
SMALL_DEEPSEEK = {
    **SMALL,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 20,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_group": 1,
    "topk_group": 1,
}
SMALL_QWEN = {**SMALL_GQA, "moe_intermediate_size": 20, "num_experts": 4}
SMALL_QWEN2 = {**SMALL_QWEN, "shared_expert_intermediate_size": 28}
SMALL_NEXT = {
    **SMALL_QWEN2,
    "head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 3,
}
SMALL_LLAMA4 = {**SMALL_GQA, "num_local_experts": 4, "intermediate_size_mlp": 48, "attention_chunk_size": 8}
SMALL_GLM = {
    **SMALL_GQA,
    "moe_intermediate_size": 20,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "first_k_dense_replace": 2,
}
SMALL_LOCAL = {**SMALL_GQA, "num_local_experts": 4}
SMALL_GEMMA4 = {
    **{key: value for key, value in SMALL_GQA.items() if key != "num_experts_per_tok"},
    "enable_moe_block": True,
    "top_k_experts": 2,
    "num_experts": 4,
    "moe_intermediate_size": 20,
    "hidden_size_per_layer_input": 0,
    "head_dim": 12,
    "global_head_dim": 16,
    "sliding_window": 8,
}
SMALL_ERNIE = {
    **{key: value for key, value in SMALL_GQA.items() if key != "num_experts_per_tok"},
    "moe_k": 2,
    "moe_num_experts": 4,
    "moe_intermediate_size": 20,
    "moe_num_shared_experts": 2,
}
SMALL_SPARSE = {**SMALL_DEEPSEEK, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4}
SMALL_V4 = {
    **{key: value for key, value in SMALL.items() if key != "intermediate_size"},
    "head_dim": 16,
    "num_hidden_layers": 5,
    "num_key_value_heads": 1,
    "moe_intermediate_size": 20,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "q_lora_rank": 10,
    "o_groups": 2,
    "o_lora_rank": 6,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "index_topk": 4,
    "sliding_window": 8,
    "compress_ratios": [0, 4, 128, 4, 128, 0],
    "num_hash_layers": 2,
    "hc_mult": 3,
    "pad_token_id": 0,
}
SMALL_LONGCAT = {
    **{key: value for key, value in SMALL_DEEPSEEK.items() if key not in {"num_hidden_layers", "intermediate_size"}},
    "num_layers": 2,
    "ffn_hidden_size": 24,
    "expert_ffn_hidden_size": 20,
    "zero_expert_num": 0,  # of more transformers keeps matrices that it never uses
}
SMALL_NEMOTRON = {
    **{key: value for key, value in SMALL_GQA.items() if key != "num_hidden_layers"},
    "hybrid_override_pattern": "MEM*-EE",
    "head_dim": 12,
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "ssm_state_size": 10,
    "n_groups": 2,
    "conv_kernel": 3,
    "n_routed_experts": 4,
    "moe_intermediate_size": 20,
    "moe_shared_expert_intermediate_size": 28,
}
SMALL_JAMBA = {**SMALL_GQA, "num_experts": 4, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_d_state": 6}
KIMI_NAMES = {
    "n_routed_experts": "num_experts",
    "n_shared_experts": "num_shared_experts",
    "num_experts_per_tok": "num_experts_per_token",
}
PLAIN_KIMI = {**{KIMI_NAMES.get(key, key): value for key, value in SMALL_DEEPSEEK.items()}, "pad_token_id": 0}
SMALL_KIMI = {
    **PLAIN_KIMI,
    "linear_attn_config": {
        "full_attn_layers": [2, 4],
        "kda_layers": [1, 3],
        "head_dim": 6,
        "num_heads": 3,
        "short_conv_kernel_size": 3,
    },
}
SMALL_BAILING = {**PLAIN_KIMI, "head_dim": 4, "short_conv_kernel_size": 3, "layer_group_size": 2}
SMALL_MIMO = {
    **SMALL_GQA,
    "n_routed_experts": 4,
    "moe_intermediate_size": 20,
    "head_dim": 12,
    "v_head_dim": 8,
    "sliding_window_size": 7,
    "num_key_value_heads": 1,
}
SMALL_HUNYUAN = {
    **{key: value for key, value in SMALL_GQA.items() if key != "num_experts_per_tok"},
    "num_experts": 4,
    "moe_topk": 4 * [2],
    "head_dim": 12,
}
SMALL_STEP = {**SMALL_GQA, "head_dim": 12, "n_routed_experts": 4, "moe_intermediate_size": 20, "share_expert_dim": 28}
VARIANTS = [
    ("mixtral", SMALL_LOCAL, {}),
    ("mixtral", SMALL_LOCAL, {"head_dim": 12, "tie_word_embeddings": True}),
    ("qwen2_moe", SMALL_QWEN2, {}),
    ("qwen2_moe", SMALL_QWEN2, {"qkv_bias": False, "tie_word_embeddings": True, "head_dim": 12}),
    ("qwen3_moe", SMALL_QWEN, {"attention_bias": True, "head_dim": 12}),
    ("qwen3_moe", SMALL_QWEN, {"mlp_only_layers": [0, 1, 9]}),
    ("qwen3_moe", SMALL_QWEN, {"mlp_only_layers": [1], "decoder_sparse_step": 2}),
    ("qwen3_next", SMALL_NEXT, {}),
    ("qwen3_next", SMALL_NEXT, {"attention_bias": True, "mlp_only_layers": [2], "full_attention_interval": 2}),
    ("qwen3_next", SMALL_NEXT, {"layer_types": ["full_attention", *3 * ["linear_attention"]]}),
    ("deepseek_v2", SMALL_DEEPSEEK, {}),
    ("deepseek_v2", SMALL_DEEPSEEK, {"q_lora_rank": None, "attention_bias": True}),
    ("deepseek_v3", SMALL_DEEPSEEK, {"attention_bias": True}),
    ("deepseek_v3", SMALL_DEEPSEEK, {"n_shared_experts": 3, "first_k_dense_replace": 0}),
    ("deepseek_v3", SMALL_DEEPSEEK, {"q_lora_rank": None, "tie_word_embeddings": True}),
    ("gpt_oss", {**SMALL_LOCAL, "sliding_window": 8}, {}),
    ("gpt_oss", {**SMALL_LOCAL, "sliding_window": 8}, {"attention_bias": False, "head_dim": 12}),
    ("llama4_text", SMALL_LLAMA4, {}),
    ("llama4_text", SMALL_LLAMA4, {"attention_bias": True, "moe_layers": [2, 3]}),
    ("llama4_text", SMALL_LLAMA4, {"interleave_moe_layer_step": 2}),
    ("llama4_text", SMALL_LLAMA4, {"moe_layers": [0, 3]}),
    ("glm4_moe", SMALL_GLM, {}),
    ("glm4_moe", SMALL_GLM, {"attention_bias": True, "use_qk_norm": True, "head_dim": 12}),
    ("phimoe", SMALL_LOCAL, {}),
    ("phimoe", SMALL_LOCAL, {"attention_bias": True, "lm_head_bias": True, "head_dim": 12}),
    ("olmoe", {**SMALL_GQA, "num_experts": 4}, {}),
    ("olmoe", {**SMALL_GQA, "num_experts": 4}, {"attention_bias": True}),
    ("qwen3_vl_moe_text", SMALL_QWEN, {"mlp_only_layers": [1]}),
    ("qwen3_omni_moe_text", SMALL_QWEN, {}),
    ("qwen3_5_moe_text", SMALL_NEXT, {"attention_bias": True}),
    ("glm4_moe_lite", SMALL_DEEPSEEK, {}),
    ("glm4_moe_lite", SMALL_DEEPSEEK, {"mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]}),
    ("minimax_m2", {**SMALL_LOCAL, "head_dim": 12}, {}),
    ("gemma4_text", SMALL_GEMMA4, {}),
    ("gemma4_text", SMALL_GEMMA4, {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "attention_bias": True}),
    ("gemma4_text", SMALL_GEMMA4, {"tie_word_embeddings": False, "layer_types": 4 * ["sliding_attention"]}),
    ("granitemoe", SMALL_LOCAL, {}),
    ("granitemoe", SMALL_LOCAL, {"attention_bias": True, "tie_word_embeddings": True}),
    ("deepseek_v32", SMALL_SPARSE, {}),
    ("glm_moe_dsa", SMALL_SPARSE, {"attention_bias": True, "indexer_types": ["full", "shared", "full", "shared"]}),
    ("glm_moe_dsa", SMALL_SPARSE, {"index_topk_freq": 2, "index_skip_topk_offset": 1}),
    ("deepseek_v4", SMALL_V4, {}),
    ("deepseek_v4", SMALL_V4, {"compress_ratios": None, "num_hash_layers": 0}),
    ("longcat_flash", SMALL_LONGCAT, {"attention_bias": True}),
    ("nemotron_h", SMALL_NEMOTRON, {}),
    ("nemotron_h", SMALL_NEMOTRON, {"moe_latent_size": 16, "mlp_bias": True, "use_bias": True, "use_conv_bias": False}),
    ("jamba", SMALL_JAMBA, {}),
    ("jamba", SMALL_JAMBA, {"mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_dt_rank": 5}),
    ("kimi_linear", SMALL_KIMI, {}),
    ("kimi_linear", PLAIN_KIMI, {"q_lora_rank": None, "linear_num_heads": 3}),
    ("bailing_hybrid", SMALL_BAILING, {"q_lora_rank": None}),
    ("dots1", SMALL_GLM, {"attention_bias": True}),
    ("hunyuan_v1_moe", SMALL_HUNYUAN, {"attention_bias": True}),
    ("mimo_v2_flash", SMALL_MIMO, {"attention_bias": True}),
    ("mimo_v2_flash", SMALL_MIMO, {"mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]}),
    ("step3p5", SMALL_STEP, {"layer_types": ["full_attention", *3 * ["sliding_attention"]], "sliding_window": 8}),
    (
        "step3p5",
        SMALL_STEP,
        {
            "layer_types": 4 * ["sliding_attention"],
            "sliding_window": 8,
            "moe_layers_enum": "1,2",
            "attention_other_setting": {"num_attention_heads": 6},
        },
    ),
    ("ernie4_5_moe", SMALL_ERNIE, {}),
    ("ernie4_5_moe", SMALL_ERNIE, {"use_bias": True, "tie_word_embeddings": False, "moe_layer_end_index": 2}),
    ("ernie4_5_moe", SMALL_ERNIE, {"use_bias": True, "moe_num_shared_experts": 0, "moe_layer_interval": 2}),
]
WINDOWED = [
    ("mixtral", SMALL_LOCAL, {"sliding_window": 8}),
    ("mixtral", SMALL_LOCAL, {"sliding_window": 64}),
    ("phimoe", SMALL_LOCAL, {"sliding_window": 8}),
    ("qwen3_moe", SMALL_QWEN, {"sliding_window": 8, "use_sliding_window": True}),
    ("qwen3_moe", SMALL_QWEN, {"sliding_window": 8}),
    ("qwen2_moe", SMALL_QWEN2, {"sliding_window": 8, "use_sliding_window": True}),
    ("qwen2_moe", SMALL_QWEN2, {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}),
    ("qwen2_moe", SMALL_QWEN2, {"sliding_window": 8, "use_sliding_window": False}),
    ("gpt_oss", SMALL_LOCAL, {"sliding_window": 8, "head_dim": 8}),
    (
        "gpt_oss",
        SMALL_LOCAL,
        {
            "sliding_window": 8,
            "head_dim": 8,
            "layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ),
    ("llama4_text", SMALL_LLAMA4, {"head_dim": 8}),
    ("llama4_text", SMALL_LLAMA4, {"head_dim": 8, "no_rope_layers": [0, 1, 1, 0]}),
    ("llama4_text", SMALL_LLAMA4, {"head_dim": 8, "no_rope_layer_interval": 2}),
    ("olmoe", {**SMALL_GQA, "num_experts": 4}, {}),
    ("deepseek_v3", SMALL_DEEPSEEK, {}),
    ("gemma4_text", SMALL_GEMMA4, {}),
    ("mimo_v2_flash", SMALL_MIMO, {}),
]
