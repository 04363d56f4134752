"""Published config.json files, read by their `model_type`; `readers/` has a function for each.

Readers follow the configuration and modelling code of transformers: which key decides what, and what
holds where a key is missing. Sizes must be given; what a config asks for beyond what a ModelSpec
can say is refused, naming the key. Layers that predict further tokens do not count.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from hrm.errors import ModelError, closest
from hrm.model_spec.config_file import Keys
from hrm.model_spec.decoder import EXPERTS, EXPERTS_PER_TOKEN
from hrm.model_spec.readers import grouped, latent, qwen, windows
from hrm.model_spec.spec import ModelSpec

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
        spec = reader(keys)
    except ModelError as error:  # of a block, which does not know where its sizes are from
        where = error.where if error.where.startswith(keys.where) else f"{keys.where}: {error.where}"
        raise ModelError(where, error.value, error.rule, error.remedy) from error
    return replace(spec, name=name or str(family), family=str(family), published_dtype=_published_dtype(keys))


def decoder_keys(config: dict[str, Any], where: str) -> Keys:
    """The keys of a config, or of the text part within that of a multimodal model."""
    keys = Keys(config, where)
    outer = keys.get("model_type")
    if (isinstance(outer, str) and outer in FAMILY_READERS) or keys.get("text_config") is None:
        return keys
    text = keys.section("text_config").within(keys, "tie_word_embeddings", "quantization_config")
    return text.with_defaults(model_type=f"{outer}_text")


def _unknown_architecture(keys: Keys) -> ModelError:
    """Says whether the model has experts, and which of the sizes that a reader needs its config has."""
    family = keys.get("model_type")
    close = closest(family, FAMILY_READERS) if isinstance(family, str) else None
    meant = f"did you mean {close}? otherwise " if close else ""
    telling = [key for key, value in keys.values.items() if value and _tells_of_experts(key)]
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


def _tells_of_experts(key: str) -> bool:
    return "expert" in key or "moe" in key


def _published_dtype(keys: Keys) -> str:
    """How the weights are quantised; empty if they are not."""
    if keys.get("quantization_config") is None:
        return ""
    method = keys.section("quantization_config").get("quant_method")
    if not isinstance(method, str) or not method.isprintable():
        return "quantised"
    return {"mxfp4": "mxfp4 experts"}.get(method, method)


FAMILY_READERS: Final[dict[str, Callable[[Keys], ModelSpec]]] = {
    "mixtral": grouped.read_mixtral,
    "dbrx": grouped.read_dbrx,
    "qwen2_moe": qwen.read_qwen2,
    "qwen3_moe": qwen.read_qwen3,
    "qwen3_vl_moe_text": qwen.read_qwen3_vl,
    "qwen3_next": qwen.read_qwen3_next,
    "qwen3_5_moe_text": qwen.read_qwen3_5,
    "deepseek_v2": latent.read_deepseek_v2,
    "deepseek_v3": latent.read_deepseek_v3,
    "kimi_k2": latent.read_deepseek_v3,
    "glm4_moe_lite": latent.read_glm4_lite,
    "gpt_oss": windows.read_gpt_oss,
    "llama4_text": windows.read_llama4,
    "gemma4_text": windows.read_gemma4,
    "glm4_moe": grouped.read_glm4,
    "minimax_m2": grouped.read_minimax_m2,
    "phimoe": grouped.read_phimoe,
    "granitemoe": grouped.read_granite,
    "ernie4_5_moe": grouped.read_ernie4_5,
    "olmoe": grouped.read_olmoe,
}
