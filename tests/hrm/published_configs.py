"""The published config.json of every built-in model, with keys changed or left out."""

from typing import Any

from hrm.model_spec.built_in import PUBLISHED


def decoder_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of the text part."""
    return config.get("text_config", config)


def changed(name: str, **changes: Any) -> dict[str, Any]:
    """A published config with keys of its text part changed."""
    config = PUBLISHED[name]
    if "text_config" in config:
        return {**config, "text_config": {**config["text_config"], **changes}}
    return {**config, **changes}


def without(name: str, *keys: str) -> dict[str, Any]:
    """A published config without those keys of its text part."""
    kept = {key: value for key, value in decoder_keys(PUBLISHED[name]).items() if key not in keys}
    return {**PUBLISHED[name], "text_config": kept} if "text_config" in PUBLISHED[name] else kept
