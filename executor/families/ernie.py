"""ERNIE-4.5: neighbours in a head turn together, and softmax scores are corrected for the choice of experts."""

from typing import Final

from executor.families.base import SILU, Family, decoder
from executor.families.names import ATTENTION, FUSED, GATE_UP_DOWN
from executor.families.rope import OTHER_MODEL, Rope
from executor.model import Architecture, Norm
from hrm.model_spec import Keys, ModelSpec


def _options(keys: Keys, spec: ModelSpec) -> Architecture:
    keys.word("hidden_act", SILU, default="silu")
    if keys.truth("use_bias"):
        raise keys.refusal("use_bias", "must be false, as in all published models", OTHER_MODEL)
    if keys.number("moe_norm_min", default=1e-12) > 1e-6:
        raise keys.refusal("moe_norm_min", "must be so small that it never counts", OTHER_MODEL)
    return decoder(
        spec,
        norm=Norm(eps=keys.number("rms_norm_eps", default=1e-5)),
        rope=Rope.read(keys, theta=500_000.0, positions=131_072),
        interleaved=True,
    )


ERNIE_4_5: Final = Family(
    names={**ATTENTION, **GATE_UP_DOWN, "score_correction": "mlp.moe_statics.e_score_correction_bias"},
    otherwise=({**FUSED, "score_correction": "mlp.gate.moe_statics.e_score_correction_bias"},),
    options=_options,
    published={
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "max_position_embeddings": 131_072,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
