"""Bytes that a policy needs at each memory level, by purpose.

The search checks policies with these formulas and the executor sizes its arenas from them, so
what is planned is what is allocated. They take NumPy arrays as well as integers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from hrm.contract.rings import BUFFERS, STAGING_PAGES, WEIGHT_SLOTS
from hrm.contract.rows import (
    COUNT_BYTES,
    KV_BLOCK_TOKENS,
    LOGIT_BYTES,
    REQUEST_NUMBER_BYTES,
    ROUTING_BYTES,
    TOKEN_NUMBER_BYTES,
)
from hrm.contract.temporaries import workspace_bytes
from hrm.errors import PolicyError
from hrm.formats import Format, Formats
from hrm.hardware import CPU, HardwareProfile, MemoryLevel
from hrm.machines import MAX_RESERVE_SHARE, reserve_if_resized
from hrm.model_spec import ModelSpec
from hrm.numeric import Number, maximum, minimum
from hrm.parallel import part_for
from hrm.policy import Policy
from hrm.schedules import pages_of
from hrm.tasks import Device
from hrm.units import at_least_bytes, format_bytes

# Purposes of the host's memory that cross the link, in the order in which they are pinned.
ALWAYS_PINNED: Final = ("staging", "exchange")  # small, and in every layer's way
PINNED_IF_THERE_IS_ROOM: Final = ("prefill_hidden", "kv_cache")
PINNED: Final = "pinned"  # the part of the host's memory that devices read and write themselves


@dataclass(frozen=True, slots=True)
class LevelPlan:
    """What is planned at one level, of whose bytes `capacity_bytes` are usable beside its reserve.

    `reserve_bytes` are those of another capacity, if the level is given one. It is one of so many
    equal `parts` of what the machine has.
    """

    name: str
    capacity_bytes: int
    purposes: dict[str, int]
    reserve_bytes: float = 0.0
    parts: int = 1

    @property
    def planned_bytes(self) -> int:
        """All purposes together."""
        return sum(self.purposes.values())

    @property
    def lacking_bytes(self) -> int:
        """How much more is planned than there is."""
        return max(0, self.planned_bytes - self.capacity_bytes)

    @property
    def option(self) -> str:
        """The option with the least memory of the whole machine that is enough for the plan."""
        flag = "--cpu-memory" if self.name == CPU else "--gpu-memory"
        planned = self.planned_bytes + 2  # of rounding to whole bytes
        least = self.parts * min(planned + self.reserve_bytes, planned / (1 - MAX_RESERVE_SHARE))
        return f"{flag} {at_least_bytes(least)}"


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a policy needs at the top level and at the host; on one level both are the same.

    `pinned` is what of the host's memory must be pinned, where not all of it can be.
    """

    gpu: LevelPlan
    cpu: LevelPlan
    pinned: LevelPlan | None = None

    @property
    def levels(self) -> tuple[LevelPlan, ...]:
        """What is planned at every level, each once, and pinned."""
        plans = (self.gpu, self.cpu, *([self.pinned] if self.pinned else []))
        return tuple({plan.name: plan for plan in plans}.values())

    @property
    def fits(self) -> bool:
        """Whether no level overflows."""
        return all(plan.planned_bytes <= plan.capacity_bytes for plan in self.levels)

    @property
    def planned_bytes(self) -> int:
        """Bytes at all levels."""
        one_level = self.gpu.name == self.cpu.name
        return self.gpu.planned_bytes + (0 if one_level else self.cpu.planned_bytes)

    def check_fits(self, *, remedy: str = "") -> None:
        """Raise PolicyError naming the level, the need and what would be enough, if one overflows.

        `remedy` is what else would help, as `-u 4`.
        """
        levels = {level.name: level for level in (self.gpu, self.cpu) if level.lacking_bytes}
        if not levels:
            self._check_pinned()
            return
        first = next(iter(levels.values()))
        purpose, size = max(first.purposes.items(), key=lambda item: item[1])
        others = [
            f", and level {other.name} lacks {format_bytes(other.lacking_bytes)}"
            for other in levels.values()
            if other is not first
        ]
        enough = " with ".join(level.option for level in levels.values())
        raise PolicyError(
            f"policy: memory at level {first.name}",
            f"<{format_bytes(first.planned_bytes)} planned>",
            f"must fit the usable {format_bytes(first.capacity_bytes)}"
            f" (the largest part is {purpose.replace('_', ' ')}, {format_bytes(size)})"
            f"{''.join(others)}",
            f"{enough} is enough" + (f", or {remedy}" if remedy else ""),
        )

    def _check_pinned(self) -> None:
        if self.pinned is None or not self.pinned.lacking_bytes:
            return
        staged = "weights" not in self.pinned.purposes
        raise PolicyError(
            "policy: pinned memory of the host",
            f"<{format_bytes(self.pinned.planned_bytes)} planned>",
            f"must fit the {format_bytes(self.pinned.capacity_bytes)} that it can pin",
            "lower batch_size" if staged else "let hrm search choose, or add --staging",
        )


