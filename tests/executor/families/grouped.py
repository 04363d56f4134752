"""Tiny models with grouped-query attention over all tokens in every layer."""

from typing import Any

from tests.executor.families.tiny import SIZES, Tensors, causal


def qwen3_vl() -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    sizes = {**SIZES, "num_hidden_layers": 2, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e4}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "deepstack_visual_indexes": [0],
    }
    text = {**sizes, "head_dim": 16, "rope_parameters": rope}
    config = AutoConfig.for_model(
        "qwen3_vl_moe", text_config=text, vision_config=vision, tie_word_embeddings=SIZES["tie_word_embeddings"]
    )
    return AutoModelForImageTextToText.from_config(config)


def transposed_experts(tensors: Tensors) -> Tensors:
    return {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor for name, tensor in tensors.items()
    }


EXPERTS = {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2}
GROUPED = {
    "qwen2_moe": causal("qwen2_moe", **EXPERTS, shared_expert_intermediate_size=20),
    "qwen2_moe dense": causal(
        "qwen2_moe",
        **EXPERTS,
        shared_expert_intermediate_size=20,
        norm_topk_prob=True,
        qkv_bias=False,
        decoder_sparse_step=2,
        tie_word_embeddings=True,
    ),
    "qwen3_moe": causal("qwen3_moe", **EXPERTS, head_dim=12, norm_topk_prob=True, mlp_only_layers=[1]),
    "qwen3_moe biased": causal(
        "qwen3_moe",
        **EXPERTS,
        attention_bias=True,
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4},
    ),
    "qwen3_vl_moe_text": qwen3_vl,
    "olmoe": causal("olmoe", num_experts=6, num_experts_per_tok=2, clip_qkv=0.8),
}
GROUPED_OTHERWISE = {"qwen3_vl_moe_text": transposed_experts}
