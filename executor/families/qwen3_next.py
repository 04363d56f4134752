"""Qwen3-Next and Qwen3.5-MoE: three layers with the gated delta rule to one of gated attention.

All norms are stored around zero, but for the one of the delta rule's output.
"""

from typing import Any, Final

import torch

from executor.families.base import SILU, Family, grouped_query
from executor.families.names import ATTENTION, FUSED, GATE_UP_DOWN, GATED_SHARED
from executor.families.rope import Rope
from executor.families.stored import Names, Stored, StoredRows, grouped, in_order
from executor.model import Architecture, FeedForward, GatedDelta, GroupedQuery, LayerMaths, Norm, Router
from hrm.layers import GatedDeltaNet, GroupedQueryAttention, Layer, TensorSpec
from hrm.model_spec import Keys, ModelSpec

RMS_EPS: Final = 1e-6  # where the config does not say
NORMALISED: Final = "norm_topk_prob"


def _options(keys: Keys, spec: ModelSpec) -> Architecture:
    keys.word("hidden_act", SILU, default="silu")
    eps = keys.number("rms_norm_eps", default=RMS_EPS)
    norm, rope = Norm(eps=eps, offset=1.0), Rope.read(keys, theta=10_000.0, positions=32_768, partial=0.25)
    router = Router(norm=1.0 if keys.truth(NORMALISED, default=True) else None)
    ffn = FeedForward(norm=norm, router=router, experts_per_token=spec.experts_per_token)

    def maths(layer: Layer, rope: Rope) -> LayerMaths:
        if isinstance(layer.mixer, GatedDeltaNet):
            return LayerMaths(mixer=GatedDelta(block=layer.mixer, norm=norm, output_norm=Norm(eps=eps)), ffn=ffn)
        block = grouped_query(layer)
        mixer = GroupedQuery(block=block, norm=norm, rotary=rope.rotary(block.head_dim), head_norm=norm)
        return LayerMaths(mixer=mixer, ffn=ffn)

    return rope.architecture(spec, maths, final_norm=norm)


def _gate_by_head(block: GroupedQueryAttention, _: TensorSpec) -> StoredRows:
    """Queries, their gate, keys and values, where each head's gate follows its queries."""
    kv = in_order(block.kv_size)
    return StoredRows.of(grouped(block.num_heads, block.head_dim, block.head_dim), kv, kv)


def _without_gate(block: GroupedQueryAttention, tensor: TensorSpec) -> StoredRows:
    """The same for their biases, of which the gate's is another tensor."""
    rows, queries = _gate_by_head(block, tensor), block.query_size
    return StoredRows(rows.sizes, torch.cat([rows.order[:queries], rows.order[2 * queries :]]))


def _gate_alone(block: GroupedQueryAttention, tensor: TensorSpec) -> StoredRows:
    rows, queries = _gate_by_head(block, tensor), block.query_size
    return StoredRows(rows.sizes[:1], rows.order[queries : 2 * queries])


def _by_key_head(block: GatedDeltaNet, _: TensorSpec) -> StoredRows:
    """Queries, keys, values and gate in one matrix, steps and decays in another, each by key head."""
    keys, shared = block.num_key_heads, block.num_value_heads // block.num_key_heads
    values = shared * block.value_head_dim
    step, decay = grouped(keys, shared, shared).chunk(2)
    return StoredRows.of(
        grouped(keys, block.key_head_dim, block.key_head_dim, values, values), torch.cat([decay, step])
    )


_BIASES: Final = ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")
_NAMES: Final[Names] = {
    **ATTENTION,
    **GATE_UP_DOWN,
    "qkv": Stored(
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"), rows=_gate_by_head
    ),
    "qkv_bias": Stored(_BIASES, rows=_without_gate),
    "gate_bias": Stored(_BIASES[:1], rows=_gate_alone),
    **GATED_SHARED,
}
_DELTA: Final[Names] = {
    "convolution": "linear_attn.conv1d.weight",
    "decay": "linear_attn.A_log",
    "step_bias": "linear_attn.dt_bias",
    "output_norm": "linear_attn.norm.weight",
    "output": "linear_attn.out_proj.weight",
}
_SEPARATE: Final = tuple(f"linear_attn.in_proj_{name}.weight" for name in ("qkv", "z", "a", "b"))
_TOGETHER: Final = ("linear_attn.in_proj_qkvz.weight", "linear_attn.in_proj_ba.weight")


def _family(projections: tuple[str, ...] | Stored, **published: Any) -> Family:
    return Family(
        names=_NAMES,
        kinds={GatedDeltaNet: {**_DELTA, "projections": projections}},
        otherwise=(FUSED,),
        options=_options,
        published={"rms_norm_eps": RMS_EPS, "rope_theta": 1e7, "max_position_embeddings": 262_144, **published},
    )


QWEN3_NEXT: Final = _family(Stored(_TOGETHER, rows=_by_key_head), bos_token_id=151_643, eos_token_id=151_645)
QWEN3_5: Final = _family(_SEPARATE, eos_token_id=248_044)
