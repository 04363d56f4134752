"""DeepSeek and its kin (Kimi-K2, GLM-4.7-Flash): latent attention, dense first layers, experts in groups.

Layers that predict tokens further ahead are not read.
"""

from functools import partial
from typing import Final

from executor.families.base import SILU, Family
from executor.families.names import ATTENTION, FUSED, GATE_UP_DOWN
from executor.families.rope import OTHER_MODEL, Rope, yarn_magnitude
from executor.families.stored import Names
from executor.model import Architecture, FeedForward, Latent, LayerMaths, Norm, Router, Scores
from hrm.layers import LatentAttention, Layer
from hrm.model_spec import Keys, ModelSpec

INNER_NORM: Final = Norm(eps=1e-6)  # whatever the config says of the other norms
BEST_OF_GROUP: Final = 2

LATENT: Final[Names] = {
    "query": "self_attn.q_proj.weight",
    "query_down": "self_attn.q_a_proj.weight",
    "query_down_bias": "self_attn.q_a_proj.bias",
    "query_norm": "self_attn.q_a_layernorm.weight",
    "query_up": "self_attn.q_b_proj.weight",
    "kv_down": "self_attn.kv_a_proj_with_mqa.weight",
    "kv_down_bias": "self_attn.kv_a_proj_with_mqa.bias",
    "kv_norm": "self_attn.kv_a_layernorm.weight",
    "kv_up": "self_attn.kv_b_proj.weight",
}


def _decoder(keys: Keys, spec: ModelSpec, router: Router, *, interleaved: bool, eps: float = 1e-6) -> Architecture:
    keys.word("hidden_act", SILU, default="silu")
    norm = Norm(eps=keys.number("rms_norm_eps", default=eps))
    rope = Rope.read(keys, theta=10_000.0, positions=4096)
    ffn = FeedForward(norm=norm, router=router, experts_per_token=spec.experts_per_token)

    def maths(layer: Layer, rope: Rope) -> LayerMaths:
        block = layer.mixer
        assert isinstance(block, LatentAttention), block
        rotary, scale = rope.rotary(block.rope_head_dim, interleaved=interleaved), _scale(block, rope)
        mixer = Latent(block=block, norm=norm, inner_norm=INNER_NORM, rotary=rotary, scale=scale)
        return LayerMaths(mixer=mixer, ffn=ffn)

    return rope.architecture(spec, maths, final_norm=norm)


def _scale(block: LatentAttention, rope: Rope) -> float:
    """What scores are multiplied by: YaRN's magnitude counts for all elements here, rotated or not."""
    scale = block.head_dim**-0.5
    if rope.kind == "default" or not rope.section.get("mscale_all_dim"):
        return scale
    return scale * yarn_magnitude(rope.factor, rope.section.number("mscale_all_dim")) ** 2


def _groups(keys: Keys, spec: ModelSpec, *, groups: int, chosen: int, best_of_group: int) -> tuple[int, int]:
    """How many groups the experts are in, and how many a token's experts may be of; given what is not told."""
    groups = keys.integer("n_group", default=groups)
    chosen = keys.integer("topk_group", default=chosen)
    if spec.num_experts % groups or (groups > chosen and spec.num_experts // groups < best_of_group):
        raise keys.refusal(
            "n_group", f"must divide the {spec.num_experts} experts into groups of {best_of_group} or more"
        )
    if chosen > groups or chosen * (spec.num_experts // groups) < spec.experts_per_token:
        rule = f"must be at most the {groups} groups, and leave {spec.experts_per_token} experts to choose from"
        raise keys.refusal("topk_group", rule)
    return groups, chosen


def _options_v2(keys: Keys, spec: ModelSpec) -> Architecture:
    """DeepSeek-V2's: a group is as good as its best expert, and weights are not normalised."""
    keys.word("scoring_func", ("softmax",), default="softmax")
    if keys.truth("norm_topk_prob"):
        rule = "must be false: readers of such a config differ in whether weights are then scaled"
        raise keys.refusal("norm_topk_prob", rule, OTHER_MODEL)
    grouped = keys.word("topk_method", ("greedy", "group_limited_greedy"), default="greedy") != "greedy"
    groups, chosen = _groups(keys, spec, groups=1, chosen=1, best_of_group=1) if grouped else (1, 1)
    scale = keys.number("routed_scaling_factor", default=1.0)
    router = Router(norm=None, groups=groups, chosen_groups=chosen, scale=scale)
    return _decoder(keys, spec, router, interleaved=True)


def corrected_router(keys: Keys, spec: ModelSpec, *, groups: int, chosen: int, scale: float) -> Router:
    """DeepSeek-V3's (arXiv 2412.19437): sigmoid scores, corrected for the choice, and groups whose best two count.

    `groups`, `chosen` and `scale` are for what the config does not say. Raises ModelError naming the key if experts
    cannot be grouped as it says.
    """
    keys.word("scoring_func", ("sigmoid",), default="sigmoid")
    keys.word("topk_method", ("noaux_tc",), default="noaux_tc")
    groups, chosen = _groups(keys, spec, groups=groups, chosen=chosen, best_of_group=BEST_OF_GROUP)
    return Router(
        scores=Scores.SIGMOID,
        norm=1.0 if keys.truth("norm_topk_prob", default=True) else None,
        groups=groups,
        chosen_groups=chosen,
        best_of_group=BEST_OF_GROUP,
        scale=keys.number("routed_scaling_factor", default=scale),
    )


def _options_v3(keys: Keys, spec: ModelSpec) -> Architecture:
    router = corrected_router(keys, spec, groups=8, chosen=4, scale=2.5)
    return _decoder(keys, spec, router, interleaved=keys.truth("rope_interleave", default=True))


def _options_glm(keys: Keys, spec: ModelSpec) -> Architecture:
    router = corrected_router(keys, spec, groups=1, chosen=1, scale=1.8)
    return _decoder(keys, spec, router, interleaved=keys.truth("rope_interleave", default=True), eps=1e-5)


_NAMES: Final[Names] = {**ATTENTION, **LATENT, **GATE_UP_DOWN}
_family = partial(Family, names=_NAMES, otherwise=(FUSED,))
_YARN: Final = {"type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096}

DEEPSEEK_V2: Final = _family(
    options=_options_v2,
    published={
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000,
        "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        "max_position_embeddings": 163_840,
        "bos_token_id": 100_000,
        "eos_token_id": 100_001,
    },
)
DEEPSEEK_V3: Final = _family(
    options=_options_v3,
    published={
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000,
        "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        "max_position_embeddings": 163_840,
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
)
KIMI_K2: Final = _family(
    options=_options_v3,
    published={
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50_000,
        "rope_scaling": {**_YARN, "factor": 64, "mscale": 1.0, "mscale_all_dim": 1.0},
        "max_position_embeddings": 262_144,
        "bos_token_id": 163_584,
        "eos_token_id": 163_585,
    },
)
GLM4_LITE: Final = _family(
    options=_options_glm, published={"routed_scaling_factor": 1.8, "max_position_embeddings": 202_752}
)
