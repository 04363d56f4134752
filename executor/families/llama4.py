"""Llama-4's text part: most layers rotate positions and attend in chunks, the others do neither.

The one expert that a token goes to, beside a shared one, gets it times its score. Layers without experts may
come in between.
"""

from typing import Final

from executor.families.base import SILU, Family, grouped_query
from executor.families.names import ATTENTION
from executor.families.rope import Rope
from executor.families.stored import Stored
from executor.model import Architecture, FeedForward, Glu, GroupedQuery, LayerMaths, Norm, Router, Scores, Temperature
from hrm.layers import Layer
from hrm.model_spec import Keys, ModelSpec
from hrm.model_spec.decoder import CHUNKED, FULL
from hrm.model_spec.readers.windows import llama4_rotated_layers

TUNING: Final = "attn_temperature_tuning"


def _options(keys: Keys, spec: ModelSpec) -> Architecture:
    keys.word("hidden_act", SILU, default="silu")
    keys.words("layer_types", (FULL, CHUNKED))
    norm = Norm(eps=keys.number("rms_norm_eps", default=1e-5))
    rotated_norm = norm if keys.truth("use_qk_norm", default=True) else None
    rope, temperature = Rope.read(keys, theta=500_000.0, positions=131_072), _temperature(keys)
    ffn = FeedForward(
        norm=norm,
        router=Router(scores=Scores.SIGMOID, norm=None),
        experts_per_token=spec.experts_per_token,
        glu=Glu(weight_on_input=True),
    )

    def maths(layer: Layer, *, rotates: bool) -> LayerMaths:
        block = grouped_query(layer)
        mixer = GroupedQuery(
            block=block,
            norm=norm,
            rotary=rope.rotary(block.head_dim, interleaved=True) if rotates else None,
            rotated_norm=rotated_norm if rotates else None,
            temperature=None if rotates else temperature,
            chunked=True,
        )
        return LayerMaths(mixer=mixer, ffn=ffn)

    rotated = llama4_rotated_layers(keys, spec.num_layers)
    layers = tuple(maths(layer, rotates=rotates) for layer, rotates in zip(spec.layers, rotated, strict=True))
    return Architecture(spec=spec, layers=layers, final_norm=norm, max_position_embeddings=rope.max_positions)


def _temperature(keys: Keys) -> Temperature | None:
    """Of layers that do not rotate, if queries have one; the first configs say so by a number."""
    told = keys.get(TUNING)
    if told == 0 or not (type(told) is int or keys.truth(TUNING, default=True)):
        return None
    return Temperature(stretch=keys.integer("floor_scale", default=8192), scale=keys.number("attn_scale", default=0.1))


LLAMA4: Final = Family(
    names={
        **ATTENTION,
        "router": "feed_forward.router.weight",
        "w13": Stored(("feed_forward.experts.gate_up_proj",), transposed=True),
        "w2": Stored(("feed_forward.experts.down_proj",), transposed=True),
        "shared_w13": ("feed_forward.shared_expert.gate_proj.weight", "feed_forward.shared_expert.up_proj.weight"),
        "shared_w2": "feed_forward.shared_expert.down_proj.weight",
        "dense_w13": ("feed_forward.gate_proj.weight", "feed_forward.up_proj.weight"),
        "dense_w2": "feed_forward.down_proj.weight",
    },
    # Each expert's on their own, as packed ones are published.
    otherwise=(
        {
            "w13": ("feed_forward.experts.{expert}.gate_proj.weight", "feed_forward.experts.{expert}.up_proj.weight"),
            "w2": "feed_forward.experts.{expert}.down_proj.weight",
        },
    ),
    options=_options,
    published={
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 16.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 10_485_760,
        "bos_token_id": 200_000,
        "eos_token_id": [200_001, 200_007, 200_008],
    },
)
