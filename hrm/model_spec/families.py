"""Published config.json files, read by their `model_type`; `readers/` has a function for each.

Readers follow the configuration and modelling code of transformers: which key decides what, and what
holds where a key is missing. Sizes must be given; what a config asks for beyond what a ModelSpec
can say is refused, naming the key. Layers that predict further tokens do not count.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

from hrm.errors import ModelError, closest
from hrm.model_spec.config_file import Keys
from hrm.model_spec.decoder import EXPERTS, EXPERTS_PER_TOKEN
from hrm.model_spec.published_dtype import QUANTISATION_KEYS, published_dtype
from hrm.model_spec.quantisation import quantisation
from hrm.model_spec.readers import compressed, grouped, hybrid, latent, qwen, windows
from hrm.model_spec.spec import ModelSpec
from hrm.model_spec.stored_formats import stored_formats
from hrm.strict import file_kind


class FamilyReader(NamedTuple):
    """How a family's configs are read, and which models people know of it."""

    read: Callable[[Keys], ModelSpec]
    models: str


# What configs of multimodal models call their text part, and its family where they leave that out.
_TEXT_PARTS: Final = ("text_config", "llm_config", "language_config", "thinker_config")
_UNNAMED_TEXT: Final = {"kimi_k25": "deepseek_v3"}
_KNOWN: Final = "must be a family that hrm models lists"


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
    try:
        spec = reader.read(keys)
    except ModelError as error:  # of a block, which does not know where its sizes are from
        where = error.where if error.where.startswith(keys.where) else f"{keys.where}: {error.where}"
        raise ModelError(where, error.value, error.rule, error.remedy) from error
    return replace(spec, name=name or str(family), family=str(family), published_dtype=published_dtype(keys))


def spec_as_stored(keys: Keys) -> ModelSpec:
    """The same with the formats of the matrices that are packed; plain if they are stored in a way that is not read."""
    spec = read_spec(keys)
    try:
        how = quantisation(keys)
    except ModelError:
        return spec
    if how is None:
        return spec
    return spec.with_layers(
        replace(layer, packed=stored_formats(how, layer, number)) for number, layer in enumerate(spec.layers)
    )


def decoder_keys(config: dict[str, Any], where: str) -> Keys:
    """The keys of a config, or of the text part within that of a multimodal model.

    Token ids of the whole model count before its text part's.
    """
    keys = Keys(config, where)
    while (part := next((name for name in _TEXT_PARTS if keys.get(name)), None)) is not None:
        outer = keys.get("model_type")
        family = outer if isinstance(outer, str) and outer in FAMILY_READERS else f"{outer}_text"
        text = keys.section(part).within(keys, "tie_word_embeddings", *QUANTISATION_KEYS)
        text = text.with_defaults(model_type=_UNNAMED_TEXT.get(str(outer), family))
        ids = {key: keys.get(key) for key in ("bos_token_id", "eos_token_id") if keys.get(key) is not None}
        keys = replace(text, values={**text.values, **ids})
    return keys


def _unknown_architecture(keys: Keys) -> ModelError:
    """Says whether the model has experts, and which of the sizes that a reader needs its config has."""
    if words := file_kind(keys.values, {"architectures", "model_type"}):
        return ModelError(keys.where, f"<{words}>", "must be a model's config.json", "name another file")
    family = keys.get("model_type")
    close = closest(family, FAMILY_READERS) if isinstance(family, str) else None
    meant = f"did you mean {close}? otherwise " if close else ""
    telling = list(_telling_of_experts(keys.values))
    if not telling:
        rule = "no key tells of experts, and hrm plans mixture-of-experts models only"
        return keys.refusal("model_type", f"{_KNOWN}; {rule}", f"{meant}see hrm models")
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
    lacks = [key for key, others in needed.items() if all(keys.get(name) is None for name in (key, *others))]
    sizes = f"lacks {', '.join(lacks)}" if lacks else "has every size that most readers need"
    found = f"it has experts ({', '.join(key[:30] for key in telling[:4])}) and {sizes}"
    return keys.refusal("model_type", f"{_KNOWN}; {found}", f"{meant}add a reader to hrm/model_spec/readers")


def _telling_of_experts(values: dict[str, Any]) -> Iterator[str]:
    """Keys that tell of experts, also of objects within."""
    for key, value in values.items():
        if value and ("expert" in key or "moe" in key):
            yield key
        elif isinstance(value, dict):
            within = cast("dict[str, Any]", value)
            yield from (f"{key}.{inner}" for inner in _telling_of_experts(within))


