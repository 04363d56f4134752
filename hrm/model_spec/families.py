"""Readers of published config.json files, one for each `model_type`.

They follow the configuration and modelling code of transformers: which key decides what, and what
holds where a key is missing. Sizes must be given; what a config asks for beyond what a ModelSpec
can say is refused, naming the key. Layers that predict further tokens do not count.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from hrm.errors import ModelError
from hrm.model_spec.config_file import Keys
from hrm.model_spec.decoder import (
    CHUNKED,
    EXPERTS,
    EXPERTS_PER_TOKEN,
    FULL,
    SLIDING,
    attention_biases,
    decoder,
    leading,
    require_every_layer,
    whole_head,
    with_dense_layers,
    with_windows,
    without_windows,
)
from hrm.model_spec.latent import LatentAttention
from hrm.model_spec.spec import ModelSpec


def spec_from_hf_config(config: dict[str, Any], where: str) -> ModelSpec:
    """The model that a Hugging Face config describes, named after the config's folder.

    Raises ModelError naming `where` and the key if the architecture is unknown, a key is missing or
    of another type, or asks for what no plan can say.
    """
    return read_spec(decoder_keys(config, where))


def read_spec(keys: Keys) -> ModelSpec:
    """The model that a decoder's keys describe, named after the folder of their file."""
    family = keys.get("model_type")
    reader = FAMILY_READERS.get(family) if isinstance(family, str) else None
    if reader is None:
        raise _unknown_architecture(keys)
    path = Path(keys.file)
    name = path.parent.name if path.name == "config.json" else path.stem
    return replace(reader(keys), name=name or str(family), family=str(family), published_dtype=_published_dtype(keys))


def decoder_keys(config: dict[str, Any], where: str) -> Keys:
    """The keys of a config, or of the text part within that of a multimodal model."""
    keys = Keys(config, where)
    outer = keys.get("model_type")
    if (isinstance(outer, str) and outer in FAMILY_READERS) or keys.get("text_config") is None:
        return keys
    text = keys.section("text_config").within(keys, "tie_word_embeddings", "quantization_config")
    return text.with_defaults(model_type=f"{outer}_text")


def _unknown_architecture(keys: Keys) -> ModelError:
    """Says which families are known, and of an unknown one with experts, what it would need."""
    known = f"must be one of {', '.join(FAMILY_READERS)}"
    if not any(keys.get(key) is not None for key in EXPERTS):
        rule = f"{known}; hrm plans mixture-of-experts models, and here is none of"
        return keys.refusal("model_type", f"{rule} {', '.join(EXPERTS)}", "use a mixture-of-experts model")
    needed = {
        "num_hidden_layers": (),
        "hidden_size": (),
        "moe_intermediate_size": ("intermediate_size",),
        "num_attention_heads": (),
        "num_key_value_heads": (),
        "vocab_size": (),
        "num_experts": EXPERTS,
        "num_experts_per_tok": EXPERTS_PER_TOKEN,
    }
    has: list[str] = []
    lacks: list[str] = []
    for key, aliases in needed.items():
        given = any(keys.get(name) is not None for name in (key, *aliases))
        (has if given else lacks).append(key)
    found = f"has {', '.join(has)} and lacks {', '.join(lacks) or 'none'}"
    return keys.refusal(
        "model_type",
        f"{known}; of the sizes that a reader needs, this config {found}",
        "use one of these, or add a reader to hrm/model_spec/families.py",
    )


def _published_dtype(keys: Keys) -> str:
    """How the weights are quantised; empty if they are not."""
    if keys.get("quantization_config") is None:
        return ""
    method = keys.section("quantization_config").get("quant_method")
    if not isinstance(method, str) or not method.isprintable():
        return "quantised"
    return {"mxfp4": "mxfp4 experts"}.get(method, method)


# -- the families -----------------------------------------------------------------------------


def _read_mixtral(keys: Keys) -> ModelSpec:
    spec = decoder(keys, expert_size="intermediate_size", experts="num_local_experts")
    return with_windows(spec, keys)


