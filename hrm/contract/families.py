"""Which families the executor runs, by the `model_type` of their config's text part; others may be added."""

from typing import Final

EXECUTED_FAMILIES: Final = [
    "mixtral",
    "dbrx",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_vl_moe_text",
    "olmoe",
    "glm4_moe",
    "minimax_m2",
    "ernie4_5_moe",
    "granitemoe",
    "phimoe",
    "deepseek_v2",
    "deepseek_v3",
    "kimi_k2",
    "glm4_moe_lite",
    # with windows, chunks or sinks
    "gpt_oss",
    "llama4_text",
    "gemma4_text",
    # with the gated delta rule
    "qwen3_next",
    "qwen3_5_moe_text",
]
