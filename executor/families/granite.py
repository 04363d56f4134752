"""Granite-MoE: embeddings, scores, what layers add and logits are multiplied by numbers of the config."""

from dataclasses import replace
from typing import Final

from executor.families.base import SILU, Family, decoder
from executor.families.names import ATTENTION
from executor.families.rope import OTHER_MODEL, Rope
from executor.model import Architecture, Norm, Router
from hrm.model_spec import Keys, ModelSpec

EMBEDDING, LOGITS = "embedding_multiplier", "logits_scaling"
SCORES, RESIDUAL = "attention_multiplier", "residual_multiplier"


def _options(keys: Keys, spec: ModelSpec) -> Architecture:
    keys.word("hidden_act", SILU, default="silu")
    if keys.truth("attention_bias"):
        raise keys.refusal("attention_bias", "must be false, as in all published models", OTHER_MODEL)
    residual = keys.number(RESIDUAL, default=1.0)
    arch = decoder(
        spec,
        norm=Norm(eps=keys.number("rms_norm_eps", default=1e-6)),
        rope=Rope.read(keys, theta=10_000.0, positions=2048),
        router=Router(scale=residual),
        scale=keys.number(SCORES, default=1.0),
        output_scale=residual,
    )
    return replace(
        arch, embedding_scale=keys.number(EMBEDDING, default=1.0), logits_scale=1 / keys.number(LOGITS, default=1.0)
    )


GRANITE: Final = Family(
    names={
        **ATTENTION,
        "router": "block_sparse_moe.router.layer.weight",
        "w13": "block_sparse_moe.input_linear.weight",
        "w2": "block_sparse_moe.output_linear.weight",
    },
    options=_options,
    published={
        EMBEDDING: 12.0,
        LOGITS: 6.0,
        SCORES: 0.015625,
        RESIDUAL: 0.22,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e7,
        "max_position_embeddings": 131_072,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
)
