"""Which families the executor runs, by the `model_type` of their config's text part."""

from typing import Final

EXECUTED_FAMILIES: Final = (
    "mixtral",
    "dbrx",
    "qwen3_moe",
    # with windows, chunks or sinks
    "gpt_oss",
)
