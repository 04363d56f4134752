"""How published weights are stored, by what their config says of quantisation."""

from pathlib import Path
from typing import Any, Final, cast

from hrm.decoding import read_json_object
from hrm.errors import ModelError
from hrm.files import is_file
from hrm.model_spec.config_file import Keys

# Where configs say so: transformers', MLX's, and an older one.
QUANTISATION_KEYS: Final = ("quantization_config", "quantization", "compression_config")
MODELOPT_FILE: Final = "hf_quant_config.json"  # where NVIDIA ModelOpt says so, if not there
_SHOWN: Final = 40  # characters of a method's name


def with_quantisation(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A config with what a file beside it says of quantisation, if it says nothing itself.

    Raises ModelError if the file is none of JSON.
    """
    within = cast("list[dict[str, Any]]", [part for part in config.values() if isinstance(part, dict)])
    path = folder / MODELOPT_FILE
    if any(key in section for section in (config, *within) for key in QUANTISATION_KEYS) or not is_file(path):
        return config
    told = read_json_object(path, "a readable JSON file", ModelError, remedy="download it again")
    section = Keys(told, str(path)).section("quantization")
    return {**config, QUANTISATION_KEYS[0]: {"quant_method": "modelopt", **section.values}}


def published_dtype(keys: Keys) -> str:
    """How the weights are quantised; empty if they are not."""
    name = next((key for key in QUANTISATION_KEYS if keys.get(key)), None)
    if name is None:
        return ""
    given = keys.section(name)
    told = _by_groups(given) or _by_method(given)
    experts = keys.get("expert_dtype")
    return f"{told}, {experts} experts" if experts in ("fp4", "fp8") else told


def _by_method(given: Keys) -> str:
    method = _word(given.get("quant_algo")).lower() or _word(given.get("quant_method"))
    if method == "mxfp4":
        return "mxfp4 experts"
    bits = given.get("bits")
    told = f"{bits}-bit" if isinstance(bits, int) and 0 < bits <= 16 else ""
    return f"{method} {told}".strip() or "quantised"


def _by_groups(given: Keys) -> str:
    """Of compressed-tensors: the weights of the first group, by type and bits."""
    groups: Any = given.get("config_groups")
    if _word(given.get("quant_method")) != "compressed-tensors" or not isinstance(groups, dict):
        return ""
    first: Any = next(iter(cast("dict[str, Any]", groups).values()), None)
    weights: Any = cast("dict[str, Any]", first).get("weights") if isinstance(first, dict) else None
    if not isinstance(weights, dict):
        return ""
    sizes = cast("dict[str, Any]", weights)
    bits, kind = sizes.get("num_bits"), {"int": "int", "float": "fp"}.get(_word(sizes.get("type")))
    if not kind or not isinstance(bits, int) or not 0 < bits <= 16:
        return ""
    prefix = "mx" if _word(given.get("format")).startswith("mx") else ""
    return f"{prefix}{kind}{bits}"


def _word(value: object) -> str:
    return value if isinstance(value, str) and value.isprintable() and len(value) <= _SHOWN else ""
