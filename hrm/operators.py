"""FLOPs, bytes and launches of every task that computes, and bytes of every task that moves data.

Everything takes the number of requests in a micro-batch (m) and their mean context, as numbers or
NumPy arrays. GEMMs count 2 FLOPs a multiply-add; weights count once a task, and of the experts
only those that uniform routing is expected to hit.
"""

from dataclasses import dataclass, replace

from hrm.contract.launches import (
    ATTENTION_LAUNCHES_PER_TASK,
    FUSED_POST_ATTENTION_LAUNCHES,
    FUSED_PRE_ATTENTION_LAUNCHES,
    LAUNCHES_PER_EXPERT,
    POST_ATTENTION_LAUNCHES,
    PRE_ATTENTION_LAUNCHES,
    ROUTING_LAUNCHES,
    SAMPLE_LAUNCHES,
)
from hrm.contract.rows import ROUTING_BYTES
from hrm.formats import Formats
from hrm.model_spec import LayerKind, ModelSpec
from hrm.numeric import Number, maximum, minimum


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
    """What one task computes; `requests` are those whose attention may cost something each.

    `launches` are always issued, `unfused_launches` only where a layer has no fused kernels: where
    experts are computed one by one, and norm and rotary embedding by several operators.
    """

    kernels: tuple[Kernel, ...]
    launches: Number
    requests: Number = 0
    unfused_launches: Number = 0

    @property
    def flops(self) -> Number:
        """All FLOPs."""
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def num_bytes(self) -> Number:
        """All bytes touched at the level it runs on."""
        return sum(kernel.num_bytes for kernel in self.kernels)

    def with_passes(self, passes: float) -> "Operator":
        """The same where attention moves so many bytes for each byte of the cache."""
        kernels = tuple(
            replace(kernel, num_bytes=passes * kernel.num_bytes) if kernel.reads_kv else kernel
            for kernel in self.kernels
        )
        return replace(self, kernels=kernels)

    @property
    def intensity(self) -> Number:
        """Operational intensity: FLOPs a byte."""
        return self.flops / self.num_bytes


def gemms(rows: Number, parameters: int, touched: Number, formats: Formats) -> Kernel:
    """GEMMs of `rows` tokens with so many weights; `touched` elements of a token go in and out."""
    num_bytes = formats.weights.bytes_of(parameters) + formats.compute.bytes_of(rows, touched)
    return Kernel(2 * rows * parameters, num_bytes, rows)


def linear(rows: Number, inputs: int, outputs: int, formats: Formats) -> Kernel:
    """A GEMM of `rows` tokens with an inputs × outputs weight matrix."""
    return gemms(rows, inputs * outputs, inputs + outputs, formats)


def pre_attention(spec: ModelSpec, formats: Formats, m: Number) -> Operator:
    """Norm, QKV projection and rotary embedding of m tokens."""
    touched = spec.hidden_size + spec.query_size + spec.kv_elements
    projection = gemms(m, spec.qkv_parameters, touched, formats)
    fused = FUSED_PRE_ATTENTION_LAUNCHES
    return Operator((projection,), fused, unfused_launches=PRE_ATTENTION_LAUNCHES - fused)


def decode_attention(spec: ModelSpec, formats: Formats, m: Number, context: Number, kind: LayerKind) -> Operator:
    """Attention of m new tokens, each over `context` cached ones: QKᵀ and P·V, cache read once.

    A window caps the context. Latent attention works on the compressed cache, its up-projection
    applied to queries and outputs (DeepSeek-V2, arXiv 2405.04434, §2.1.2).
    """
    seen = spec.context_in(kind, context)
    kernel = Kernel(
        m * seen * spec.attention_flops_per_context_token,
        m * seen * spec.kv_bytes_per_token_layer(formats.kv_cache),
        m,
        reads_kv=True,
    )
    if not spec.latent_up_parameters:
        return Operator((kernel,), ATTENTION_LAUNCHES_PER_TASK, m)
    touched = spec.query_size + spec.attention_output_size
    up = gemms(m, spec.latent_up_parameters, touched, formats)
    return Operator((up, kernel), ATTENTION_LAUNCHES_PER_TASK, m)


def experts(spec: ModelSpec, formats: Formats, m: Number, num_experts: Number) -> Operator:
    """The part of the MoE FFN that falls on `num_experts` of the experts, for m tokens."""
    hit = num_experts * spec.experts_hit(m) / spec.num_experts
    routed = m * spec.experts_per_token * num_experts / spec.num_experts
    kernel = Kernel(
        2 * routed * spec.expert_parameters,
        formats.weights.bytes_of(hit, spec.expert_parameters)
        + formats.compute.bytes_of(routed, 2 * spec.hidden_size + 3 * spec.intermediate_size),
        maximum(routed / maximum(hit, 1e-9), 1.0),
    )
    # As a mean over layers, less than one expert means that some layers have none.
    any_here = minimum(num_experts, 1)
    one_by_one = any_here * ROUTING_LAUNCHES + hit * LAUNCHES_PER_EXPERT
    return Operator((kernel,), any_here, unfused_launches=one_by_one - any_here)