def exchange_bytes_per_request(spec: ModelSpec, formats: Formats, *, ffn_on_cpu: Number, ranks: int = 1) -> Number:
    """Decode buffers of one request: hidden state, QKV, attention and experts' output, numbers.

    Every one of `ranks` GPUs in tensor parallel has the whole hidden state and experts' output.
    """
    hidden = ranks * spec.hidden_size
    computed = formats.compute.bytes_of(hidden + spec.query_size + spec.attention_output_size)
    kv = spec.kv_bytes_per_token_layer(formats.kv_cache)
    routed = formats.compute.bytes_of(2, hidden) + ROUTING_BYTES * spec.experts_per_token
    return computed + kv + ffn_on_cpu * routed + REQUEST_NUMBER_BYTES


def kv_cache_tokens(spec: ModelSpec, micro_batch_size: Number, kv_tokens: Number) -> Number:
    """Tokens that a micro-batch's cache holds in all layers together.

    `kv_tokens` is what it holds in a layer without a window; with one, no request needs more than
    the window and the block that it ends in.
    """
    total = 0 * kv_tokens
    for kind, layers in spec.layer_kinds().items():
        held = kv_tokens
        if kind.window:
            held = minimum(kv_tokens, micro_batch_size * (kind.window + KV_BLOCK_TOKENS))
        total = total + layers * held
    return total


def prefix_bytes_per_token(spec: ModelSpec, formats: Formats, *, ranks: int = 1) -> int:
    """Bytes that a split prompt keeps on the GPU for each token: one layer's keys and values.

    Latent attention keeps what it expands its cache to, of which every GPU has its own heads.
    """
    if spec.latent_attention is not None:
        return formats.compute.bytes_of(spec.query_size + spec.attention_output_size)
    return spec.kv_copies(ranks) * spec.kv_bytes_per_token_layer(formats.kv_cache)


def gpu_purposes(
    spec: ModelSpec,
    formats: Formats,
    *,
    batch_size: Number,
    micro_batch_size: Number,
    kv_tokens: Number,
    chunk_tokens: Number,
    gpu_kv_micro_batches: Number,
    streams_kv: Number,
    ffn_on_cpu: Number,
    resident_bytes: Number,
    max_streamed_bytes: Number,
    prefix_tokens: Number = 0,
    ranks: int = 1,
    batches: int = 1,
) -> dict[str, Number]:
    """Bytes at the GPU level by purpose; `kv_tokens` is the cache of one micro-batch in tokens.

    `resident_bytes` are the layers' weights that stay and `max_streamed_bytes` the most that any
    one layer streams. The level is all GPUs together: `ranks` of them in tensor parallel hold the
    hidden states each, and the cache more than once if it has fewer heads than there are GPUs. A
    stage of a pipeline keeps the caches of all `batches` under way.
    """
    compute, weights = formats.compute, formats.weights
    layer_kv = spec.kv_copies(ranks) * spec.kv_bytes_per_token_layer(formats.kv_cache)
    tokens_at_once = maximum(micro_batch_size, chunk_tokens)
    cache_tokens = kv_cache_tokens(spec, micro_batch_size, kv_tokens)
    return {
        "resident_weights": resident_bytes + weights.bytes_of(spec.head_parameters),
        "weight_slots": WEIGHT_SLOTS * max_streamed_bytes,
        "kv_cache": batches * gpu_kv_micro_batches * cache_tokens * layer_kv,
        "kv_buffers": streams_kv * BUFFERS * kv_tokens * layer_kv,
        "exchange": batch_size * exchange_bytes_per_request(spec, formats, ffn_on_cpu=ffn_on_cpu, ranks=ranks),
        "prefill_buffers": BUFFERS
        * chunk_tokens
        * (compute.bytes_of(ranks, spec.hidden_size) + layer_kv + TOKEN_NUMBER_BYTES),
        "prefix_buffer": prefix_tokens * prefix_bytes_per_token(spec, formats, ranks=ranks),
        "workspace": workspace_bytes(spec, tokens_at_once, compute, ranks=ranks, longest_tokens=kv_tokens)
        + COUNT_BYTES * spec.num_layers * spec.num_experts,
        "logits": micro_batch_size * (spec.vocab_size * LOGIT_BYTES + compute.bytes_of(spec.vocab_size)),
    }


