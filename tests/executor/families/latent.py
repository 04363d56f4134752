"""Tiny models with latent attention."""

from typing import Any, Final

from tests.executor.families import tiny
from tests.executor.families.tiny import causal

SIZES: Final[dict[str, Any]] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.7,
}
YARN: Final = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "mscale": 0.8,
    "mscale_all_dim": 0.6,
}


def kimi_k2() -> Any:
    """Moonshot's own code is DeepSeek-V3's, and its configs say that they are of another type."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    class KimiK2Config(DeepseekV3Config):
        model_type = "kimi_k2"

    return DeepseekV3ForCausalLM(KimiK2Config(**{**tiny.SIZES, **SIZES, "n_group": 1, "topk_group": 1}))


LATENT = {
    "kimi_k2": kimi_k2,
    "deepseek_v2": causal("deepseek_v2", **SIZES, topk_method="group_limited_greedy", rope_parameters=YARN),
    "deepseek_v2 as Lite": causal("deepseek_v2", **{**SIZES, "q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "deepseek_v3": causal("deepseek_v3", **SIZES, num_hidden_layers=3, rope_parameters=YARN),
    "deepseek_v3 with biases": causal("deepseek_v3", **SIZES, attention_bias=True, rope_interleave=False),
    "glm4_moe_lite": causal(
        "glm4_moe_lite", **{**SIZES, "v_head_dim": 24, "n_group": 1, "topk_group": 1}, norm_topk_prob=False
    ),
}
