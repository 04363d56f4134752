"""Qwen's models of attention over all tokens and routed experts in most layers, and OLMoE.

Of multimodal models it is the part that reads text.
"""

from typing import Final

from executor.families.base import SILU, Family, decoder
from executor.families.names import ATTENTION, FUSED, GATE_UP_DOWN, GATED_SHARED
from executor.families.rope import Rope
from executor.families.stored import Stored
from executor.model import Architecture, Norm, Router
from hrm.model_spec import Keys, ModelSpec

NORM_CHOSEN: Final = "norm_topk_prob"
NORM_EPS: Final = "rms_norm_eps"


def _decoder(
    keys: Keys, spec: ModelSpec, rope: Rope, *, eps: float, normed: bool, clip: float | None = None
) -> Architecture:
    """With weights of the chosen experts that sum to one if they are `normed`."""
    keys.word("hidden_act", SILU, default="silu")
    norm, router = Norm(eps=keys.number(NORM_EPS, default=eps)), Router(norm=1.0 if normed else None)
    return decoder(spec, norm=norm, head_norm=norm, rope=rope, router=router, clip=clip)


def _qwen(keys: Keys, spec: ModelSpec) -> Architecture:
    rope = Rope.read(keys, theta=10_000.0, positions=32_768)
    return _decoder(keys, spec, rope, eps=1e-6, normed=keys.truth(NORM_CHOSEN))


def _qwen3_vl(keys: Keys, spec: ModelSpec) -> Architecture:
    """Always normed, whatever the config says, as in transformers."""
    return _decoder(keys, spec, Rope.read(keys, theta=500_000.0, positions=128_000), eps=1e-6, normed=True)


def _olmoe(keys: Keys, spec: ModelSpec) -> Architecture:
    rope, clip = Rope.read(keys, theta=10_000.0, positions=4096), "clip_qkv"
    bound = None if keys.get(clip) is None else keys.number(clip)
    return _decoder(keys, spec, rope, eps=1e-5, normed=keys.truth(NORM_CHOSEN), clip=bound)


QWEN3: Final = Family(
    names={**ATTENTION, **GATE_UP_DOWN},
    otherwise=(FUSED,),
    options=_qwen,
    published={
        NORM_CHOSEN: True,
        NORM_EPS: 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 40_960,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
    },
)
QWEN3_VL: Final = Family(
    # All experts of a layer in two tensors, as the first models of the kind were stored: transposed.
    names={
        **ATTENTION,
        **GATE_UP_DOWN,
        "w13": Stored(("mlp.experts.gate_up_proj",), transposed=True),
        "w2": Stored(("mlp.experts.down_proj",), transposed=True),
    },
    otherwise=({"w13": GATE_UP_DOWN["w13"], "w2": GATE_UP_DOWN["w2"]},),
    options=_qwen3_vl,
    published={
        NORM_EPS: 1e-6,
        "rope_theta": 5e6,
        "max_position_embeddings": 262_144,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
    },
)
QWEN2: Final = Family(
    names={**ATTENTION, **GATE_UP_DOWN, **GATED_SHARED},
    otherwise=(FUSED,),
    options=_qwen,
    published={
        NORM_CHOSEN: False,
        NORM_EPS: 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 131_072,
        "bos_token_id": 151_643,
        "eos_token_id": 151_643,
    },
)
OLMOE: Final = Family(
    names={**ATTENTION, **GATE_UP_DOWN},
    otherwise=(FUSED,),
    options=_olmoe,
    published={NORM_CHOSEN: False, NORM_EPS: 1e-5, "max_position_embeddings": 4096, "eos_token_id": 50_279},
)
