"""Phi-3.5-MoE: layer norms with biases, a biased head, and experts chosen one after the other."""

from typing import Final

from executor.families.base import SILU, Family, decoder
from executor.families.names import ATTENTION, FUSED, W1_W2_W3
from executor.families.rope import OTHER_MODEL, Rope
from executor.model import Architecture, Norm, NormKind, Router, Scores
from hrm.model_spec import Keys, ModelSpec


def _options(keys: Keys, spec: ModelSpec) -> Architecture:
    keys.word("hidden_act", SILU, default="silu")
    if spec.experts_per_token != 2:
        raise keys.refusal("num_experts_per_tok", "must be 2: this router always chooses two", OTHER_MODEL)
    rope = Rope.read(keys, theta=1e6, positions=131_072)
    if rope.kind not in {"default", "longrope"}:
        raise keys.refusal("rope_scaling", "must be of the type longrope, or absent", OTHER_MODEL)
    return decoder(
        spec,
        norm=Norm(kind=NormKind.LAYER, eps=keys.number("rms_norm_eps", default=1e-5)),
        rope=rope,
        router=Router(scores=Scores.SPARSE_MIXER, jitter=keys.number("router_jitter_noise", default=0.01)),
    )


PHI: Final = Family(
    names={**ATTENTION, **W1_W2_W3},
    otherwise=({**FUSED, "router": "mlp.router.weight"},),
    options=_options,
    published={
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "max_position_embeddings": 131_072,
        "router_jitter_noise": 0.01,
        "bos_token_id": 1,
        "eos_token_id": 32_000,
    },
)
