"""Qwen: experts after grouped-query attention, or after three layers of linear attention to one."""

from dataclasses import replace

from hrm.layers import GatedDeltaNet, GroupedQueryAttention, Mixer, RoutedExperts
from hrm.model_spec.config_file import Keys
from hrm.model_spec.decoder import (
    FULL,
    LINEAR,
    SLIDING,
    biased_attention,
    grouped_query,
    interleaved,
    layer_types,
    model,
    routed_experts,
    windowed,
    with_head_norms,
)
from hrm.model_spec.spec import ModelSpec


def read_qwen2(keys: Keys) -> ModelSpec:
    """Qwen1.5-MoE and Qwen2-MoE."""
    used = keys.truth("use_sliding_window")
    limited = keys.integer("max_window_layers", default=28, at_least=0) if used else 0
    attention = grouped_query(keys, biases=keys.truth("qkv_bias", default=True))
    mixers = windowed(
        keys, attention, used=used, default=lambda layer: SLIDING if layer % 2 == 0 and layer < limited else FULL
    )
    return model(keys, mixers, _shared_experts(keys), dense_layers=_dense_layers(keys))


def read_qwen3(keys: Keys) -> ModelSpec:
    """Qwen3-MoE."""
    mixers = windowed(keys, with_head_norms(biased_attention(keys)), used=keys.truth("use_sliding_window"))
    return model(keys, mixers, _experts(keys), dense_layers=_dense_layers(keys))


def read_qwen3_vl(keys: Keys) -> ModelSpec:
    """The text part of Qwen3-VL: Qwen3-MoE without windows."""
    keys = keys.with_defaults(tie_word_embeddings=True)
    attention = with_head_norms(biased_attention(keys))
    return model(keys, attention, _experts(keys), dense_layers=_dense_layers(keys))


def read_qwen3_next(keys: Keys) -> ModelSpec:
    """Qwen3-Next."""
    return model(keys, _three_linear_to_one(keys), _shared_experts(keys), dense_layers=_dense_layers(keys))


def read_qwen3_5(keys: Keys) -> ModelSpec:
    """The text part of Qwen3.5-MoE: Qwen3-Next with experts in every layer."""
    return model(keys, _three_linear_to_one(keys), _shared_experts(keys))


def _dense_layers(keys: Keys) -> set[int]:
    return interleaved(keys, "decoder_sparse_step") | set(keys.integers("mlp_only_layers"))


def _experts(keys: Keys) -> RoutedExperts:
    return routed_experts(keys, "moe_intermediate_size", "num_experts")


def _shared_experts(keys: Keys) -> RoutedExperts:
    """Experts beside shared ones that a gate of their own scales."""
    experts = replace(_experts(keys), shared_intermediate_size=keys.integer("shared_expert_intermediate_size"))
    return experts.with_vectors(shared_gate=experts.hidden_size)


def _three_linear_to_one(keys: Keys) -> list[Mixer]:
    """Three of four layers with a gated delta rule, the fourth with attention and an output gate."""
    keys = keys.with_defaults(head_dim=256)
    full = _gated_attention(keys)
    linear = GatedDeltaNet(
        hidden_size=full.hidden_size,
        num_key_heads=keys.integer("linear_num_key_heads", default=16),
        num_value_heads=keys.integer("linear_num_value_heads", default=32),
        key_head_dim=keys.integer("linear_key_head_dim", default=128),
        value_head_dim=keys.integer("linear_value_head_dim", default=128),
        conv_kernel=keys.integer("linear_conv_kernel_dim", default=4),
    )
    interval = keys.integer("full_attention_interval", default=4)
    types = layer_types(keys, lambda layer: LINEAR if (layer + 1) % interval else FULL, choices=(FULL, LINEAR))
    return [linear if kind == LINEAR else full for kind in types]


def _gated_attention(keys: Keys) -> GroupedQueryAttention:
    full = with_head_norms(biased_attention(keys))
    # A gate has a bias where the queries have one.
    biases = {"gate_bias": full.query_size} if keys.truth("attention_bias") else {}
    return replace(full.with_vectors(**biases), output_gate=True)
