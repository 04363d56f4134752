"""Names of stored tensors: what a text model has under others, and what it does not need."""

import re
from collections.abc import Container
from typing import Final

# Buffers that follow from the config; old checkpoints carry them along.
IGNORED_SUFFIXES: Final = (
    ".rotary_emb.inv_freq",
    ".rotary_emb.original_inv_freq",
    ".rotary_emb.cos_cached",
    ".rotary_emb.sin_cached",
    ".rope.freqs",
    ".masked_bias",
)
# Parts that text does not pass through: pictures and sounds, and predictors of tokens further ahead.
OTHER_PARTS: Final = re.compile(
    r"(model\.)?((visual|vision|audio|image|multi_modal|mm|embed_vision|embed_audio|patch_merger)(_\w+)?"
    r"|talker|code2wav|token2wav|mtp(_\w+)?)(\.|$)"
)
AHEAD_SUFFIX: Final = ".eh_proj.weight"  # joins a token and a hidden state, in layers that predict further ahead
LAYER_NUMBER: Final = re.compile(r"\.(?:layers|blocks)\.(\d+)\.")
# What the parts of a quantised matrix are called, by the tools that write them.
QUANTISED_NAMES: Final = re.compile(
    r"\.(?P<part>qweight|qzeros|g_idx|scales|biases|weight_packed|weight_scale|weight_scale_inv|weight_shape"
    r"|weight_scale_2|weight_global_scale|weight_zero_point|weight_g_idx|absmax|quant_map|SCB"
    r"|input_scale|input_global_scale|[kv]_scale"
    r"|\w+_blocks|\w+_scales)$|\.(?P<state>quant_state\.\w+)$"
)
# Scales of what is computed with quantised matrices, and of caches: neither is quantised here as they say.
ACTIVATION_SCALES: Final = re.compile(r"\.(input_scale|input_global_scale|output_scale|[qkv]_scale|[kv]_zero_point)$")


def layer_number(name: str) -> int | None:
    """The number of the layer that a tensor is of; None if it is of none."""
    found = LAYER_NUMBER.search(name)
    return int(found[1]) if found is not None else None


def is_harmless(name: str, ahead: Container[int | None]) -> bool:
    """Whether text comes out the same without that tensor; `ahead` are layers that predict further ahead."""
    return layer_number(name) in ahead or name.endswith(IGNORED_SUFFIXES) or OTHER_PARTS.match(name) is not None
