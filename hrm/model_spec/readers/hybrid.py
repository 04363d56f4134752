"""Families most of whose layers keep a state of each sequence instead of its tokens."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from hrm.layers import Block, DenseFfn, FeedForward, KimiDelta, Layer, Mamba, Mamba2, Mixer, RoutedExperts
from hrm.model_spec.config_file import Keys
from hrm.model_spec.decoder import (
    FULL,
    LINEAR,
    first_dense_experts,
    grouped_query,
    layer_types,
    model,
    num_layers,
    of_layers,
    routed_experts,
)
from hrm.model_spec.readers.latent import dense_by_list, latent_attention
from hrm.model_spec.spec import ModelSpec

# What blocks are called: by letters, in older lists and in newer ones.
_MAMBA, _ATTENTION, _EXPERTS, _DENSE = "linear_attention", "full_attention", "moe", "mlp"
_LETTERS: Final = {"M": _MAMBA, "*": _ATTENTION, "E": _EXPERTS, "-": _DENSE}
_OLD: Final = {"mamba": _MAMBA, "attention": _ATTENTION}


def read_nemotron_h(keys: Keys) -> ModelSpec:
    """Nemotron-H and Nemotron-3: a layer is a Mamba-2 or attention with the FFNs that follow it.

    The config counts each of these as a layer of its own.
    """
    blocks: dict[str, Block] = {
        _MAMBA: _nemotron_mamba(keys),
        _ATTENTION: grouped_query(keys.with_defaults(head_dim=128)),
        _EXPERTS: _nemotron_experts(keys),
        _DENSE: _nemotron_dense(keys),
    }
    return of_layers(keys, _grouped(keys, (blocks[kind] for kind in _nemotron_kinds(keys))))


def _nemotron_kinds(keys: Keys) -> list[str]:
    if keys.get("hybrid_override_pattern") is not None:
        pattern = keys.get("hybrid_override_pattern")
        if not isinstance(pattern, str) or not pattern or set(pattern) - set(_LETTERS):
            raise keys.refusal("hybrid_override_pattern", f"must be made of the letters {' '.join(_LETTERS)}")
        return [_LETTERS[letter] for letter in pattern]
    key = "layers_block_type" if keys.get("layers_block_type") is not None else "layer_types"
    kinds = keys.words(key, (*_LETTERS.values(), *_OLD))
    if not kinds:
        raise keys.refusal(key, "must say what each layer is")
    return [_OLD.get(kind, kind) for kind in kinds]


def _grouped(keys: Keys, blocks: Iterable[Block]) -> list[Layer]:
    """Layers of blocks in a row: each begins with a mixer."""
    layers: list[tuple[Mixer, list[FeedForward]]] = []
    for block in blocks:
        if isinstance(block, Mixer):
            layers.append((block, []))
        elif not layers:
            raise keys.refusal("model_type", "must be a model that begins with a mixer, to be planned")
        elif isinstance(block, FeedForward):
            layers[-1][1].append(block)
    return [Layer(mixer=mixer, ffn=tuple(ffn)) for mixer, ffn in layers]


def _nemotron_mamba(keys: Keys) -> Mamba2:
    mamba = Mamba2(
        hidden_size=keys.integer("hidden_size"),
        num_heads=keys.integer("mamba_num_heads"),
        head_dim=keys.integer("mamba_head_dim"),
        state_size=keys.integer("ssm_state_size"),
        num_groups=keys.integer("n_groups", default=8),
        conv_kernel=keys.integer("conv_kernel", default=4),
    )
    convolved = mamba.convolved_elements if keys.truth("use_conv_bias", default=True) else 0
    biases = {"projections_bias": mamba.projected_size, "output_bias": mamba.hidden_size}
    return mamba.with_vectors(convolution_bias=convolved, **(biases if keys.truth("use_bias") else {}))


def _nemotron_experts(keys: Keys) -> RoutedExperts:
    experts = routed_experts(
        keys,
        "moe_intermediate_size",
        "n_routed_experts",
        gated=False,
        shared_intermediate_size=keys.integer("moe_shared_expert_intermediate_size"),
        latent_size=keys.integer("moe_latent_size", default=0),
    )
    shared, hidden, latent = experts.shared_intermediate_size, experts.hidden_size, experts.latent_size
    biases = {"shared_w1_bias": shared, "shared_w2_bias": hidden}
    around = {"latent_down_bias": latent, "latent_up_bias": hidden} if latent else {}
    of_all = {**biases, **around} if keys.truth("mlp_bias") else {}
    return experts.with_vectors(score_correction=experts.num_experts, **of_all)


def _nemotron_dense(keys: Keys) -> DenseFfn:
    hidden, inner = keys.integer("hidden_size"), keys.integer("intermediate_size")
    biases = {"dense_w1_bias": inner, "dense_w2_bias": hidden} if keys.truth("mlp_bias") else {}
    return DenseFfn(hidden_size=hidden, intermediate_size=inner, gated=False).with_vectors(**biases)


def read_jamba(keys: Keys) -> ModelSpec:
    """Jamba: one of eight layers with attention, the others with Mamba, and every second one with experts."""
    every = range(num_layers(keys))
    period, offset = (
        keys.integer("attn_layer_period", default=8),
        keys.integer("attn_layer_offset", default=4, at_least=0),
    )
    attention, mamba = grouped_query(keys), _jamba_mamba(keys)
    mixers: list[Mixer] = [attention if layer % period == offset else mamba for layer in every]
    period = keys.integer("expert_layer_period", default=2)
    offset = keys.integer("expert_layer_offset", default=1, at_least=0)
    dense = {layer for layer in every if layer % period != offset}
    return model(keys, mixers, routed_experts(keys, "intermediate_size", "num_experts"), dense_layers=dense)


def _jamba_mamba(keys: Keys) -> Mamba:
    hidden = keys.integer("hidden_size")
    automatic = keys.get("mamba_dt_rank") in (None, "auto")
    mamba = Mamba(
        hidden_size=hidden,
        inner_size=keys.integer("mamba_expand", default=2) * hidden,
        state_size=keys.integer("mamba_d_state", default=16),
        step_rank=-(-hidden // 16) if automatic else keys.integer("mamba_dt_rank"),
        conv_kernel=keys.integer("mamba_d_conv", default=4),
    )
    inner, state = mamba.inner_size, mamba.state_size
    biases = {"projections_bias": 2 * inner, "output_bias": hidden} if keys.truth("mamba_proj_bias") else {}
    convolved = inner if keys.truth("mamba_conv_bias", default=True) else 0
    norms = {"step_norm": mamba.step_rank, "input_norm": state, "read_norm": state}
    return mamba.with_vectors(convolution_bias=convolved, **norms, **biases)


def read_kimi_linear(keys: Keys) -> ModelSpec:
    """Kimi-Linear and the text part of Kimi-K3: three layers of Kimi delta attention to one of latent.

    Of Kimi-K3 what has no published code is left out: the weights by which layers see earlier ones.
    """
    latent = latent_attention(keys)
    if keys.truth("mla_use_output_gate"):
        latent = replace(latent, output_gate=True)
    delta, full = _kimi_layers(keys)
    types = layer_types(keys, lambda layer: FULL if layer in full else LINEAR, choices=(FULL, LINEAR))
    experts = first_dense_experts(keys, corrected=True)
    inner = keys.integer("routed_expert_hidden_size", default=experts.hidden_size)
    experts = replace(experts, latent_size=inner if inner != experts.hidden_size else 0)
    if keys.truth("latent_moe_use_norm"):
        experts = experts.with_vectors(latent_norm=experts.latent_size)
    mixers = [latent if kind == FULL else delta for kind in types]
    return model(keys, mixers, experts, dense_layers=dense_by_list(keys, default_first=1))


def _kimi_layers(keys: Keys) -> tuple[KimiDelta, set[int]]:
    """The layers that are told in a section of their own, or by transformers' names, and those of the other kind."""
    if keys.get("linear_attn_config") is None:
        rank, full = keys.integer("linear_head_dim", default=128), set(range(4, num_layers(keys), 4))
        delta = _kimi_delta(
            keys, keys.integer("linear_num_heads", default=32), rank, keys.integer("linear_conv_kernel_dim", default=4)
        )
        return replace(delta, decay_rank=rank, gate_rank=rank), full
    linear = keys.section("linear_attn_config")
    rank, kernel = linear.integer("head_dim"), linear.integer("short_conv_kernel_size", default=4)
    delta = _kimi_delta(keys, linear.integer("num_heads"), rank, kernel)
    gate_rank = 0 if linear.truth("use_full_rank_gate") else rank
    full = {layer - 1 for layer in linear.integers("full_attn_layers")}
    return replace(delta, decay_rank=rank, gate_rank=gate_rank), full


def _kimi_delta(keys: Keys, num_heads: int, head_dim: int, conv_kernel: int) -> KimiDelta:
    return KimiDelta(
        hidden_size=keys.integer("hidden_size"), num_heads=num_heads, head_dim=head_dim, conv_kernel=conv_kernel
    )


def read_bailing_hybrid(keys: Keys) -> ModelSpec:
    """Ling-3.0: five layers of Kimi delta attention to one of latent attention."""
    heads = keys.integer("num_attention_heads")
    delta = _kimi_delta(
        keys, heads, keys.integer("head_dim", default=128), keys.integer("short_conv_kernel_size", default=4)
    )
    latent = latent_attention(keys).with_vectors(head_gate=heads * delta.hidden_size)
    group = keys.integer("layer_group_size", default=6)
    types = layer_types(keys, lambda layer: LINEAR if (layer + 1) % group else FULL, choices=(FULL, LINEAR))
    mixers = [latent if kind == FULL else delta for kind in types]
    experts = first_dense_experts(keys, corrected=True)
    return model(keys, mixers, experts, dense_layers=dense_by_list(keys, default_first=2))
