"""Bytes that a policy needs at each memory level, by purpose.

The search checks policies with these formulas and the executor sizes its arenas from them, so
what is planned is what is allocated. They take NumPy arrays as well as integers.
"""

from dataclasses import dataclass
from typing import Final

from hrm.errors import PolicyError
from hrm.hardware import HardwareProfile, MemoryLevel
from hrm.model_spec import ROUTING_BYTES, ModelSpec
from hrm.numeric import Number, maximum
from hrm.parallel import part_of
from hrm.policy import KV_BLOCK_TOKENS, Policy
from hrm.schedules import pages_of
from hrm.schedules.pipeline import BUFFERS, STAGING_PAGES, WEIGHT_SLOTS
from hrm.tasks import Device
from hrm.units import DTYPE_BYTES, format_bytes

WORKSPACE_ROUNDING_BYTES: Final = 1024  # temporaries start at multiples of 64 bytes
MASK_BLOCK_TOKENS: Final = 128  # that a CPU attends with at once after a prefix
LOGIT_BYTES: Final = 4  # logits are float32 whatever the dtype
REQUEST_NUMBER_BYTES: Final = 40  # its position, row of the cache, length and the like, on a GPU
TOKEN_NUMBER_BYTES: Final = 16  # a prompt's token: its position, and where its prompt ends
COUNT_BYTES: Final = 8  # of the tokens that an expert was sent


