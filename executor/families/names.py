"""What most checkpoints of transformers call their tensors; families take these and add what differs.

Names of tensors that a family lacks do no harm: only those that its blocks have are looked up.
"""

from typing import Final

from executor.families.stored import Names

OUTSIDE: Final = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "final_norm_bias": "model.norm.bias",
    "lm_head": "lm_head.weight",
    "lm_head_bias": "lm_head.bias",
}
LAYER: Final = "model.layers.{layer}."

ATTENTION: Final[Names] = {
    "attention_norm": "input_layernorm.weight",
    "attention_norm_bias": "input_layernorm.bias",
    "qkv": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "qkv_bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "query_norm": "self_attn.q_norm.weight",
    "key_norm": "self_attn.k_norm.weight",
    "output": "self_attn.o_proj.weight",
    "output_bias": "self_attn.o_proj.bias",
    "ffn_norm": "post_attention_layernorm.weight",
    "ffn_norm_bias": "post_attention_layernorm.bias",
}
# Experts by Mixtral's names, and by those that most others have.
W1_W2_W3: Final[Names] = {
    "router": "block_sparse_moe.gate.weight",
    "w13": ("block_sparse_moe.experts.{expert}.w1.weight", "block_sparse_moe.experts.{expert}.w3.weight"),
    "w2": "block_sparse_moe.experts.{expert}.w2.weight",
}
GATE_UP_DOWN: Final[Names] = {
    "router": "mlp.gate.weight",
    "w13": ("mlp.experts.{expert}.gate_proj.weight", "mlp.experts.{expert}.up_proj.weight"),
    "w2": "mlp.experts.{expert}.down_proj.weight",
    "dense_w13": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "dense_w2": "mlp.down_proj.weight",
    "score_correction": "mlp.gate.e_score_correction_bias",
    "shared_w13": ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
    "shared_w2": "mlp.shared_experts.down_proj.weight",
}
# A shared expert that a gate of its own scales, as Qwen names them.
GATED_SHARED: Final[Names] = {
    "shared_gate": "mlp.shared_expert_gate.weight",
    "shared_w13": ("mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"),
    "shared_w2": "mlp.shared_expert.down_proj.weight",
}
# As transformers 5 names its own parameters, with all experts of a layer in two tensors.
FUSED: Final[Names] = {"router": "mlp.gate.weight", "w13": "mlp.experts.gate_up_proj", "w2": "mlp.experts.down_proj"}
