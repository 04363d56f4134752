"""Mixtral: RMS norm, separate query, key and value projections, one tensor per expert matrix.

Or as transformers 5 names its own parameters, with all experts of a layer in two tensors.
"""

from typing import Final

from executor.families.base import SILU, Family, decoder
from executor.families.names import ATTENTION, FUSED, W1_W2_W3
from executor.families.rope import Rope
from executor.model import Architecture, Norm
from hrm.model_spec import Keys, ModelSpec


def _options(keys: Keys, spec: ModelSpec) -> Architecture:
    keys.word("hidden_act", SILU, default="silu")
    return decoder(
        spec,
        norm=Norm(eps=keys.number("rms_norm_eps", default=1e-5)),
        rope=Rope.read(keys, theta=1e6, positions=131_072),
    )


MIXTRAL: Final = Family(
    names={**ATTENTION, **W1_W2_W3},
    otherwise=(FUSED,),
    options=_options,
    published={
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 32_768,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
)
