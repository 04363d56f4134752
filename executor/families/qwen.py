"""Qwen's models of attention over all tokens and routed experts in most layers."""

from typing import Final

from executor.families.base import SILU, Family, decoder
from executor.families.names import ATTENTION, FUSED, GATE_UP_DOWN, LAYER, OUTSIDE
from executor.families.rope import Rope
from executor.model import Architecture, Norm, Router
from hrm.model_spec import Keys, ModelSpec

RMS_EPS: Final = 1e-6  # of all Qwens, where the config does not say


def _options(keys: Keys, spec: ModelSpec) -> Architecture:
    """Qwen3's, whose queries and keys have a norm of each head."""
    keys.word("hidden_act", SILU, default="silu")
    norm = Norm(eps=keys.number("rms_norm_eps", default=RMS_EPS))
    return decoder(
        spec,
        norm=norm,
        rope=Rope.read(keys, theta=10_000.0, positions=32_768),
        head_norm=norm,
        router=Router(norm=1.0 if keys.truth("norm_topk_prob") else None),
    )


QWEN3: Final = Family(
    outside=OUTSIDE,
    layer=LAYER,
    names={**ATTENTION, **GATE_UP_DOWN},
    otherwise=(FUSED,),
    options=_options,
    published={
        "norm_topk_prob": True,
        "rms_norm_eps": RMS_EPS,
        "rope_theta": 1e6,
        "max_position_embeddings": 40_960,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
    },
)