FAMILY_READERS: Final[dict[str, FamilyReader]] = {
    "mixtral": FamilyReader(grouped.read_mixtral, "Mixtral 8x7B and 8x22B"),
    "dbrx": FamilyReader(grouped.read_dbrx, "DBRX"),
    "qwen2_moe": FamilyReader(qwen.read_qwen2, "Qwen1.5-MoE, Qwen2-57B-A14B"),
    "qwen3_moe": FamilyReader(qwen.read_qwen3, "Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder"),
    "qwen3_vl_moe_text": FamilyReader(qwen.read_qwen3_vl, "Qwen3-VL-30B-A3B, Qwen3-VL-235B-A22B (text)"),
    "qwen3_omni_moe_text": FamilyReader(qwen.read_qwen3, "Qwen3-Omni-30B-A3B (text of the thinker)"),
    "qwen3_next": FamilyReader(qwen.read_qwen3_next, "Qwen3-Next-80B-A3B, Qwen3-Coder-Next"),
    "qwen3_5_moe_text": FamilyReader(qwen.read_qwen3_5, "Qwen3.5-35B-A3B, 122B-A10B, 397B-A17B (text)"),
    "deepseek_v2": FamilyReader(latent.read_deepseek_v2, "DeepSeek-V2, V2-Lite, V2.5"),
    "deepseek_v3": FamilyReader(latent.read_deepseek_v3, "DeepSeek-V3, V3.1, R1"),
    "kimi_k2": FamilyReader(latent.read_deepseek_v3, "Kimi-K2, K2-Thinking, K2.5 (text)"),
    "glm4_moe_lite": FamilyReader(latent.read_glm4_lite, "GLM-4.7-Flash"),
    "glm4_moe": FamilyReader(grouped.read_glm4, "GLM-4.5, 4.5-Air, 4.6, 4.7"),
    "gpt_oss": FamilyReader(windows.read_gpt_oss, "gpt-oss-20b and 120b"),
    "llama4_text": FamilyReader(windows.read_llama4, "Llama-4-Scout and Maverick (text)"),
    "gemma4_text": FamilyReader(windows.read_gemma4, "Gemma-4-26B-A4B (text)"),
    "minimax_m2": FamilyReader(grouped.read_minimax_m2, "MiniMax-M2, M2.1, M2.5"),
    "phimoe": FamilyReader(grouped.read_phimoe, "Phi-3.5-MoE"),
    "granitemoe": FamilyReader(grouped.read_granite, "Granite-3.0 and 3.1, 1B-A400M and 3B-A800M"),
    "ernie4_5_moe": FamilyReader(grouped.read_ernie4_5, "ERNIE-4.5-21B-A3B, 300B-A47B"),
    "deepseek_v32": FamilyReader(latent.read_deepseek_v32, "DeepSeek-V3.2"),
    "deepseek_v4": FamilyReader(compressed.read_deepseek_v4, "DeepSeek-V4-Flash, V4-Pro"),
    "glm_moe_dsa": FamilyReader(latent.read_glm5, "GLM-5"),
    "longcat_flash": FamilyReader(latent.read_longcat, "LongCat-Flash"),
    "nemotron_h": FamilyReader(hybrid.read_nemotron_h, "Nemotron-3-Nano-30B-A3B, Nemotron-3-Super"),
    "jamba": FamilyReader(hybrid.read_jamba, "Jamba-v0.1, Jamba-1.5"),
    "kimi_linear": FamilyReader(hybrid.read_kimi_linear, "Kimi-Linear-48B-A3B, Kimi-K3 (text)"),
    "bailing_hybrid": FamilyReader(hybrid.read_bailing_hybrid, "Ling-3.0-Flash"),
    "dots1": FamilyReader(grouped.read_dots, "dots.llm1"),
    "hunyuan_v1_moe": FamilyReader(grouped.read_hunyuan, "Hunyuan-A13B"),
    "bailing_moe": FamilyReader(grouped.read_bailing, "Ling-lite, Ling-mini-2.0, Ling-flash-2.0, Ring"),
    "bailing_moe_v2": FamilyReader(grouped.read_bailing, "the same, as their configs name them"),
    "mimo_v2_flash": FamilyReader(windows.read_mimo_v2, "MiMo-V2-Flash"),
    "step3p5": FamilyReader(windows.read_step, "Step-3.5-Flash"),
    "step3p7": FamilyReader(windows.read_step, "Step-3.7-Flash (text)"),
    "olmoe": FamilyReader(grouped.read_olmoe, "OLMoE-1B-7B"),
}