def _read_dbrx(keys: Keys) -> ModelSpec:
    ffn, attention = keys.section("ffn_config"), keys.section("attn_config")
    hidden_size = keys.integer("d_model")
    return ModelSpec(
        name=keys.where,
        family="",
        num_layers=keys.integer("n_layers"),
        hidden_size=hidden_size,
        intermediate_size=ffn.integer("ffn_hidden_size"),
        num_heads=keys.integer("n_heads"),
        num_kv_heads=attention.integer("kv_n_heads"),
        head_dim=whole_head(keys, "n_heads", hidden_size),
        num_experts=ffn.integer("moe_num_experts"),
        experts_per_token=ffn.integer("moe_top_k"),
        vocab_size=keys.integer("vocab_size"),
        tied_embeddings=keys.truth("tie_word_embeddings"),
    )


def _read_qwen(keys: Keys) -> ModelSpec:
    """What Qwen2 and Qwen3 have in common."""
    spec = decoder(keys, expert_size="moe_intermediate_size", experts="num_experts")
    require_every_layer(keys, "decoder_sparse_step")
    dense = set(keys.integers("mlp_only_layers")) & set(range(spec.num_layers))
    count = leading(keys, "mlp_only_layers", dense)
    return with_dense_layers(spec, keys, count, "intermediate_size")


def _read_qwen2(keys: Keys) -> ModelSpec:
    used = keys.truth("use_sliding_window")
    limited = keys.integer("max_window_layers", default=28, at_least=0) if used else 0
    spec = with_windows(
        _read_qwen(keys), keys, used=used, default=lambda layer: SLIDING if layer % 2 == 0 and layer < limited else FULL
    )
    has_biases = keys.truth("qkv_bias", default=True)
    return replace(
        spec,
        shared_intermediate_size=keys.integer("shared_expert_intermediate_size"),
        other_layer_parameters=has_biases * attention_biases(spec, output=False),
        other_router_parameters=spec.hidden_size,  # the shared expert's gate
    )


def _read_qwen3(keys: Keys) -> ModelSpec:
    spec = with_windows(_read_qwen(keys), keys, used=keys.truth("use_sliding_window"))
    biases = keys.truth("attention_bias") * attention_biases(spec, output=True)
    return replace(spec, other_layer_parameters=2 * spec.head_dim + biases)


def _read_deepseek(keys: Keys) -> ModelSpec:
    """DeepSeek-V2, and what V3 has in common with it."""
    latent = LatentAttention(
        kv_rank=keys.integer("kv_lora_rank"),
        rope_head_dim=keys.integer("qk_rope_head_dim"),
        nope_head_dim=keys.integer("qk_nope_head_dim"),
        value_head_dim=keys.integer("v_head_dim"),
        query_rank=keys.integer("q_lora_rank", default=0),
    )
    spec = decoder(keys, expert_size="moe_intermediate_size", experts="n_routed_experts", latent=latent)
    require_every_layer(keys, "moe_layer_freq")
    if keys.truth("mlp_bias"):
        raise keys.refusal("mlp_bias", "must be false", "use a model without biases in its FFNs")
    # Biases of both down projections and of the output's, not of those up.
    biases = latent.query_rank + spec.kv_elements + spec.hidden_size
    return replace(
        _with_first_dense(without_windows(spec, keys), keys),
        other_layer_parameters=keys.truth("attention_bias") * biases,
    )


def _with_first_dense(spec: ModelSpec, keys: Keys) -> ModelSpec:
    """The spec with the dense first layers and the shared experts of DeepSeek's keys."""
    shared = keys.integer("n_shared_experts", at_least=0) * spec.intermediate_size
    count = keys.integer("first_k_dense_replace", at_least=0)
    spec = replace(spec, shared_intermediate_size=shared)
    return with_dense_layers(spec, keys, count, "intermediate_size")


def _read_deepseek_v3(keys: Keys) -> ModelSpec:
    spec = _read_deepseek(keys)
    return replace(spec, other_router_parameters=spec.num_experts)  # corrections of the scores


