"""MiniMax-M2: norms over all queries and all keys, a part of each head turns, corrected sigmoids."""

from typing import Final

from executor.families.base import SILU, Family, decoder
from executor.families.names import ATTENTION, FUSED, W1_W2_W3
from executor.families.rope import OTHER_MODEL, Rope
from executor.model import Architecture, Norm, Router, Scores
from hrm.model_spec import Keys, ModelSpec

# Its configs have keys for what all of its models do alike.
ALWAYS: Final = {"use_qk_norm": True, "use_routing_bias": True, "shared_intermediate_size": 0}


def _options(keys: Keys, spec: ModelSpec) -> Architecture:
    keys.word("hidden_act", SILU, default="silu")
    keys.word("scoring_func", ("sigmoid",), default="sigmoid")
    keys.word("qk_norm_type", ("per_layer",), default="per_layer")
    for key, value in ALWAYS.items():
        if keys.get(key) not in (None, value):
            raise keys.refusal(key, f"must be {str(value).lower()}", OTHER_MODEL)
    if any(kind != 1 for kind in keys.integers("attn_type_list")):
        raise keys.refusal("attn_type_list", "must be 1, softmax attention, for every layer", OTHER_MODEL)
    norm = Norm(eps=keys.number("rms_norm_eps", default=1e-6))
    return decoder(
        spec,
        norm=norm,
        head_norm=norm,
        rope=Rope.read(keys, theta=5e6, positions=196_608, partial=1.0),
        router=Router(scores=Scores.SIGMOID),
    )


MINIMAX_M2: Final = Family(
    names={**ATTENTION, **W1_W2_W3, "score_correction": "block_sparse_moe.e_score_correction_bias"},
    otherwise=({**FUSED, "score_correction": "mlp.e_score_correction_bias"},),
    options=_options,
    published={
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e6,
        "max_position_embeddings": 196_608,
        "bos_token_id": 200_034,
        "eos_token_id": 200_020,
    },
)
