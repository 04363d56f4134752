"""Tiny models that attend within windows or chunks, or to sinks."""

from typing import Any

from tests.executor.families.tiny import SIZES, VOCAB, causal

ROPE_PARAMETERS = {
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e3, "factor": 2.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
}
GEMMA4 = {
    "enable_moe_block": True,
    "hidden_size_per_layer_input": 0,
    "num_experts": 6,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
    "head_dim": 12,
    "global_head_dim": 16,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "sliding_window": 7,
    "final_logit_softcapping": 4.0,
    "vocab_size_per_layer_input": VOCAB,
}


def gemma4() -> Any:
    """As published: values from keys, and the text in a model that sees as well."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = {**SIZES, **GEMMA4, "tie_word_embeddings": True, "use_bidirectional_attention": "vision"}
    text |= {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "patch_size": 4,
        "position_embedding_size": 8,
    }
    config = AutoConfig.for_model("gemma4", text_config=text, vision_config=vision, audio_config=None)
    return AutoModelForImageTextToText.from_config(config)


LLAMA4 = {
    "head_dim": 16,
    "intermediate_size_mlp": 48,
    "num_local_experts": 5,
    "num_hidden_layers": 4,
    "no_rope_layer_interval": 3,
    "attention_chunk_size": 7,
    "floor_scale": 6,
    "attn_scale": 0.7,
}
# So that some of the frequencies are slowed down.
SCOUT_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 32,
}


def llama4() -> Any:
    """With pictures as published, dense layers in between, and biases."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    text = {**SIZES, **LLAMA4, "num_experts_per_tok": 2, "interleave_moe_layer_step": 2, "use_qk_norm": False}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
        "vision_output_dim": 16,
        "projector_input_dim": 16,
        "projector_output_dim": 16,
    }
    text |= {"attention_bias": True, "no_rope_layers": [1, 0, 0, 1]}
    config = AutoConfig.for_model("llama4", text_config=text, vision_config=vision)
    return AutoModelForImageTextToText.from_config(config)


WINDOWED = {
    "gpt_oss": causal(
        "gpt_oss",
        head_dim=16,
        num_local_experts=6,
        num_experts_per_tok=2,
        num_hidden_layers=4,
        sliding_window=7,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 32,
        },
    ),
    "llama4_text": causal("llama4_text", **LLAMA4, num_experts_per_tok=1, rope_parameters=SCOUT_ROPE),
    "llama4_text maverick": llama4,
    "gemma4_text": gemma4,
    "gemma4_text biased": causal("gemma4_text", **GEMMA4, attention_bias=True, rope_parameters=ROPE_PARAMETERS),
    "mixtral with windows": causal("mixtral", sliding_window=9, num_local_experts=4),
}
