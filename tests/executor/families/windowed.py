"""Tiny models that attend within windows or chunks, or to sinks."""

from tests.executor.families.tiny import causal

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
    "mixtral with windows": causal("mixtral", sliding_window=9, num_local_experts=4),
}
