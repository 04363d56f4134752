"""Which residencies fit: bytes at both levels for many policies at once.

The formulas are `hrm.buffers`'s; here is only how the bytes of resident experts and of the weight
slots follow from how many experts are resident.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from hrm.buffers import Needs, Purpose, by_purpose, page_bytes
from hrm.contract.rings import STAGING_PAGES, WEIGHT_SLOTS
from hrm.memory import pinned_purposes
from hrm.numeric import Number
from hrm.placement import Place, Placement
from hrm.schedules import SCHEDULES
from hrm.search.space import Kind, Space

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Weights:
    """Weight bytes of the model's layers; `dense` is 1 where all but experts is resident."""

    space: Space

    def _placement(self, dense: Number) -> Placement:
        return Placement(spec=self.space.spec, weights=self.space.formats.weights, resident_dense=dense)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return self.space.spec.expert_bytes(self.space.formats.weights)

    def resident(self, dense: Number, experts: Number) -> Number:
        """Bytes that stay on the GPU with so many resident experts in all."""
        return self._placement(dense).bytes_in_all(Place.GPU, experts)

    def on_host(self, dense: Number, experts: Number) -> Number:
        """Bytes that do not, over all layers."""
        return self._placement(dense).bytes_in_all(Place.STREAMED, experts)

    def whole(self, gpu_prefill: Number) -> Number:
        """1 where experts stream with their layer: where prefill computes all of them on the GPU, but not in parts."""
        return gpu_prefill * (not self.space.experts_per_part)

    def largest_streamed(self, dense: Number, of_every_layer: Number, gpu_prefill: Number) -> tuple[Number, Number]:
        """Bytes that a layer with experts, so many of them resident, streams whole, and one without.

        `gpu_prefill` is 1 where prefill computes all experts on the GPU, 0 where only the resident ones.
        """
        spec, weights = self.space.spec, self.space.formats.weights
        experts = self.whole(gpu_prefill) * (spec.num_experts - of_every_layer) * self.expert_bytes
        with_experts, plain = spec.dense_bytes(weights), spec.plain_bytes(weights)
        return (1 - dense) * with_experts + experts, (1 - dense) * plain


def _needs(space: Space, kind: Kind, numbers: Mapping[str, Number], **weights: Number) -> Needs:
    """What the buffers of candidates depend on; `numbers` are a grid's."""
    number, on_gpu = numbers["num_micro_batches"], numbers["gpu_kv_micro_batches"]
    on_host = on_gpu < number
    return Needs(
        spec=space.spec,
        formats=space.formats,
        batch_size=numbers["batch_size"],
        micro_batch_size=numbers["micro_batch_size"],
        num_micro_batches=number,
        gpu_kv_micro_batches=on_gpu,
        kv_tokens=numbers["kv_tokens"],
        chunk_tokens=numbers["chunk_tokens"],
        prefix_tokens=numbers["prefix_buffer_tokens"],
        streams_kv=kind.gpu_attention * on_host,
        cpu_attention=(1 - kind.gpu_attention) * on_host,
        cpu_experts=1 - kind.gpu_ffn,
        cpu_prefill_experts=1 - numbers["gpu_prefill_ffn"],
        resident_dense=numbers.get("resident_dense", 0),  # what the GPU needs does not depend on it
        staging_slots=space.staging * STAGING_PAGES,
        part_bytes=space.experts_per_part * Weights(space).expert_bytes * numbers["gpu_prefill_ffn"],
        batches=space.profile.num_stages,
        **weights,
    )


def gpu_needed(
    space: Space, kind: Kind, numbers: Mapping[str, Number], *, resident_bytes: Number, max_streamed_bytes: Number
) -> Number:
    """Bytes at the GPU's level: of the layers' weights those that stay, and the slots."""
    weights = {"resident_bytes": resident_bytes, "largest_streamed_bytes": max_streamed_bytes}
    return sum(buffer.num_bytes for buffer in _needs(space, kind, numbers, **weights).on_gpu())


def host_purposes(
    space: Space, kind: Kind, numbers: Mapping[str, Number], *, host_bytes: Number, page_bytes: Number
) -> dict[Purpose, Number]:
    """Bytes at the host's level by purpose: of the layers' weights those that lie there, in pages if staged."""
    needs = _needs(space, kind, numbers, host_bytes=host_bytes, page_bytes=page_bytes)
    return by_purpose(replace(needs, cpu_experts=needs.cpu_experts * (host_bytes > 0)).on_host())


