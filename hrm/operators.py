"""Work and bytes that are the model's: those of a layer are its blocks' (`hrm.layers`).

Everything takes the number of tokens, as a number or a NumPy array.
"""

from hrm.contract.launches import SAMPLE_LAUNCHES
from hrm.contract.rows import ROUTING_BYTES
from hrm.formats import Formats
from hrm.layers import Operator, linear
from hrm.model_spec import ModelSpec
from hrm.numeric import Number


def sample(spec: ModelSpec, formats: Formats, m: Number) -> Operator:
    """Final norm, LM head and the choice of m next tokens."""
    return Operator((linear(m, spec.hidden_size, spec.vocab_size, formats),), SAMPLE_LAUNCHES)


def hidden_bytes(spec: ModelSpec, formats: Formats, tokens: Number) -> Number:
    """Hidden states of that many tokens."""
    return formats.compute.bytes_of(spec.residual_size, tokens)


def routed_token_bytes(spec: ModelSpec, formats: Formats, m: Number) -> Number:
    """Normed hidden states of m tokens, what of them waits for the experts' sum, and their routing."""
    return (
        formats.compute.bytes_of(m, spec.hidden_size + spec.pending_elements)
        + m * spec.experts_per_token * ROUTING_BYTES
    )
