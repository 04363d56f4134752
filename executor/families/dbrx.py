"""DBRX: LayerNorm, one clipped query/key/value projection, all experts of a layer in one tensor."""

from typing import Final

from executor.families.base import SILU, Family, decoder
from executor.families.rope import Rope
from executor.families.stored import Stored
from executor.model import Architecture, Norm, NormKind, Router
from hrm.model_spec import Keys, ModelSpec

LAYER_NORM_EPS: Final = 1e-5  # torch's default, which the published code relies on
CLIP, ROUTER_NORM = "clip_qkv", "moe_normalize_expert_weights"


def _options(keys: Keys, spec: ModelSpec) -> Architecture:
    attention, ffn = keys.section("attn_config"), keys.section("ffn_config")
    if isinstance(ffn.get("ffn_act_fn"), dict):
        ffn.section("ffn_act_fn").word("name", SILU, default="silu")
    else:
        ffn.word("ffn_act_fn", SILU, default="silu")
    norm = Norm(kind=NormKind.LAYER, eps=LAYER_NORM_EPS)
    clip = None if attention.get(CLIP) is None else attention.number(CLIP)
    router = Router(norm=None if ffn.is_null(ROUTER_NORM) else ffn.number(ROUTER_NORM, default=1.0))
    return decoder(
        spec,
        norm=norm,
        rope=Rope.read(keys, theta=10_000.0, positions=keys.integer("max_seq_len", default=2048)),
        router=router,
        clip=clip,
    )


DBRX: Final = Family(
    outside={
        "embedding": "transformer.wte.weight",
        "final_norm": "transformer.norm_f.weight",
        "lm_head": "lm_head.weight",
    },
    layer="transformer.blocks.{layer}.",
    names={
        "attention_norm": "norm_attn_norm.norm_1.weight",
        "qkv": "norm_attn_norm.attn.Wqkv.weight",
        "output": "norm_attn_norm.attn.out_proj.weight",
        "ffn_norm": "norm_attn_norm.norm_2.weight",
        "router": "ffn.router.layer.weight",
        "w13": Stored(("ffn.experts.mlp.w1", "ffn.experts.mlp.v1"), flat=True),
        "w2": Stored(("ffn.experts.mlp.w2",), flat=True, transposed=True),
    },
    options=_options,
    published={
        "attn_config": {CLIP: 8.0, "rope_theta": 5e5},
        "ffn_config": {ROUTER_NORM: 1.0},
        "max_seq_len": 32_768,
        "eos_token_id": 100_257,
    },
)