def pinned_needed(
    space: Space, kind: Kind, numbers: Mapping[str, Number], purposes: Mapping[Purpose, Number]
) -> Number:
    """Bytes of the host's purposes that must be pinned."""
    streams_kv = kind.gpu_attention * (numbers["gpu_kv_micro_batches"] < numbers["num_micro_batches"])
    return sum(pinned_purposes(purposes, staging=space.staging, streams_kv=streams_kv).values())


def gpu_room(space: Space, kind: Kind, numbers: Mapping[str, Ints]) -> Ints:
    """Bytes at the GPU's level that are left for the layers' weights and the slots."""
    needed = gpu_needed(space, kind, numbers, max_streamed_bytes=0, resident_bytes=0)
    return np.asarray(space.profile.top.usable_bytes - needed)


def most_residents(space: Space, dense: Ints, gpu_prefill: Ints, room: Ints) -> Ints:
    """The most resident experts that fit the GPU's `gpu_room`; -1 where not even none do."""
    weights = Weights(space)
    layers, experts = space.spec.num_expert_layers, space.spec.num_experts
    expert_bytes = weights.expert_bytes
    free = room - weights.resident(dense, 0)
    with_experts, without = weights.largest_streamed(dense, 0, gpu_prefill)
    # With q experts of every layer resident, q·layers lie beside slots for the largest layer: one
    # with the other experts, which if they stream shrinks as q grows, or one without experts.
    shrinking = free - WEIGHT_SLOTS * with_experts
    fixed = free - WEIGHT_SLOTS * without
    whole = weights.whole(gpu_prefill)
    each = (layers - WEIGHT_SLOTS * whole) * expert_bytes
    q: Ints = np.minimum(fixed // (layers * expert_bytes), experts)
    q[each > 0] = np.minimum(q, shrinking // np.maximum(each, 1))[each > 0]
    fits = (q >= 0) & (q * each <= shrinking)
    # Some layers may have one more.
    slots_of_q = np.maximum(with_experts - whole * q * expert_bytes, without)
    more = (free - WEIGHT_SLOTS * slots_of_q) // expert_bytes - q * layers
    total = q * layers + np.where(q < experts, np.clip(more, 0, layers - 1), 0)
    if not space.profile.has_accelerator:
        fits &= total == space.everything
    return np.where(fits, total, -1).astype(np.int64)


def fits_memory(space: Space, kind: Kind, numbers: Mapping[str, Ints], room: Ints, total: Ints) -> NDArray[np.bool_]:
    """Whether candidates with so many resident experts fit both levels; `room` is the GPU's."""
    resident, slots, purposes = _with_residents(space, kind, numbers, total)
    gpu, cpu = resident + slots, sum(purposes.values())
    if not space.profile.has_accelerator:
        return gpu + cpu <= room
    host = space.profile.host
    fits = (gpu <= room) & (cpu <= host.usable_bytes)
    if host.pinnable_bytes is None:
        return fits
    return fits & (pinned_needed(space, kind, numbers, purposes) <= host.usable_pinned_bytes)


def host_needed(space: Space, kind: Kind, numbers: Mapping[str, Ints], total: Ints) -> tuple[Ints, Ints]:
    """Bytes at the host's level with so many resident experts, and those of them that must be pinned."""
    _, _, purposes = _with_residents(space, kind, numbers, total)
    return np.asarray(sum(purposes.values())), np.asarray(pinned_needed(space, kind, numbers, purposes))


def _with_residents(
    space: Space, kind: Kind, numbers: Mapping[str, Ints], total: Ints
) -> tuple[Number, Number, dict[Purpose, Number]]:
    """With so many resident experts: bytes of weights that stay on the GPU, of its slots, and the host's by purpose."""
    weights, dense = Weights(space), numbers["resident_dense"]
    of_every_layer = total // space.spec.num_expert_layers
    largest = np.maximum(*weights.largest_streamed(dense, of_every_layer, numbers["gpu_prefill_ffn"]))
    resident = weights.resident(dense, total)
    pages = numbers["num_micro_batches"] if SCHEDULES[space.schedule].paged else 1
    purposes = host_purposes(
        space,
        kind,
        numbers,
        host_bytes=space.spec.total_layer_bytes(space.formats.weights) - resident,
        page_bytes=page_bytes(largest, pages),
    )
    return resident, WEIGHT_SLOTS * largest, purposes
