"""What of a region can fit the memories: bytes at its smallest corner, by `hrm.buffers`."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hrm.buffers import Needs, Purpose, by_purpose
from hrm.contract.rings import WEIGHT_SLOTS
from hrm.numeric import Number
from hrm.policy import kv_tokens_for, prefix_tokens_for
from hrm.search.fit import Weights
from hrm.search.regions import CHUNK, KV, NUMBER, RESIDENT, SIZE, Floats, Regions
from hrm.search.space import Space


class Room:
    """Cuts from regions of a space what cannot fit."""

    def __init__(self, space: Space) -> None:
        self.space, self.spec = space, space.spec
        self.weights = Weights(space)
        self.layers = self.spec.num_expert_layers
        self.requests = space.workload.num_requests

    def _batch(self, at: Floats) -> Floats:
        batch = at[SIZE] * at[NUMBER]
        return batch if self.requests is None else np.minimum(batch, self.requests)

    def _chunk(self, regions: Regions, at: Floats) -> Floats:
        """Tokens of a chunk at a corner: of all prompts where they are one chunk."""
        prompts = self._batch(at) * self.space.workload.prompt_len
        return np.where(regions.one_chunk == 1, prompts, at[CHUNK])

    def _buffers(self, regions: Regions, at: Floats) -> Needs:
        """What buffers depend on at a corner, the layers' weights apart; what may not be needed is left out."""
        w, spec = self.space.workload, self.spec
        size, number, kv, _, _ = at
        some_on_host = (regions.high[KV] < 1).astype(float)
        cpu_attention = (1 - regions.gpu_attention) * some_on_host
        one_chunk = regions.one_chunk == 1
        most_in_chunk = np.where(one_chunk, w.max_prompt_len, regions.high[CHUNK])
        return Needs(
            spec=spec,
            formats=self.space.formats,
            batch_size=self._batch(at),
            micro_batch_size=size,
            num_micro_batches=number,
            gpu_kv_micro_batches=kv * number,
            kv_tokens=kv_tokens_for(size, w.mean_context_len, w.max_context_len),
            chunk_tokens=self._chunk(regions, at),
            prefix_tokens=prefix_tokens_for(
                spec, self.space.formats, w.max_prompt_len, most_in_chunk, cpu_attention=cpu_attention
            ),
            streams_kv=regions.gpu_attention * some_on_host,
            cpu_attention=cpu_attention,
            cpu_experts=1 - regions.gpu_ffn,
            cpu_prefill_experts=1 - regions.gpu_prefill,
            resident_dense=regions.dense,
            part_bytes=self.space.experts_per_part * self.weights.expert_bytes * regions.gpu_prefill,
            batches=self.space.profile.num_stages,
        )

    def _purposes(self, regions: Regions, at: Floats) -> tuple[dict[Purpose, Number], dict[Purpose, Number]]:
        """Bytes at both levels by purpose at a corner, the layers' weights and slots apart.

        The host is taken to hold as little of the cache as it may.
        """
        needs = self._buffers(regions, at)
        on_host = replace(needs, gpu_kv_micro_batches=regions.high[KV] * at[NUMBER])
        return by_purpose(needs.on_gpu()), by_purpose(on_host.on_host())

    def tightened(self, regions: Regions) -> Regions:
        """The regions without what cannot fit the memories; empty ones are left out."""
        low, high = regions.low.copy(), regions.high.copy()
        regions = replace(regions, low=low, high=high)
        self._whole_numbers(low, high)
        gpu, cpu = self._purposes(regions, low)
        gpu_room = _left(self.space.profile.top.usable_bytes, gpu) - self.weights.resident(regions.dense, 0)
        if self.space.profile.has_accelerator:
            cpu_room = _left(self.space.profile.host.usable_bytes, cpu)
            self._tighten_residents(regions, gpu_room, cpu_room)
        else:  # one level holds everything
            everything = self.weights.on_host(1, 0)
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
        expert, layers = self.weights.expert_bytes, self.layers
        needed = (self.weights.on_host(regions.dense, 0) - cpu_room) / (layers * expert)
        low[RESIDENT] = np.maximum(low[RESIDENT], needed - 1e-9)
        # Residents, and slots for what the largest layer streams: with experts, or without.
        with_experts, without = (
            gpu_room - WEIGHT_SLOTS * largest
            for largest in self.weights.largest_streamed(regions.dense, 0, regions.gpu_prefill)
        )
        high[RESIDENT] = np.minimum(high[RESIDENT], without / (layers * expert) + 1e-9)
        each = (layers - WEIGHT_SLOTS * self.weights.whole(regions.gpu_prefill)) * expert
        with np.errstate(divide="ignore", invalid="ignore"):
            reach = with_experts / each
        high[RESIDENT] = np.where(each > 0, np.minimum(high[RESIDENT], reach + 1e-9), high[RESIDENT])
        low[RESIDENT] = np.where(each < 0, np.maximum(low[RESIDENT], reach - 1e-9), low[RESIDENT])
        high[RESIDENT] = np.where((each == 0) & (with_experts < 0), -1.0, high[RESIDENT])
        # Together they are whole experts.
        low[RESIDENT] = np.ceil(low[RESIDENT] * layers - 1e-6) / layers
        high[RESIDENT] = np.floor(high[RESIDENT] * layers + 1e-6) / layers

    def _shorter(self, regions: Regions) -> Regions:
        """Upper ends, but of residents, as far as memory may allow beside the other lower ends."""
        low, high = regions.low, regions.high.copy()
        axes = [SIZE, NUMBER, KV, CHUNK]
        far = np.stack([low] * len(axes), axis=1)  # for every axis a corner at its upper end
        ends = high[axes]
        far[axes, range(len(axes))] = ends
        # Once chunks are longer than micro-batches are large, the workspace is a line in their length.
        line = np.zeros(ends.shape, dtype=bool)
        line[axes.index(CHUNK)] = low[CHUNK] >= low[SIZE]
        slack = np.array([[1.0], [1e-6], [1e-9], [1e-6]])  # caches are in whole blocks
        whole = np.array([[True], [True], [False], [False]])
        for at_low, at_far, room in self._needs(regions, low, far, line=line):
            span = at_far - at_low
            with np.errstate(divide="ignore", invalid="ignore"):
                share = np.where(span > 0, (room - at_low) / span, 1.0)
            reach = low[axes] + np.clip(share, 0, 1) * (ends - low[axes])
            reach = reach * (1 + 1e-9) + slack
            high[axes] = np.minimum(high[axes], np.where(whole, np.floor(reach), reach))
        return replace(regions, high=high)

    def _needs(
        self, regions: Regions, low: Floats, far: Floats, *, line: NDArray[np.bool_] | None = None
    ) -> list[tuple[Floats, Floats, Floats]]:
        """Bytes at a corner and at others beyond it, and what there is, at each level.

        A workspace is of the larger of two numbers of tokens, so that its bytes bend upwards: it is
        taken as at the lower corner, but where it is a `line`.
        """

        def total(purposes: dict[Purpose, Number], fixed: dict[Purpose, Number]) -> Floats:
            workspace = fixed[Purpose.WORKSPACE]
            if line is not None:
                workspace = np.where(line, purposes[Purpose.WORKSPACE], workspace)
            others = [size for name, size in purposes.items() if name is not Purpose.WORKSPACE]
            return sum(others, workspace) + np.zeros(len(regions))

        gpu, cpu = self._purposes(regions, low)
        gpu_far, cpu_far = self._purposes(regions, far)
        resident = regions.low[RESIDENT]
        held = np.asarray(self.weights.resident(regions.dense, resident * self.layers))
        slots = WEIGHT_SLOTS * np.maximum(*self.weights.largest_streamed(regions.dense, resident, regions.gpu_prefill))
        if self.layers < WEIGHT_SLOTS:
            slots = 0 * slots
        top, host = self.space.profile.top.usable_bytes, self.space.profile.host.usable_bytes
        if not self.space.profile.has_accelerator:
            room = host - held
            both = _sum(gpu) + _sum(cpu), total(gpu_far, gpu) + total(cpu_far, cpu)
            return [(*both, room)]
        on_host = np.asarray(self.weights.on_host(regions.dense, regions.high[RESIDENT] * self.layers))
        return [(_sum(gpu), total(gpu_far, gpu), top - held - slots), (_sum(cpu), total(cpu_far, cpu), host - on_host)]

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


def _sum(purposes: dict[Purpose, Number]) -> Floats:
    """Bytes of all purposes."""
    return np.asarray(sum(purposes.values(), np.zeros(1)))


def _left(room: Floats | int, purposes: dict[Purpose, Number]) -> Floats:
    """What is left of some bytes beside those of all purposes."""
    left = np.asarray(room, dtype=float)
    for size in purposes.values():
        left = left - size
    return left
