"""Which residencies fit: bytes at both levels for many policies at once.

The formulas are `hrm.memory`'s; here is only how the bytes of resident experts and of the weight
slots follow from how many experts are resident.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hrm.contract.rings import STAGING_PAGES, WEIGHT_SLOTS
from hrm.memory import cpu_purposes, gpu_purposes, latent_up_bytes, pinned_purposes
from hrm.model_spec import LayerKind
from hrm.numeric import Number
from hrm.schedules import SCHEDULES
from hrm.search.space import Kind, Space

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Weights:
    """Weight bytes of the model's layers; `dense` is 1 where all but experts is resident."""

    space: Space

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return self.space.formats.weights.bytes_of(self.space.spec.expert_parameters)

    def resident(self, dense: Number, experts: Number) -> Number:
        """Bytes that stay on the GPU with so many resident experts in all."""
        spec, weights = self.space.spec, self.space.formats.weights
        kinds = spec.layer_kinds().items()
        of_all = sum(count * spec.dense_parameters_of(kind) for kind, count in kinds)
        return dense * weights.bytes_of(of_all) + experts * self.expert_bytes

    def streamed(self, dense: Number, experts: Number) -> Number:
        """Bytes that do not, over all layers."""
        return self.space.spec.total_layer_bytes(self.space.formats.weights) - self.resident(dense, experts)

    def largest_streamed(self, dense: Number, of_every_layer: Number) -> tuple[Number, Number]:
        """Streamed bytes of a layer with experts, so many of them resident, and of one without."""
        spec, weights = self.space.spec, self.space.formats.weights
        experts = (spec.num_experts - of_every_layer) * self.expert_bytes
        plain = spec.dense_parameters_of(LayerKind(has_experts=False)) * (spec.num_dense_layers > 0)
        return ((1 - dense) * weights.bytes_of(spec.dense_parameters) + experts, (1 - dense) * weights.bytes_of(plain))


def gpu_needed(
    space: Space, kind: Kind, numbers: Mapping[str, Number], *, resident_bytes: Number, max_streamed_bytes: Number
) -> Number:
    """Bytes at the GPU's level: of the layers' weights those that stay, and the slots."""
    on_gpu, n = numbers["gpu_kv_micro_batches"], numbers["num_micro_batches"]
    purposes = gpu_purposes(
        space.spec,
        space.formats,
        batch_size=numbers["batch_size"],
        micro_batch_size=numbers["micro_batch_size"],
        kv_tokens=numbers["kv_tokens"],
        chunk_tokens=numbers["chunk_tokens"],
        gpu_kv_micro_batches=on_gpu,
        streams_kv=kind.gpu_attention * (on_gpu < n),
        ffn_on_cpu=1 - kind.gpu_ffn,
        resident_bytes=resident_bytes,
        max_streamed_bytes=max_streamed_bytes,
        prefix_tokens=numbers["prefix_buffer_tokens"],
        ranks=space.profile.num_gpus,
        batches=space.profile.num_stages,
    )
    return sum(purposes.values())


def cpu_needed(
    space: Space, kind: Kind, numbers: Mapping[str, Number], *, streamed_bytes: Number, page_bytes: Number
) -> tuple[Number, Number]:
    """Bytes at the host's level, and those of them that must be pinned.

    Of the layers' weights there are those that stream, in pages if staged.
    """
    on_gpu, n = numbers["gpu_kv_micro_batches"], numbers["num_micro_batches"]
    purposes = cpu_purposes(
        space.spec,
        space.formats,
        batch_size=numbers["batch_size"],
        micro_batch_size=numbers["micro_batch_size"],
        kv_tokens=numbers["kv_tokens"],
        num_micro_batches=n,
        gpu_kv_micro_batches=on_gpu,
        ffn_on_cpu=(1 - kind.gpu_ffn) * (streamed_bytes > 0),
        streamed_bytes=streamed_bytes,
        staging_bytes=space.staging * STAGING_PAGES * page_bytes,
        latent_up_bytes=latent_up_bytes(
            space.spec,
            space.formats.weights,
            cpu_attention=(1 - kind.gpu_attention) * (on_gpu < n),
            resident_dense=numbers["resident_dense"],
        ),
        batches=space.profile.num_stages,
    )
    streams_kv = kind.gpu_attention * (on_gpu < n)
    pinned = pinned_purposes(purposes, staging=space.staging, streams_kv=streams_kv)
    return sum(purposes.values()), sum(pinned.values())


def most_residents(space: Space, kind: Kind, numbers: Mapping[str, Ints]) -> Ints:
    """The most resident experts that fit the GPU; -1 where not even none do."""
    weights, dense = Weights(space), numbers["resident_dense"]
    layers, experts = space.spec.num_expert_layers, space.spec.num_experts
    expert_bytes = weights.expert_bytes
    base = gpu_needed(space, kind, numbers, max_streamed_bytes=0, resident_bytes=weights.resident(dense, 0))
    free = space.profile.top.usable_bytes - base
    with_experts, without = weights.largest_streamed(dense, 0)
    # With q experts of every layer resident, q·layers lie beside slots for the largest layer: one
    # with the other experts, which shrinks as q grows, or one without experts.
    shrinking = free - WEIGHT_SLOTS * with_experts
    fixed = free - WEIGHT_SLOTS * without
    each = (layers - WEIGHT_SLOTS) * expert_bytes
    q = np.minimum(fixed // (layers * expert_bytes), experts)
    if each > 0:
        q = np.minimum(q, shrinking // each)
    fits = (q >= 0) & (q * each <= shrinking)
    # Some layers may have one more.
    slots_of_q = np.maximum(with_experts - q * expert_bytes, without)
    more = (free - WEIGHT_SLOTS * slots_of_q) // expert_bytes - q * layers
    total = q * layers + np.where(q < experts, np.clip(more, 0, layers - 1), 0)
    if not space.profile.has_accelerator:
        fits &= total == space.everything
    return np.where(fits, total, -1).astype(np.int64)


def fits_memory(space: Space, kind: Kind, numbers: Mapping[str, Ints], total: Ints) -> NDArray[np.bool_]:
    """Whether candidates with so many resident experts fit both levels."""
    weights, dense = Weights(space), numbers["resident_dense"]
    largest = np.maximum(*weights.largest_streamed(dense, total // space.spec.num_expert_layers))
    gpu = gpu_needed(space, kind, numbers, max_streamed_bytes=largest, resident_bytes=weights.resident(dense, total))
    pages = numbers["num_micro_batches"] if SCHEDULES[space.schedule].paged else 1
    size = space.formats.weights.bytes_of(1)
    cpu, pinned = cpu_needed(
        space,
        kind,
        numbers,
        streamed_bytes=weights.streamed(dense, total),
        page_bytes=size * -(-largest // (pages * size)),  # whole elements
    )
    if not space.profile.has_accelerator:
        return gpu + cpu <= space.profile.host.usable_bytes
    host = space.profile.host
    fits = (gpu <= space.profile.top.usable_bytes) & (cpu <= host.usable_bytes)
    return fits if host.pinnable_bytes is None else fits & (pinned <= host.usable_pinned_bytes)
