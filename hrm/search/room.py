"""What of a region can fit the memories: bytes at its smallest corner, by `hrm.memory`."""

from dataclasses import replace
from typing import Any

import numpy as np

from hrm.contract.rings import WEIGHT_SLOTS
from hrm.memory import cpu_purposes, gpu_purposes, latent_up_bytes
from hrm.model_spec import LayerKind
from hrm.policy import kv_tokens_for, prefix_tokens_for
from hrm.search.regions import CHUNK, KV, NUMBER, RESIDENT, SIZE, Floats, Regions
from hrm.search.space import Space


class Room:
    """Cuts from regions of a space what cannot fit."""

    def __init__(self, space: Space) -> None:
        self.space, self.spec = space, space.spec
        self.size = space.formats.weights.bytes_of(1)
        self.expert_bytes = self.spec.expert_parameters * self.size
        self.layers = self.spec.num_expert_layers
        kinds = self.spec.layer_kinds().items()
        self.dense_bytes = self.size * sum(count * self.spec.dense_parameters_of(kind) for kind, count in kinds)
        plain = LayerKind(has_experts=False)
        self.plain_bytes = self.size * self.spec.dense_parameters_of(plain) if self.spec.num_dense_layers else 0
        self.requests = space.workload.num_requests

    def _numbers(self, regions: Regions, at: Floats) -> dict[str, Any]:
        """What memory formulas want of one corner; what may be needed or not is left out."""
        w = self.space.workload
        size, number, kv, _, _ = at
        return {
            "chunk_tokens": self._chunk(regions, at),
            "batch_size": self._batch(at),
            "micro_batch_size": size,
            "kv_tokens": kv_tokens_for(size, w.mean_context_len, w.max_context_len),
            "gpu_kv_micro_batches": kv * number,
        }

    def _batch(self, at: Floats) -> Floats:
        batch = at[SIZE] * at[NUMBER]
        return batch if self.requests is None else np.minimum(batch, self.requests)

    def _chunk(self, regions: Regions, at: Floats) -> Floats:
        """Tokens of a chunk at a corner: of all prompts where they are one chunk."""
        prompts = self._batch(at) * self.space.workload.prompt_len
        return np.where(regions.one_chunk == 1, prompts, at[CHUNK])

    def _gpu(self, regions: Regions, at: Floats) -> dict[str, Floats]:
        """Bytes at the GPU's level by purpose at a corner, the layers' weights and slots apart."""
        w, spec = self.space.workload, self.spec
        some_on_host = (regions.high[KV] < 1).astype(float)
        return gpu_purposes(
            spec,
            self.space.formats,
            **self._numbers(regions, at),
            streams_kv=regions.gpu_attention * some_on_host,
            ffn_on_cpu=1 - regions.gpu_ffn,
            resident_bytes=0,
            max_streamed_bytes=0,
            prefix_tokens=prefix_tokens_for(
                spec,
                w.max_prompt_len,
                np.where(regions.one_chunk == 1, w.max_prompt_len, regions.high[CHUNK]),
                cpu_attention=(1 - regions.gpu_attention) * some_on_host,
            ),
            ranks=self.space.profile.num_gpus,
            batches=self.space.profile.num_stages,
        )

    def _cpu(self, regions: Regions, at: Floats) -> dict[str, Floats]:
        """Bytes at the host's level by purpose at a corner, the layers' weights apart."""
        spec, formats = self.spec, self.space.formats
        some_on_host = (regions.high[KV] < 1).astype(float)
        return cpu_purposes(
            spec,
            formats,
            **{k: v for k, v in self._numbers(regions, at).items() if k != "chunk_tokens"},
            num_micro_batches=at[NUMBER],
            ffn_on_cpu=1 - regions.gpu_ffn,
            streamed_bytes=0,
            staging_bytes=0,
            latent_up_bytes=latent_up_bytes(
                spec,
                formats.weights,
                cpu_attention=(1 - regions.gpu_attention) * some_on_host,
                resident_dense=regions.dense,
            ),
            batches=self.space.profile.num_stages,
        )

    def tightened(self, regions: Regions) -> Regions:
        """The regions without what cannot fit the memories; empty ones are left out."""
        low, high = regions.low.copy(), regions.high.copy()
        regions = replace(regions, low=low, high=high)
        self._whole_numbers(low, high)
        host_corner = low.copy()
        host_corner[KV] = high[KV]  # least on the host
        gpu, cpu = self._gpu(regions, low), self._cpu(regions, host_corner)
        gpu_room = _left(self.space.profile.top.usable_bytes, gpu) - regions.dense * self.dense_bytes
        if self.space.profile.has_accelerator:
            cpu_room = _left(self.space.profile.host.usable_bytes, cpu)
            self._tighten_residents(regions, gpu_room, cpu_room)
        else:  # one level holds everything
            everything = self.spec.num_experts * self.layers * self.expert_bytes
            high[SIZE] = np.where(_left(gpu_room, cpu) < everything, 0.0, high[SIZE])
        regions = regions.not_empty()
        return self._shorter(regions).not_empty() if len(regions) else regions

    def _whole_numbers(self, low: Floats, high: Floats) -> None:
        """Ends of ranges at integers; the cache's share too where the number is known."""
        for axis in (SIZE, NUMBER):
            low[axis], high[axis] = np.ceil(low[axis] - 1e-9), np.floor(high[axis] + 1e-9)
        known = low[NUMBER] == high[NUMBER]
        number = np.maximum(low[NUMBER], 1)
        low[KV] = np.where(known, np.ceil(low[KV] * number - 1e-9) / number, low[KV])
        high[KV] = np.where(known, np.floor(high[KV] * number + 1e-9) / number, high[KV])
        if self.requests is not None:  # no more micro-batches than it takes
            most = np.ceil(self.requests / np.maximum(low[SIZE], 1))
            high[NUMBER] = np.minimum(high[NUMBER], most)

    def _tighten_residents(self, regions: Regions, gpu_room: Floats, cpu_room: Floats) -> None:
        """Residents between what the host cannot hold and what the GPU can; changes the ends."""
        low, high = regions.low, regions.high
        expert, layers = self.expert_bytes, self.layers
        everything = self.spec.num_experts * layers * expert
        streamed_dense = (1 - regions.dense) * self.dense_bytes
        per_layer = (1 - regions.dense) * self.spec.dense_parameters * self.size
        needed = (everything + streamed_dense - cpu_room) / (layers * expert)
        low[RESIDENT] = np.maximum(low[RESIDENT], needed - 1e-9)
        # Residents, and slots for what the largest layer streams: with experts, or without.
        with_experts = gpu_room - WEIGHT_SLOTS * (per_layer + self.spec.num_experts * expert)
        without = gpu_room - WEIGHT_SLOTS * (1 - regions.dense) * self.plain_bytes
        high[RESIDENT] = np.minimum(high[RESIDENT], without / (layers * expert) + 1e-9)
        each = (layers - WEIGHT_SLOTS) * expert
        if each > 0:
            high[RESIDENT] = np.minimum(high[RESIDENT], with_experts / each + 1e-9)
        elif each < 0:
            low[RESIDENT] = np.maximum(low[RESIDENT], with_experts / each - 1e-9)
        else:
            high[RESIDENT] = np.where(with_experts < 0, -1.0, high[RESIDENT])

    def _shorter(self, regions: Regions) -> Regions:
        """Upper ends of size and number as far as memory may allow beside the other lower ends."""
        low, high = regions.low.copy(), regions.high.copy()
        for axis in (SIZE, NUMBER):
            far = low.copy()
            far[axis] = end = high[axis].copy()
            for at_low, at_far, room in self._needs(regions, low, far):
                span = at_far - at_low
                with np.errstate(divide="ignore", invalid="ignore"):
                    share = np.where(span > 0, (room - at_low) / span, 1.0)
                reach = low[axis] + np.clip(share, 0, 1) * (end - low[axis])
                slack = 1.0 if axis == SIZE else 1e-6  # caches are in whole blocks
                high[axis] = np.minimum(high[axis], np.floor(reach * (1 + 1e-9) + slack))
        return replace(regions, high=high)

    def _needs(self, regions: Regions, low: Floats, far: Floats) -> list[tuple[Floats, Floats, Floats]]:
        """Bytes at both corners and what there is, at each level.

        A workspace is of the larger of two numbers of tokens, so that its bytes bend upwards: it is
        taken as at the lower corner.
        """

        def total(purposes: dict[str, Floats], fixed: dict[str, Floats]) -> Floats:
            return sum((fixed if name == "workspace" else purposes)[name] for name in purposes) + np.zeros(len(regions))

        def on_host(at: Floats) -> Floats:
            corner = at.copy()
            corner[KV] = regions.high[KV]
            return corner

        gpu, cpu = self._gpu(regions, low), self._cpu(regions, on_host(low))
        gpu_far, cpu_far = self._gpu(regions, far), self._cpu(regions, on_host(far))
        resident = regions.low[RESIDENT]
        held = regions.dense * self.dense_bytes + resident * self.layers * self.expert_bytes
        per_layer = (1 - regions.dense) * self.spec.dense_parameters * self.size
        slots = WEIGHT_SLOTS * np.maximum(
            per_layer + (self.spec.num_experts - resident) * self.expert_bytes, (1 - regions.dense) * self.plain_bytes
        )
        if self.layers < WEIGHT_SLOTS:
            slots = 0 * slots
        top, host = self.space.profile.top.usable_bytes, self.space.profile.host.usable_bytes
        if not self.space.profile.has_accelerator:
            room = host - held
            both = total(gpu, gpu) + total(cpu, cpu), total(gpu_far, gpu) + total(cpu_far, cpu)
            return [(*both, room)]
        streamed = self.dense_bytes + self.spec.num_experts * self.layers * self.expert_bytes
        most_held = regions.dense * self.dense_bytes + regions.high[RESIDENT] * self.layers * self.expert_bytes
        return [
            (total(gpu, gpu), total(gpu_far, gpu), top - held - slots),
            (total(cpu, cpu), total(cpu_far, cpu), host - (streamed - most_held)),
        ]

    def largest_batch(self, regions: Regions) -> Floats:
        """Requests in a batch, at most: need beside weights grows at least as at the far corner."""
        batch = regions.high[SIZE] * regions.high[NUMBER]
        most = batch.copy()
        far = regions.low.copy()
        far[SIZE], far[NUMBER] = regions.high[SIZE], regions.high[NUMBER]
        none = regions.low.copy()
        none[SIZE] = none[NUMBER] = 0.0
        for fixed, at_far, room in self._needs(regions, none, far):
            a_request = (at_far - fixed) / batch
            with np.errstate(divide="ignore", invalid="ignore"):
                fits = np.where(a_request > 0, (room - fixed) / a_request, np.inf)
            most = np.minimum(most, fits * (1 + 1e-9) + 1e-6)
        if self.requests is not None:
            most = np.minimum(most, self.requests)
        return np.maximum(most, 1.0)


def _left(room: Floats | int, purposes: dict[str, Floats]) -> Floats:
    """What is left of some bytes beside those of all purposes."""
    left = np.asarray(room, dtype=float)
    for size in purposes.values():
        left = left - size
    return left
