"""gpt-oss: attention sinks, every other layer within a window, biases everywhere, clamped experts."""

from typing import Final

from executor.families.base import SILU, Family, grouped_query
from executor.families.names import ATTENTION, GATE_UP_DOWN
from executor.families.rope import OTHER_MODEL, Rope
from executor.families.stored import Stored, interleaved
from executor.model import Activation, Architecture, FeedForward, Glu, GroupedQuery, LayerMaths, Norm
from hrm.layers import Layer
from hrm.model_spec import Keys, ModelSpec

ALPHA: Final = 1.702  # of the clamped gate, which kernels have built in


def _options(keys: Keys, spec: ModelSpec) -> Architecture:
    keys.word("hidden_act", SILU, default="silu")
    if keys.number("swiglu_alpha", default=ALPHA) != ALPHA:
        raise keys.refusal("swiglu_alpha", f"must be {ALPHA}", OTHER_MODEL)
    norm = Norm(eps=keys.number("rms_norm_eps", default=1e-5))
    glu = Glu(Activation.CLAMPED, keys.number("swiglu_limit", default=7.0))
    ffn = FeedForward(norm=norm, experts_per_token=spec.experts_per_token, glu=glu)
    rope = Rope.read(keys, theta=150_000.0, positions=131_072)

    def maths(layer: Layer, rope: Rope) -> LayerMaths:
        block = grouped_query(layer)
        return LayerMaths(mixer=GroupedQuery(block=block, norm=norm, rotary=rope.rotary(block.head_dim)), ffn=ffn)

    return rope.architecture(spec, maths, final_norm=norm)


# As in GGUF files, expert by expert.
BY_EXPERT: Final = {
    "w13": GATE_UP_DOWN["w13"],
    "w13_bias": ("mlp.experts.{expert}.gate_proj.bias", "mlp.experts.{expert}.up_proj.bias"),
    "w2": GATE_UP_DOWN["w2"],
    "w2_bias": "mlp.experts.{expert}.down_proj.bias",
}
GPT_OSS: Final = Family(
    names={
        **ATTENTION,
        "sinks": "self_attn.sinks",
        "router": "mlp.router.weight",
        "router_bias": "mlp.router.bias",
        "w13": Stored(("mlp.experts.gate_up_proj",), transposed=True, rows=interleaved),
        "w13_bias": Stored(("mlp.experts.gate_up_proj_bias",), rows=interleaved),
        "w2": Stored(("mlp.experts.down_proj",), transposed=True),
        "w2_bias": "mlp.experts.down_proj_bias",
    },
    otherwise=(BY_EXPERT,),
    options=_options,
    published={
        "rms_norm_eps": 1e-5,
        "rope_theta": 150_000.0,
        "max_position_embeddings": 131_072,
        "bos_token_id": 199_998,
        "eos_token_id": 200_002,
        "swiglu_limit": 7.0,
    },
)