def cpu_purposes(
    spec: ModelSpec,
    formats: Formats,
    *,
    batch_size: Number,
    micro_batch_size: Number,
    kv_tokens: Number,
    num_micro_batches: Number,
    gpu_kv_micro_batches: Number,
    ffn_on_cpu: Number,
    streamed_bytes: Number,
    staging_bytes: Number,
    latent_up_bytes: Number = 0,
    batches: int = 1,
) -> dict[str, Number]:
    """Bytes at the host's level by purpose; `streamed_bytes` is over all layers.

    `latent_up_bytes` are up-projections of latent attention that the CPU needs though their layers
    are resident on the GPU.
    """
    compute = formats.compute
    cache_bytes = kv_cache_tokens(spec, micro_batch_size, kv_tokens) * spec.kv_bytes_per_token_layer(formats.kv_cache)
    return {
        "weights": streamed_bytes + formats.weights.bytes_of(spec.embedding_parameters) + latent_up_bytes,
        "staging": staging_bytes,
        "kv_cache": batches * (num_micro_batches - gpu_kv_micro_batches) * cache_bytes,
        "exchange": batch_size * exchange_bytes_per_request(spec, formats, ffn_on_cpu=ffn_on_cpu),
        "prefill_hidden": num_micro_batches * kv_tokens * (compute.bytes_of(spec.hidden_size) + TOKEN_NUMBER_BYTES),
        "workspace": ffn_on_cpu * workspace_bytes(spec, micro_batch_size, compute),
    }


def latent_up_bytes(spec: ModelSpec, weights: Format, *, cpu_attention: Number, resident_dense: Number) -> Number:
    """Bytes of up-projections that must lie on the host beside those on the GPU."""
    held_twice = cpu_attention * resident_dense
    return held_twice * weights.bytes_of(spec.num_layers, spec.latent_up_parameters)


def plan_memory(spec: ModelSpec, policy: Policy, profile: HardwareProfile) -> MemoryPlan:
    """Bytes that the policy needs at each level of the machine.

    On a machine of one level everything is planned there: `gpu` and `cpu` are then that level. In
    pipeline parallel it is one stage that is planned, with its share of the machine. Raises
    PolicyError if the policy is not for this model and machine.
    """
    spec, profile = part_for(policy, spec, profile)
    gpu, cpu = purposes(spec, policy, ranks=profile.num_gpus, batches=profile.num_stages)
    parts = profile.num_stages
    if profile.has_accelerator:
        plan = MemoryPlan(_level(profile.top, gpu, parts), _level(profile.host, cpu, parts))
        if profile.host.pinnable_bytes is None:
            return plan
        needed = pinned_purposes(cpu, staging=policy.staging, streams_kv=int(policy.streams_kv))
        needed = {key: int(size) for key, size in needed.items() if size}
        usable = profile.host.usable_pinned_bytes
        return replace(plan, pinned=LevelPlan(PINNED, usable, needed, parts=parts))
    both = {key: gpu.get(key, 0) + cpu.get(key, 0) for key in {**gpu, **cpu}}
    level = _level(profile.top, both, parts)
    return MemoryPlan(level, level)


def purposes(
    spec: ModelSpec, policy: Policy, *, ranks: int = 1, batches: int = 1
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by purpose at the GPU's and at the host's level, whether or not they are one."""
    streamed = [policy.streamed_bytes(spec, layer) for layer in range(spec.num_layers)]
    n, on_gpu = policy.num_micro_batches, policy.gpu_kv_micro_batches
    ffn_on_cpu = int(policy.ffn is Device.CPU and max(streamed) > 0)
    gpu = gpu_purposes(
        spec,
        policy.formats,
        batch_size=policy.batch_size,
        micro_batch_size=policy.micro_batch_size,
        kv_tokens=policy.kv_tokens_per_micro_batch,
        chunk_tokens=policy.prefill_chunk_tokens,
        gpu_kv_micro_batches=on_gpu,
        streams_kv=int(policy.streams_kv),
        ffn_on_cpu=ffn_on_cpu,
        resident_bytes=spec.total_layer_bytes(policy.formats.weights) - sum(streamed),
        max_streamed_bytes=max(streamed),
        prefix_tokens=policy.prefix_buffer_tokens,
        ranks=ranks,
        batches=batches,
    )
    cpu = cpu_purposes(
        spec,
        policy.formats,
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
            policy.formats.weights,
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
    size = policy.formats.weights.bytes_of(1)  # a page holds whole elements
    return STAGING_PAGES * -(-largest // (pages_of(policy) * size)) * size


def pinned_purposes(cpu: Mapping[str, Number], *, staging: bool, streams_kv: Number) -> dict[str, Number]:
    """What of the host's purposes must be pinned, in the order in which the executor pins.

    That is all that crosses the link. With `staging`, weights may lie in pageable memory, and so
    may a KV cache that crosses only once, on its way from prefill to attention on the CPU.
    """
    names = [*ALWAYS_PINNED, *PINNED_IF_THERE_IS_ROOM]
    pinned = {name: cpu[name] for name in names if name in cpu}
    if not staging:
        return {**pinned, "weights": cpu["weights"]}
    return {**pinned, "kv_cache": streams_kv * pinned["kv_cache"]} if "kv_cache" in pinned else pinned


def _level(level: MemoryLevel, purposes: dict[str, int], parts: int) -> LevelPlan:
    return LevelPlan(
        name=level.name,
        capacity_bytes=level.usable_bytes,
        purposes={key: int(size) for key, size in purposes.items() if size},
        reserve_bytes=reserve_if_resized(level),
        parts=parts,
    )
