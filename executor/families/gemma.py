"""Gemma-4 with experts: a dense MLP beside them, norms after every part, and two kinds of attention.

The dense MLP is a shared expert with norms of its own. Layers within a window and those over all
tokens have rotary embeddings of their own.
"""

from dataclasses import replace
from typing import Any, Final

from executor.families.base import Family, grouped_query
from executor.families.names import ATTENTION
from executor.families.rope import OTHER_MODEL, Rope
from executor.model import Activation, Architecture, FeedForward, Glu, GroupedQuery, LayerMaths, Norm, Router
from hrm.layers import Layer
from hrm.model_spec import Keys, ModelSpec
from hrm.model_spec.decoder import FULL, SLIDING

ACTIVATION: Final = "gelu_pytorch_tanh"
ROPES: Final[dict[str, dict[str, Any]]] = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
SOFTCAP, WINDOW, POSITIONS = "final_logit_softcapping", "sliding_window", "max_position_embeddings"


def _options(keys: Keys, spec: ModelSpec) -> Architecture:
    keys.word("hidden_activation", (ACTIVATION,), default=ACTIVATION)
    keys.word("use_bidirectional_attention", ("vision",), default="vision")  # of text none
    positions = keys.integer(POSITIONS, default=131_072)
    if keys.integer(WINDOW) >= positions:
        raise keys.refusal(WINDOW, f"must be less than {POSITIONS}, {positions}", OTHER_MODEL)
    norm = Norm(eps=keys.number("rms_norm_eps", default=1e-6))
    ffn = FeedForward(
        norm=norm,
        experts_per_token=spec.experts_per_token,
        router=Router(input_scale=spec.hidden_size**-0.5),
        glu=Glu(Activation.GELU_TANH),
    )
    if keys.get("rope_parameters") is None:
        keys = replace(keys, values={**keys.values, "rope_parameters": ROPES})
    whole, local = (
        Rope.read(keys, theta=ROPES[of]["rope_theta"], positions=positions, of=of) for of in (FULL, SLIDING)
    )

    def maths(layer: Layer) -> LayerMaths:
        block = grouped_query(layer)
        rotary = (local if block.window else whole).rotary(block.head_dim)
        mixer = GroupedQuery(block=block, norm=norm, rotary=rotary, head_norm=norm, value_norm=norm, scale=1.0)
        return LayerMaths(mixer=mixer, ffn=ffn)

    return Architecture.of(
        spec,
        maths,
        final_norm=norm,
        embedding_scale=spec.hidden_size**0.5,
        softcap=None if keys.get(SOFTCAP) is None else keys.number(SOFTCAP),
        max_position_embeddings=min(whole.max_positions, local.max_positions),
    )


GEMMA4: Final = Family(
    names={
        **ATTENTION,
        "attention_output_norm": "post_attention_layernorm.weight",
        "ffn_norm": "pre_feedforward_layernorm_2.weight",
        "router": "router.proj.weight",
        "router_scale": "router.scale",
        "expert_scale": "router.per_expert_scale",
        "shared_norm": "pre_feedforward_layernorm.weight",
        "shared_w13": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "shared_w2": "mlp.down_proj.weight",
        "shared_output_norm": "post_feedforward_layernorm_1.weight",
        "w13": "experts.gate_up_proj",
        "w2": "experts.down_proj",
        "routed_output_norm": "post_feedforward_layernorm_2.weight",
        "ffn_output_norm": "post_feedforward_layernorm.weight",
        "layer_scale": "layer_scalar",
    },
    options=_options,
    published={
        "rms_norm_eps": 1e-6,
        "rope_parameters": ROPES,
        SOFTCAP: 30.0,
        WINDOW: 1024,
        POSITIONS: 262_144,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
)