def dense_ffn(spec: ModelSpec, formats: Formats, m: Number, kind: LayerKind) -> Operator:
    """What every token goes through: shared experts, or the FFN of a layer without experts."""
    parameters, inner = spec.shared_parameters, spec.shared_intermediate_size
    if not kind.has_experts:
        parameters, inner = spec.dense_ffn_parameters, spec.dense_intermediate_size
    if not parameters:
        return Operator((), 0)
    touched = 2 * spec.hidden_size + 3 * inner
    return Operator((gemms(m, parameters, touched, formats),), LAUNCHES_PER_EXPERT)


def post_attention(spec: ModelSpec, formats: Formats, m: Number, gpu_experts: Number, kind: LayerKind) -> Operator:
    """Output projection, norm, router and dense FFN of m tokens, and the experts run with it."""
    output = linear(m, spec.attention_output_size, spec.hidden_size, formats)
    dense = dense_ffn(spec, formats, m, kind)
    launches = FUSED_POST_ATTENTION_LAUNCHES + dense.launches
    unfused = POST_ATTENTION_LAUNCHES - FUSED_POST_ATTENTION_LAUNCHES
    if not kind.has_experts:
        return Operator((output, *dense.kernels), launches, unfused_launches=unfused)
    router = linear(m, spec.hidden_size, spec.num_experts, formats)
    ffn = experts(spec, formats, m, gpu_experts)
    kernels = (output, router, *dense.kernels, *ffn.kernels)
    unfused = unfused + ffn.unfused_launches
    return Operator(kernels, launches + ffn.launches, unfused_launches=unfused)


def prefill_attention(
    spec: ModelSpec, formats: Formats, tokens: Number, prompt_len: Number, kind: LayerKind
) -> Operator:
    """A layer over a chunk of `tokens` in prompts of `prompt_len` up to causal attention.

    Prompts longer than the chunk are split: over all parts of one, attention is what it is over the
    whole, but for keys and values of earlier parts, which each later part reads again.
    """
    before = pre_attention(spec, formats, tokens)
    capped = spec.context_in(kind, prompt_len)
    mean_context = capped - capped * capped / (2 * prompt_len)
    expanded = spec.query_size + spec.attention_output_size
    part = minimum(prompt_len, tokens)
    prefix = spec.context_in(kind, (prompt_len - part) / 2)  # as a mean over the parts
    # What is read again comes from the cache, or is what latent attention expanded it to.
    compute, cache = formats.compute, formats.kv_cache
    of_prefix = cache.bytes_of(spec.kv_elements) if spec.latent_attention is None else compute.bytes_of(expanded)
    attention = Kernel(
        2 * tokens * mean_context * expanded,
        tokens * (compute.bytes_of(expanded + spec.kv_elements) + prefix / part * of_prefix),
        part,
    )
    kernels = (*before.kernels, attention)
    if spec.latent_up_parameters:
        touched = spec.kv_elements + expanded
        kernels = (gemms(tokens, spec.latent_up_parameters, touched, formats), *kernels)
    return Operator(kernels, before.launches, tokens / part, before.unfused_launches)


def sample(spec: ModelSpec, formats: Formats, m: Number) -> Operator:
    """Final norm, LM head and the choice of m next tokens."""
    return Operator((linear(m, spec.hidden_size, spec.vocab_size, formats),), SAMPLE_LAUNCHES)


# -- bytes of transfers -----------------------------------------------------------------------


def hidden_bytes(spec: ModelSpec, formats: Formats, tokens: Number) -> Number:
    """Hidden states of that many tokens."""
    return formats.compute.bytes_of(tokens, spec.hidden_size)


def qkv_bytes(spec: ModelSpec, formats: Formats, m: Number) -> Number:
    """Queries, keys and values of m new tokens."""
    return m * (formats.compute.bytes_of(spec.query_size) + spec.kv_bytes_per_token_layer(formats.kv_cache))


def attention_output_bytes(spec: ModelSpec, formats: Formats, m: Number) -> Number:
    """Attention outputs of m tokens, before the output projection."""
    return formats.compute.bytes_of(m, spec.attention_output_size)


def kv_bytes(spec: ModelSpec, formats: Formats, tokens: Number) -> Number:
    """One layer's keys and values of that many tokens."""
    return tokens * spec.kv_bytes_per_token_layer(formats.kv_cache)


def routed_token_bytes(spec: ModelSpec, formats: Formats, m: Number) -> Number:
    """Normed hidden states of m tokens with their routing."""
    return hidden_bytes(spec, formats, m) + m * spec.experts_per_token * ROUTING_BYTES
