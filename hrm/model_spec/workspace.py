"""Bytes that computing a layer takes for a while, beside its weights and what it reads and writes."""

from functools import lru_cache
from typing import NamedTuple, overload

from hrm.contract.temporaries import DEQUANTISED_BYTES, DEQUANTISED_WEIGHTS, MASK_BLOCK_TOKENS, WORKSPACE_ROUNDING_BYTES
from hrm.formats import Format
from hrm.model_spec.spec import ModelSpec
from hrm.numeric import Number, maximum


@overload
def workspace_bytes(spec: ModelSpec, num_tokens: int, compute: Format, *, longest_tokens: int = 0) -> int: ...


@overload
def workspace_bytes(spec: ModelSpec, num_tokens: Number, compute: Format, *, longest_tokens: Number = 0) -> Number: ...


def workspace_bytes(spec: ModelSpec, num_tokens: Number, compute: Format, *, longest_tokens: Number = 0) -> Number:
    """Temporaries of any layer over `num_tokens` tokens, whichever expert they all go to.

    What attention is computed from and its output stay throughout. Beside them are, one after the
    other: the normed input with a float32 copy; what attention needs; and last the FFN's input and
    output, the routing with its sorted form, and the gathered input and both halves of the gated
    activation of the widest FFN. Where something waits for the sum of all experts, the FFN's input is
    normed in two ways besides. Beside the second attention output of a part of a split prompt lies a
    line of its mask; `longest_tokens` bounds what such a prompt has so far. Linear attention needs its
    temporaries for one block of tokens only. Of packed matrices some rows are dequantised.
    """
    of_model = _temporaries_of(spec, compute)
    mask_line = of_model.element * (longest_tokens + MASK_BLOCK_TOKENS * (longest_tokens > 0))
    temporaries = maximum(num_tokens * of_model.stage, num_tokens * of_model.output + mask_line, of_model.block)
    return num_tokens * of_model.kept + temporaries + of_model.dequantised + WORKSPACE_ROUNDING_BYTES


class _Temporaries(NamedTuple):
    """Bytes that depend on the model alone: of a token's element, of a token, of a block, and of dequantised rows."""

    element: int
    kept: int
    stage: int
    output: int
    block: int
    dequantised: int


@lru_cache(maxsize=64)  # searches ask it of the same model thousands of times
def _temporaries_of(spec: ModelSpec, compute: Format) -> _Temporaries:
    size, hidden = compute.bytes_of(1), spec.hidden_size
    mixers = [kind.mixer for kind in spec.layer_kinds()]
    inner = max(block.inner_size for kind in spec.layer_kinds() for block in kind.ffn)
    routing = max((block.routing_bytes(compute) for kind in spec.layer_kinds() for block in kind.experts), default=0)
    normed, waiting = size * hidden + 4 * (spec.residual_size + 1), spec.pending_elements
    stages = (
        normed + size * (hidden + waiting) * (waiting > 0),
        max(mixer.temporary_bytes(compute) for mixer in mixers),
        size * (3 * hidden + waiting + 2 * max(inner, spec.least_inner_size)) + routing,
    )
    return _Temporaries(
        element=size,
        kept=size * max(mixer.kept_elements for mixer in mixers),
        stage=max(stages),
        output=size * max(mixer.returned_elements for mixer in mixers),
        block=max(mixer.block_bytes for mixer in mixers),
        dequantised=DEQUANTISED_BYTES * min(DEQUANTISED_WEIGHTS, spec.largest_packed),
    )
