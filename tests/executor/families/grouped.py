"""Tiny models with grouped-query attention over all tokens in every layer."""

from tests.executor.families.tiny import causal

GROUPED = {
    "qwen3_moe": causal(
        "qwen3_moe",
        head_dim=12,
        moe_intermediate_size=24,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    )
}
