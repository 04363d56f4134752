"""GLM-4.5 to 4.7: half of each head turns, and experts are chosen by sigmoids with corrections."""

from typing import Final

from executor.families.base import SILU, Family, decoder
from executor.families.names import ATTENTION, FUSED, GATE_UP_DOWN
from executor.families.rope import Rope
from executor.model import Architecture, Norm, Router, Scores
from hrm.model_spec import Keys, ModelSpec

BEST_OF_GROUP: Final = 2


def _options(keys: Keys, spec: ModelSpec) -> Architecture:
    keys.word("hidden_act", SILU, default="silu")
    norm = Norm(eps=keys.number("rms_norm_eps", default=1e-5))
    return decoder(
        spec,
        norm=norm,
        head_norm=norm,
        rope=Rope.read(keys, theta=10_000.0, positions=131_072, partial=0.5),
        router=corrected_router(keys, spec),
    )


def corrected_router(keys: Keys, spec: ModelSpec) -> Router:
    """Sigmoid scores, a correction for the choice, and groups of experts (DeepSeek-V3, arXiv 2412.19437).

    Raises ModelError naming the key if experts cannot be grouped as it says.
    """
    groups, chosen = keys.integer("n_group", default=1), keys.integer("topk_group", default=1)
    size, left_over = divmod(spec.num_experts, groups)
    if left_over or (groups > 1 and size < BEST_OF_GROUP):
        rule = f"must divide the {spec.num_experts} experts into groups of {BEST_OF_GROUP} at least"
        raise keys.refusal("n_group", rule)
    if not -(-spec.experts_per_token // size) <= chosen <= groups:
        rule = f"must be at most n_group, {groups}, and leave {spec.experts_per_token} experts to choose from"
        raise keys.refusal("topk_group", rule)
    return Router(
        scores=Scores.SIGMOID,
        norm=1.0 if keys.truth("norm_topk_prob", default=True) else None,
        groups=groups,
        chosen_groups=chosen,
        best_of_group=BEST_OF_GROUP,
        scale=keys.number("routed_scaling_factor", default=1.0),
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
