"""Tiny models most of whose layers keep a state of each sequence."""

from typing import Any, Final

from tests.executor.families.tiny import SIZES, causal

EXPERTS: Final[dict[str, Any]] = {
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}
DELTA: Final[dict[str, Any]] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 3,
}


def _with_pictures() -> Any:
    """Of which the text part alone is run."""
    from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    text = {**SIZES, **EXPERTS, **DELTA, "head_dim": 16, "full_attention_interval": 2}
    return Qwen3_5MoeForConditionalGeneration(Qwen3_5MoeConfig(text_config=text, vision_config=vision))


LINEAR: Final = {
    "qwen3_next": causal(
        "qwen3_next",
        **EXPERTS,
        **DELTA,
        head_dim=16,
        num_hidden_layers=4,
        full_attention_interval=3,
        mlp_only_layers=[1],
        attention_bias=True,
        norm_topk_prob=False,
    ),
    "qwen3_5_moe_text": causal("qwen3_5_moe_text", **EXPERTS, **DELTA, head_dim=16, full_attention_interval=2),
    "qwen3_5_moe_text with pictures": _with_pictures,
}
