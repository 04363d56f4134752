"""FLOPs, bytes and launches of every task that computes, and bytes of every task that moves data.

Everything takes the number of requests in a micro-batch (m) and their mean context, as numbers or
NumPy arrays. GEMMs count 2 FLOPs a multiply-add; weights count once a task, and of the experts
only those that uniform routing is expected to hit.
"""

from dataclasses import dataclass
from typing import Final

from hrm.model_spec import ROUTING_BYTES, ModelSpec
from hrm.numeric import Number, maximum
from hrm.units import DTYPE_BYTES

# Operators that a task issues, views included; a test counts the executor's.
PRE_ATTENTION_LAUNCHES: Final = 33
ATTENTION_LAUNCHES_PER_TASK: Final = 11
ATTENTION_LAUNCHES_PER_REQUEST: Final = 4
POST_ATTENTION_LAUNCHES: Final = 20
ROUTING_LAUNCHES: Final = 8
LAUNCHES_PER_EXPERT: Final = 14
SAMPLE_LAUNCHES: Final = 17


@dataclass(frozen=True, slots=True)
class Kernel:
    """One piece of computing at a level: FLOPs, bytes touched there, and rows of its GEMM.

    `reads_kv` marks decode attention, whose roof is the rate at which its kernel reads the cache.
    """

    flops: Number
    num_bytes: Number
    rows: Number
    reads_kv: bool = False


@dataclass(frozen=True, slots=True)
class Operator:
    """What one task computes."""

    kernels: tuple[Kernel, ...]
    launches: Number

    @property
    def flops(self) -> Number:
        """All FLOPs."""
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def num_bytes(self) -> Number:
        """All bytes touched at the level it runs on."""
        return sum(kernel.num_bytes for kernel in self.kernels)

    @property
    def intensity(self) -> Number:
        """Operational intensity: FLOPs a byte."""
        return self.flops / self.num_bytes


def linear(rows: Number, inputs: int, outputs: int, dtype: str) -> Kernel:
    """A GEMM of `rows` tokens with an inputs × outputs weight matrix."""
    size = DTYPE_BYTES[dtype]
    touched = inputs * outputs * size + rows * (inputs + outputs) * size
    return Kernel(2 * rows * inputs * outputs, touched, rows)


def pre_attention(spec: ModelSpec, dtype: str, m: Number) -> Operator:
    """Norm, QKV projection and rotary embedding of m tokens."""
    projection = linear(m, spec.hidden_size, spec.query_size + 2 * spec.kv_size, dtype)
    return Operator((projection,), PRE_ATTENTION_LAUNCHES)


def decode_attention(spec: ModelSpec, dtype: str, m: Number, context: Number) -> Operator:
    """Attention of m new tokens, each over `context` cached ones: QKᵀ and P·V, cache read once."""
    kernel = Kernel(
        4 * m * context * spec.query_size,
        m * context * spec.kv_bytes_per_token_layer(dtype),
        m,
        reads_kv=True,
    )
    return Operator((kernel,), ATTENTION_LAUNCHES_PER_TASK + ATTENTION_LAUNCHES_PER_REQUEST * m)


def experts(spec: ModelSpec, dtype: str, m: Number, num_experts: Number) -> Operator:
    """The part of the MoE FFN that falls on `num_experts` of the experts, for m tokens."""
    size = DTYPE_BYTES[dtype]
    hit = num_experts * spec.experts_hit(m) / spec.num_experts
    routed = m * spec.experts_per_token * num_experts / spec.num_experts
    kernel = Kernel(
        2 * routed * spec.expert_parameters,
        hit * spec.expert_parameters * size
        + routed * (2 * spec.hidden_size + 3 * spec.intermediate_size) * size,
        maximum(routed / maximum(hit, 1e-9), 1.0),
    )
    # As a mean over layers, less than one expert means that some layers have none.
    any_here = -maximum(-num_experts, -1)
    return Operator((kernel,), any_here * ROUTING_LAUNCHES + hit * LAUNCHES_PER_EXPERT)


def post_attention(spec: ModelSpec, dtype: str, m: Number, gpu_experts: Number) -> Operator:
    """Output projection, norm and router of m tokens, and the experts that run with it."""
    output = linear(m, spec.query_size, spec.hidden_size, dtype)
    router = linear(m, spec.hidden_size, spec.num_experts, dtype)
    ffn = experts(spec, dtype, m, gpu_experts)
    return Operator((output, router, *ffn.kernels), POST_ATTENTION_LAUNCHES + ffn.launches)


def prefill_layer(spec: ModelSpec, dtype: str, tokens: Number, prompt_len: Number) -> Operator:
    """One whole layer over `tokens` prompt tokens in prompts of `prompt_len`; causal attention."""
    before, after = pre_attention(spec, dtype, tokens), post_attention(
        spec, dtype, tokens, spec.num_experts
    )  # fmt: skip
    size = DTYPE_BYTES[dtype]
    attention = Kernel(
        2 * tokens * prompt_len * spec.query_size,
        tokens * (2 * spec.query_size + 2 * spec.kv_size) * size,
        prompt_len,
    )
    launches = before.launches + after.launches
    launches = launches + ATTENTION_LAUNCHES_PER_REQUEST * tokens / prompt_len
    return Operator((*before.kernels, attention, *after.kernels), launches)


def sample(spec: ModelSpec, dtype: str, m: Number) -> Operator:
    """Final norm, LM head and the choice of m next tokens."""
    return Operator((linear(m, spec.hidden_size, spec.vocab_size, dtype),), SAMPLE_LAUNCHES)


# -- bytes of transfers -----------------------------------------------------------------------


def hidden_bytes(spec: ModelSpec, dtype: str, tokens: Number) -> Number:
    """Hidden states of that many tokens."""
    return tokens * spec.hidden_size * DTYPE_BYTES[dtype]


def qkv_bytes(spec: ModelSpec, dtype: str, m: Number) -> Number:
    """Queries, keys and values of m new tokens."""
    return m * (spec.query_size + 2 * spec.kv_size) * DTYPE_BYTES[dtype]


def attention_output_bytes(spec: ModelSpec, dtype: str, m: Number) -> Number:
    """Attention outputs of m tokens, before the output projection."""
    return m * spec.query_size * DTYPE_BYTES[dtype]


def kv_bytes(spec: ModelSpec, dtype: str, tokens: Number) -> Number:
    """One layer's keys and values of that many tokens."""
    return tokens * spec.kv_bytes_per_token_layer(dtype)


def routed_token_bytes(spec: ModelSpec, dtype: str, m: Number) -> Number:
    """Normed hidden states of m tokens with their routing."""
    return hidden_bytes(spec, dtype, m) + m * spec.experts_per_token * ROUTING_BYTES
