"""Memory that a layer needs while it is computed, beside what it reads and writes."""

from typing import Final

TEMPORARY_ALIGNMENT_BYTES: Final = 64  # temporaries start at multiples of this
WORKSPACE_ROUNDING_BYTES: Final = 16 * TEMPORARY_ALIGNMENT_BYTES  # as so many at most are there at once
# Tokens of a later part of a prompt that a CPU attends with at once: more would compute much of the
# future, fewer are slow.
MASK_BLOCK_TOKENS: Final = 128
DEQUANTISED_WEIGHTS: Final = 1 << 22  # of a packed matrix, at most, that are dequantised at once where torch multiplies
DEQUANTISED_BYTES: Final = 8  # of each of these: what codes are looked up by, and the result
DEQUANTISED_IN_ORDER: Final = 4  # times as many bytes, of as many weights less, where columns have an order


def skips_in_last_layer(prompts: float, tokens: float) -> bool:
    """Whether the model's last layer goes on after attention with few of a chunk's tokens.

    In prefill only what a prompt ends with is sampled from. The last tokens of the `prompts` that
    end in a chunk are gathered beside it, which its workspace has room for, whatever the model, if
    they are a quarter of it at most: `hrm.model_spec.workspace` with hidden size D, experts of inner size I
    and attention outputs of O has max(3D + 2I, O) for each of all tokens, and they need another
    D + O and their own 3D + 2I.
    """
    return 4 * prompts <= tokens
