"""GLM-4.5 to 4.7: half of each head turns, and experts are chosen by sigmoids with corrections."""

from typing import Final

from executor.families.base import SILU, Family, decoder
from executor.families.deepseek import corrected_router
from executor.families.names import ATTENTION, FUSED, GATE_UP_DOWN
from executor.families.rope import Rope
from executor.model import Architecture, Norm
from hrm.model_spec import Keys, ModelSpec


def _options(keys: Keys, spec: ModelSpec) -> Architecture:
    keys.word("hidden_act", SILU, default="silu")
    norm = Norm(eps=keys.number("rms_norm_eps", default=1e-5))
    return decoder(
        spec,
        norm=norm,
        head_norm=norm,
        rope=Rope.read(keys, theta=10_000.0, positions=131_072, partial=0.5),
        router=corrected_router(keys, spec, groups=1, chosen=1, scale=1.0),
    )


GLM4: Final = Family(
    names={**ATTENTION, **GATE_UP_DOWN},
    otherwise=(FUSED,),
    options=_options,
    published={
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 131_072,
        "routed_scaling_factor": 1.0,
        "eos_token_id": [151_329, 151_336, 151_338],
    },
)
