"""One file a model family, with its names and options; nothing outside knows any of them by name."""

from typing import Any, Final

from executor.families.base import Family
from executor.families.dbrx import DBRX
from executor.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, GLM4_LITE, KIMI_K2
from executor.families.ernie import ERNIE_4_5
from executor.families.gemma import GEMMA4
from executor.families.glm import GLM4
from executor.families.gpt_oss import GPT_OSS
from executor.families.granite import GRANITE
from executor.families.llama4 import LLAMA4
from executor.families.minimax import MINIMAX_M2
from executor.families.mixtral import MIXTRAL
from executor.families.phi import PHI
from executor.families.qwen import OLMOE, QWEN2, QWEN3, QWEN3_VL
from executor.families.qwen3_next import QWEN3_5, QWEN3_NEXT
from executor.model.architecture import Architecture
from hrm.errors import ModelError
from hrm.model_spec import decoder_keys
from hrm.model_spec.quantisation import quantisation

__all__ = ["FAMILIES", "Architecture", "Family", "family_for"]

FAMILIES: Final[dict[str, Family]] = {
    "mixtral": MIXTRAL,
    "dbrx": DBRX,
    "qwen2_moe": QWEN2,
    "qwen3_moe": QWEN3,
    "qwen3_vl_moe_text": QWEN3_VL,
    "olmoe": OLMOE,
    "glm4_moe": GLM4,
    "minimax_m2": MINIMAX_M2,
    "ernie4_5_moe": ERNIE_4_5,
    "granitemoe": GRANITE,
    "phimoe": PHI,
    # with windows, chunks or sinks
    "gpt_oss": GPT_OSS,
    "llama4_text": LLAMA4,
    "gemma4_text": GEMMA4,
    # with the gated delta rule
    "qwen3_next": QWEN3_NEXT,
    "qwen3_5_moe_text": QWEN3_5,
    # with latent attention
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
    "kimi_k2": KIMI_K2,
    "glm4_moe_lite": GLM4_LITE,
}


def family_for(config: dict[str, Any], where: str) -> Family:
    """The family of a config by its `model_type`, or by that of its text part.

    Raises ModelError naming `where` if it is unknown, or if the weights are quantised in a way that is not read.
    """
    keys = decoder_keys(config, where)
    name = keys.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise ModelError(
            f"{where}: model_type",
            "<missing>" if name is None else name,
            f"must be one of {', '.join(FAMILIES)}",
            "use a model of one of these: hrm models lists them",
        )
    quantisation(keys)
    return family