@dataclass(frozen=True, slots=True)
class LevelPlan:
    """What is planned at one level."""

    name: str
    capacity_bytes: int
    purposes: dict[str, int]

    @property
    def planned_bytes(self) -> int:
        """All purposes together."""
        return sum(self.purposes.values())


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a policy needs at the top level and at the host; on one level both are the same."""

    gpu: LevelPlan
    cpu: LevelPlan

    @property
    def fits(self) -> bool:
        """Whether no level overflows."""
        return all(plan.planned_bytes <= plan.capacity_bytes for plan in (self.gpu, self.cpu))

    def check_fits(self) -> None:
        """Raise PolicyError naming the level, the need and the remedy if a level overflows."""
        for plan, flag in ((self.gpu, "--gpu-memory"), (self.cpu, "--cpu-memory")):
            if plan.planned_bytes > plan.capacity_bytes:
                purpose, size = max(plan.purposes.items(), key=lambda item: item[1])
                raise PolicyError(
                    f"policy: memory at level {plan.name}",
                    f"<{format_bytes(plan.planned_bytes)} planned>",
                    f"must fit the usable {format_bytes(plan.capacity_bytes)}"
                    f" (the largest part is {purpose.replace('_', ' ')}, {format_bytes(size)})",
                    f"lower micro_batch_size, batch_size or residency, or raise {flag}",
                )  # fmt: skip


def workspace_bytes(
    spec: ModelSpec, num_tokens: Number, dtype: str, *, ranks: int = 1, longest_tokens: Number = 0
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
    size = DTYPE_BYTES[dtype]
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


def exchange_bytes_per_request(
    spec: ModelSpec, dtype: str, *, ffn_on_cpu: Number, ranks: int = 1
) -> Number:
    """Decode buffers of one request: hidden state, QKV, attention and experts' output, numbers.

    Every one of `ranks` GPUs in tensor parallel has the whole hidden state and experts' output.
    """
    size, hidden = DTYPE_BYTES[dtype], ranks * spec.hidden_size
    elements = hidden + spec.query_size + spec.attention_output_size + spec.kv_elements
    routed = 2 * hidden * size + ROUTING_BYTES * spec.experts_per_token
    return elements * size + ffn_on_cpu * routed + REQUEST_NUMBER_BYTES


def kv_cache_tokens(spec: ModelSpec, micro_batch_size: Number, kv_tokens: Number) -> Number:
    """Tokens that a micro-batch's cache holds in all layers together.

    `kv_tokens` is what it holds in a layer without a window; with one, no request needs more than
    the window and the block that it ends in.
    """
    total = 0 * kv_tokens
    for kind, layers in spec.layer_kinds().items():
        held = kv_tokens
        if kind.window:
            held = -maximum(-kv_tokens, -micro_batch_size * (kind.window + KV_BLOCK_TOKENS))
        total = total + layers * held
    return total


def prefix_bytes_per_token(spec: ModelSpec, dtype: str, *, ranks: int = 1) -> int:
    """Bytes that a split prompt keeps on the GPU for each token: one layer's keys and values.

    Latent attention keeps what it expands its cache to, of which every GPU has its own heads.
    """
    if spec.latent_attention is not None:
        return (spec.query_size + spec.attention_output_size) * DTYPE_BYTES[dtype]
    return spec.kv_copies(ranks) * spec.kv_bytes_per_token_layer(dtype)


def gpu_purposes(
    spec: ModelSpec, dtype: str, *, batch_size: Number, micro_batch_size: Number, kv_tokens: Number,
    chunk_tokens: Number, gpu_kv_micro_batches: Number, streams_kv: Number, ffn_on_cpu: Number,
    resident_bytes: Number, max_streamed_bytes: Number, prefix_tokens: Number = 0, ranks: int = 1,
    batches: int = 1,
) -> dict[str, Number]:  # fmt: skip
    """Bytes at the GPU level by purpose; `kv_tokens` is the cache of one micro-batch in tokens.

    `resident_bytes` are the layers' weights that stay and `max_streamed_bytes` the most that any
    one layer streams. The level is all GPUs together: `ranks` of them in tensor parallel hold the
    hidden states each, and the cache more than once if it has fewer heads than there are GPUs. A
    stage of a pipeline keeps the caches of all `batches` under way.
    """
    size = DTYPE_BYTES[dtype]
    layer_kv = spec.kv_copies(ranks) * spec.kv_bytes_per_token_layer(dtype)
    tokens_at_once = maximum(micro_batch_size, chunk_tokens)
    cache_tokens = kv_cache_tokens(spec, micro_batch_size, kv_tokens)
    return {
        "resident_weights": resident_bytes + spec.head_parameters * size,
        "weight_slots": WEIGHT_SLOTS * max_streamed_bytes,
        "kv_cache": batches * gpu_kv_micro_batches * cache_tokens * layer_kv,
        "kv_buffers": streams_kv * BUFFERS * kv_tokens * layer_kv,
        "exchange": batch_size
        * exchange_bytes_per_request(spec, dtype, ffn_on_cpu=ffn_on_cpu, ranks=ranks),
        "prefill_buffers": BUFFERS
        * chunk_tokens
        * (ranks * spec.hidden_size * size + layer_kv + TOKEN_NUMBER_BYTES),
        "prefix_buffer": prefix_tokens * prefix_bytes_per_token(spec, dtype, ranks=ranks),
        "workspace": workspace_bytes(
            spec, tokens_at_once, dtype, ranks=ranks, longest_tokens=kv_tokens
        )
        + COUNT_BYTES * spec.num_layers * spec.num_experts,
        "logits": micro_batch_size * (spec.vocab_size * (LOGIT_BYTES + size)),
    }


def cpu_purposes(
    spec: ModelSpec, dtype: str, *, batch_size: Number, micro_batch_size: Number, kv_tokens: Number,
    num_micro_batches: Number, gpu_kv_micro_batches: Number, ffn_on_cpu: Number,
    streamed_bytes: Number, staging_bytes: Number, latent_up_bytes: Number = 0, batches: int = 1,
) -> dict[str, Number]:  # fmt: skip
    """Bytes at the host's level by purpose; `streamed_bytes` is over all layers.

    `latent_up_bytes` are up-projections of latent attention that the CPU needs though their layers
    are resident on the GPU.
    """
    size = DTYPE_BYTES[dtype]
    cache_bytes = kv_cache_tokens(
        spec, micro_batch_size, kv_tokens
    ) * spec.kv_bytes_per_token_layer(dtype)
    return {
        "weights": streamed_bytes + spec.embedding_parameters * size + latent_up_bytes,
        "staging": staging_bytes,
        "kv_cache": batches * (num_micro_batches - gpu_kv_micro_batches) * cache_bytes,
        "exchange": batch_size * exchange_bytes_per_request(spec, dtype, ffn_on_cpu=ffn_on_cpu),
        "prefill_hidden": num_micro_batches
        * kv_tokens
        * (spec.hidden_size * size + TOKEN_NUMBER_BYTES),
        "workspace": ffn_on_cpu * workspace_bytes(spec, micro_batch_size, dtype),
    }


def latent_up_bytes(
    spec: ModelSpec, dtype: str, *, cpu_attention: Number, resident_dense: Number
) -> Number:
    """Bytes of up-projections that must lie on the host beside those on the GPU."""
    held_twice = cpu_attention * resident_dense
    return held_twice * spec.num_layers * spec.latent_up_parameters * DTYPE_BYTES[dtype]


def plan_memory(spec: ModelSpec, policy: Policy, profile: HardwareProfile) -> MemoryPlan:
    """Bytes that the policy needs at each level of the machine.

    On a machine of one level everything is planned there: `gpu` and `cpu` are then that level. In
    pipeline parallel it is one stage that is planned, with its share of the machine.
    """
    spec, profile = part_of(spec, profile, policy.parallelism)
    gpu, cpu = purposes(spec, policy, ranks=profile.num_gpus, batches=profile.num_stages)
    if profile.has_accelerator:
        return MemoryPlan(_level(profile.top, gpu), _level(profile.host, cpu))
    both = {key: gpu.get(key, 0) + cpu.get(key, 0) for key in {**gpu, **cpu}}
    return MemoryPlan(_level(profile.top, both), _level(profile.top, both))


def purposes(
    spec: ModelSpec, policy: Policy, *, ranks: int = 1, batches: int = 1
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by purpose at the GPU's and at the host's level, whether or not they are one."""
    streamed = [policy.streamed_bytes(spec, layer) for layer in range(spec.num_layers)]
    n, on_gpu = policy.num_micro_batches, policy.gpu_kv_micro_batches
    ffn_on_cpu = int(policy.ffn is Device.CPU and max(streamed) > 0)
    gpu = gpu_purposes(
        spec,
        policy.dtype,
        batch_size=policy.batch_size,
        micro_batch_size=policy.micro_batch_size,
        kv_tokens=policy.kv_tokens_per_micro_batch,
        chunk_tokens=policy.prefill_chunk_tokens,
        gpu_kv_micro_batches=on_gpu,
        streams_kv=int(policy.attention is Device.GPU and on_gpu < n),
        ffn_on_cpu=ffn_on_cpu,
        resident_bytes=spec.total_layer_bytes(policy.dtype) - sum(streamed),
        max_streamed_bytes=max(streamed),
        prefix_tokens=policy.prefix_buffer_tokens,
        ranks=ranks,
        batches=batches,
    )
    cpu = cpu_purposes(
        spec,
        policy.dtype,
        batch_size=policy.batch_size,
        micro_batch_size=policy.micro_batch_size,
        kv_tokens=policy.kv_tokens_per_micro_batch,
        num_micro_batches=n,
        gpu_kv_micro_batches=on_gpu,
        ffn_on_cpu=ffn_on_cpu,
        streamed_bytes=sum(streamed),
        staging_bytes=staging_bytes(spec, policy),
        latent_up_bytes=latent_up_bytes(
            spec,
            policy.dtype,
            cpu_attention=int(policy.attention is Device.CPU and on_gpu < n),
            resident_dense=int(policy.resident_dense),
        ),
        batches=batches,
    )
    return gpu, cpu


def staging_bytes(spec: ModelSpec, policy: Policy) -> int:
    """Pinned pages between pageable memory and the link; 0 without staging."""
    if not policy.staging:
        return 0
    largest = max(policy.streamed_bytes(spec, layer) for layer in range(spec.num_layers))
    size = DTYPE_BYTES[policy.dtype]  # a page holds whole elements
    return STAGING_PAGES * -(-largest // (pages_of(policy) * size)) * size


def _level(level: MemoryLevel, purposes: dict[str, int]) -> LevelPlan:
    return LevelPlan(
        level.name, level.usable_bytes, {key: int(size) for key, size in purposes.items() if size}
    )
