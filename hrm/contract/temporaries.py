"""Memory that a layer needs while it is computed, beside what it reads and writes."""

from typing import Final

from hrm.contract.rows import ROUTING_BYTES
from hrm.formats import Format
from hrm.model_spec import ModelSpec
from hrm.numeric import Number, maximum

ALIGNMENT_BYTES: Final = 64  # temporaries start at multiples of this
WORKSPACE_ROUNDING_BYTES: Final = 16 * ALIGNMENT_BYTES  # as so many at most are there at once
# Tokens of a later part of a prompt that a CPU attends with at once: more would compute much of the
# future, fewer are slow.
MASK_BLOCK_TOKENS: Final = 128


def workspace_bytes(
    spec: ModelSpec, num_tokens: Number, compute: Format, *, ranks: int = 1, longest_tokens: Number = 0
) -> Number:
    """Temporaries of one layer over `num_tokens` tokens, whichever expert they all go to.

    Queries, keys, values and attention output stay throughout. Beside them are, one after the
    other: the normed input with a float32 copy; what the rotary embedding needs; a second attention
    output; and last the experts' input and output, the routing with its sorted form, and one
    expert's gathered input and both halves of its gated activation. Of these, `ranks` GPUs in
    tensor parallel divide all but what is as wide as the hidden state. Latent attention expands
    its keys and values besides, and shared or dense FFNs may be wider than an expert. Beside the
    second attention output of a part of a split prompt lies a line of its mask; `longest_tokens`
    bounds what such a prompt has so far.
    """
    size = compute.bytes_of(1)
    queries, output, head = spec.query_size, spec.attention_output_size, spec.head_dim
    hidden = ranks * spec.hidden_size
    inner = max(spec.intermediate_size, spec.shared_intermediate_size, spec.dense_intermediate_size)
    routing = (size + 8) * spec.num_experts + (ROUTING_BYTES + 36) * spec.experts_per_token
    stages = (
        size * hidden + 4 * hidden + 4 * ranks,
        size * (queries + spec.kv_elements // 2) // 2 + (4 + size) * head,
        size * output,
        size * (3 * hidden + 2 * inner) + ranks * routing,
    )
    kept = queries + output + spec.kv_elements
    if spec.latent_attention is not None:
        kept += queries + output
    mask_line = size * (longest_tokens + MASK_BLOCK_TOKENS * (longest_tokens > 0))
    temporaries = maximum(num_tokens * max(stages), num_tokens * size * output + mask_line)
    return num_tokens * size * kept + temporaries + WORKSPACE_ROUNDING_BYTES


def skips_in_last_layer(prompts: float, tokens: float) -> bool:
    """Whether the model's last layer goes on after attention with few of a chunk's tokens.

    In prefill only what a prompt ends with is sampled from. The last tokens of the `prompts` that
    end in a chunk are gathered beside it, which its workspace has room for, whatever the model, if
    they are a quarter of it at most: `workspace_bytes` with hidden size D, experts of inner size I
    and attention outputs of O has max(3D + 2I, O) for each of all tokens, and they need another
    D + O and their own 3D + 2I.
    """
    return 4 * prompts <= tokens