def _read_gpt_oss(keys: Keys) -> ModelSpec:
    keys = keys.with_defaults(head_dim=64)
    spec = decoder(keys, expert_size="intermediate_size", experts="num_local_experts")
    spec = with_windows(spec, keys, lambda layer: FULL if layer % 2 else SLIDING)
    has_biases = keys.truth("attention_bias", default=True)
    sinks = spec.num_heads
    return replace(
        spec,
        other_layer_parameters=has_biases * attention_biases(spec, output=True) + sinks,
        other_router_parameters=spec.num_experts,
        other_expert_parameters=2 * spec.intermediate_size + spec.hidden_size,
    )


def _read_llama4(keys: Keys) -> ModelSpec:
    keys = keys.with_defaults(head_dim=128)
    spec = decoder(keys, expert_size="intermediate_size", experts="num_local_experts")
    count = 0
    if keys.get("moe_layers") is None:
        require_every_layer(keys, "interleave_moe_layer_step")
    else:
        dense = set(range(spec.num_layers)) - set(keys.integers("moe_layers"))
        count = leading(keys, "moe_layers", dense)
    spec = with_dense_layers(spec, keys, count, "intermediate_size_mlp")
    rotary = keys.integers("no_rope_layers")
    if not rotary:
        interval = keys.integer("no_rope_layer_interval", default=4)
        rotary = tuple((layer + 1) % interval for layer in range(spec.num_layers))
    if len(rotary) < spec.num_layers:
        raise keys.refusal("no_rope_layers", f"must have one of the {spec.num_layers} layers each")
    spec = with_windows(spec, keys, lambda layer: CHUNKED if rotary[layer] else FULL)
    return replace(
        spec,
        shared_intermediate_size=spec.intermediate_size,
        other_layer_parameters=keys.truth("attention_bias") * attention_biases(spec, output=True),
    )


def _read_glm4(keys: Keys) -> ModelSpec:
    spec = decoder(keys, expert_size="moe_intermediate_size", experts="n_routed_experts")
    spec = _with_first_dense(without_windows(spec, keys), keys)
    biases = keys.truth("attention_bias") * attention_biases(spec, output=False)
    return replace(
        spec,
        other_layer_parameters=biases + keys.truth("use_qk_norm") * 2 * spec.head_dim,
        other_router_parameters=spec.num_experts,  # corrections of the scores
    )


def _read_phimoe(keys: Keys) -> ModelSpec:
    spec = decoder(keys, expert_size="intermediate_size", experts="num_local_experts")
    biases = keys.truth("attention_bias") * attention_biases(spec, output=True)
    head_biases = keys.truth("lm_head_bias") * spec.vocab_size
    return replace(
        with_windows(spec, keys),
        other_layer_parameters=biases + 2 * spec.hidden_size,  # of both layer norms
        other_head_parameters=head_biases + spec.hidden_size,  # of the final layer norm
    )


def _read_olmoe(keys: Keys) -> ModelSpec:
    keys = keys.with_defaults(num_key_value_heads=None)
    spec = decoder(keys, expert_size="intermediate_size", experts="num_experts")
    biases = keys.truth("attention_bias") * attention_biases(spec, output=True)
    norms = spec.query_size + spec.kv_size
    return replace(without_windows(spec, keys), other_layer_parameters=norms + biases)


FAMILY_READERS: Final[dict[str, Callable[[Keys], ModelSpec]]] = {
    "mixtral": _read_mixtral,
    "dbrx": _read_dbrx,
    "qwen2_moe": _read_qwen2,
    "qwen3_moe": _read_qwen3,
    "deepseek_v2": _read_deepseek,
    "deepseek_v3": _read_deepseek_v3,
    "kimi_k2": _read_deepseek_v3,
    "gpt_oss": _read_gpt_oss,
    "llama4_text": _read_llama4,
    "glm4_moe": _read_glm4,
    "phimoe": _read_phimoe,
    "olmoe": _read_olmoe,
}
