"""Tiny models with grouped-query attention over all tokens in every layer."""

from typing import Any

import torch

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
GLM = {"moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3}
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
    "glm4_moe": causal(
        "glm4_moe",
        **GLM,
        head_dim=16,
        attention_bias=True,
        use_qk_norm=True,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        n_shared_experts=2,
    ),
    "glm4_moe air": causal("glm4_moe", **GLM, norm_topk_prob=False),
    "minimax_m2": causal("minimax_m2", num_local_experts=6, num_experts_per_tok=2, head_dim=16, rotary_dim=8),
    "ernie4_5_moe": causal(
        "ernie4_5_moe",
        moe_num_experts=6,
        moe_k=2,
        moe_intermediate_size=24,
        moe_num_shared_experts=1,
        moe_layer_interval=1,
    ),
}
GROUPED["granitemoe"] = causal(
    "granitemoe",
    num_local_experts=6,
    num_experts_per_tok=2,
    embedding_multiplier=3.0,
    logits_scaling=1.5,
    residual_multiplier=0.4,
    attention_multiplier=0.25,
    tie_word_embeddings=True,
)
# Weights of experts differ from one only where others' logits are near, which more jitter calls more of.
PHI = {"num_local_experts": 6, "num_experts_per_tok": 2, "router_jitter_noise": 0.4}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.5, 2.0],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "short_mscale": 1.2,
    "long_mscale": 1.3,
    "original_max_position_embeddings": 128,
}
GROUPED["phimoe"] = causal("phimoe", **PHI, attention_bias=True, lm_head_bias=True, rope_parameters=LONGROPE)
GROUPED["phimoe fused"] = causal("phimoe", **PHI, tie_word_embeddings=True)


def fused_phi(tensors: Tensors) -> Tensors:
    """As transformers 5 names its own parameters."""
    fused = {
        name.replace("block_sparse_moe.gate", "mlp.router"): tensor
        for name, tensor in tensors.items()
        if ".experts." not in name
    }
    for layer in range(SIZES["num_hidden_layers"]):
        of_layer = f"model.layers.{layer}.block_sparse_moe.experts."
        w1, w2, w3 = (
            torch.stack([tensors[f"{of_layer}{expert}.{name}.weight"] for expert in range(PHI["num_local_experts"])])
            for name in ("w1", "w2", "w3")
        )
        ours = f"model.layers.{layer}.mlp.experts."
        fused |= {f"{ours}gate_up_proj": torch.cat([w1, w3], 1), f"{ours}down_proj": w2}
    return fused


GROUPED_OTHERWISE = {"qwen3_vl_moe_text": transposed_experts, "phimoe fused": fused_phi}
