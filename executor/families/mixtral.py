"""Mixtral: RMS norm, separate query, key and value projections, one tensor per expert matrix.

Or as transformers 5 names its own parameters, with all experts of a layer in two tensors.
"""

from typing import Final

from executor.families.base import SILU, Family, grouped_query, rope_theta
from executor.model import Architecture, FeedForward, GroupedQuery, LayerMaths, Norm, Rotary
from hrm.layers import Layer
from hrm.model_spec import Keys, ModelSpec


def _options(keys: Keys, spec: ModelSpec) -> Architecture:
    keys.word("hidden_act", SILU, default="silu")
    norm = Norm(eps=keys.number("rms_norm_eps", default=1e-5))
    theta = rope_theta(keys, default=1e6)
    ffn = FeedForward(norm=norm, experts_per_token=spec.experts_per_token)

    def maths(layer: Layer) -> LayerMaths:
        block = grouped_query(layer)
        return LayerMaths(
            mixer=GroupedQuery(block=block, norm=norm, rotary=Rotary.plain(block.head_dim, theta)), ffn=ffn
        )

    return Architecture.of(
        spec,
        maths,
        final_norm=norm,
        max_position_embeddings=int(keys.number("max_position_embeddings", default=131_072)),
    )


MIXTRAL: Final = Family(
    outside={"embedding": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "lm_head": "lm_head.weight"},
    layer="model.layers.{layer}.",
    names={
        "attention_norm": "input_layernorm.weight",
        "qkv": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "output": "self_attn.o_proj.weight",
        "ffn_norm": "post_attention_layernorm.weight",
        "router": "block_sparse_moe.gate.weight",
        "w13": ("block_sparse_moe.experts.{expert}.w1.weight", "block_sparse_moe.experts.{expert}.w3.weight"),
        "w2": "block_sparse_moe.experts.{expert}.w2.weight",
    },
    otherwise=({"router": "mlp.gate.weight", "w13": "mlp.experts.gate_up_proj", "w2": "mlp.experts.down_proj"},),
    options=_options,
    published={
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 32_768,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
