"""The space of policies as NumPy arrays: what fits follows from six numbers, not searched blindly.

Given micro-batch size, number of micro-batches, devices, KV placement and prefill chunk, the
largest residency of weights that fits is best, so it is computed and not enumerated.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hrm.closed_form import Point
from hrm.errors import PolicyError
from hrm.hardware import HardwareProfile
from hrm.memory import cpu_purposes, gpu_purposes
from hrm.model_spec import ModelSpec
from hrm.policy import KV_BLOCK_TOKENS, Policy, ScheduleName
from hrm.schedules import SCHEDULES
from hrm.schedules.pipeline import STAGING_PAGES, WEIGHT_SLOTS
from hrm.tasks import Device
from hrm.units import DTYPE_BYTES
from hrm.workload import Workload

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What is fixed in a search; `attention` and `ffn` of None leave the device open."""

    spec: ModelSpec
    profile: HardwareProfile
    workload: Workload
    dtype: str
    schedule: ScheduleName
    staging: bool = False
    attention: Device | None = None
    ffn: Device | None = None

    def devices(self) -> list[tuple[int, int]]:
        """(attention on GPU, FFN on GPU) pairs that the schedule and the machine allow."""
        if not self.profile.has_accelerator:
            return [(1, 1)]
        schedule = SCHEDULES[self.schedule]
        for flag, asked, fixed in (
            ("--attention", self.attention, schedule.attention),
            ("--ffn", self.ffn, schedule.ffn),
        ):
            if asked is not None and fixed is not None and asked is not fixed:
                raise PolicyError(
                    flag, asked.value, f"is {fixed.value} under schedule {self.schedule.value}",
                    "leave it out, or evaluate the policy with hrm estimate",
                )  # fmt: skip
        attention = _choices(self.attention or schedule.attention)
        return [(a, f) for a in attention for f in _choices(self.ffn or schedule.ffn)]

    def kv_shares(self, count: int) -> list[float]:
        """Shares of the KV cache on the GPU to try."""
        if not self.profile.has_accelerator or SCHEDULES[self.schedule].kv_on_gpu:
            return [1.0]
        return [float(share) for share in np.linspace(0, 1, count)]


def _choices(device: Device | None) -> tuple[int, ...]:
    """0 for the CPU, 1 for the GPU, both where the device is open."""
    return (1, 0) if device is None else (int(device is Device.GPU),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Candidate policies, one an entry of every array; `fits` are those within both memories."""

    batch_size: Ints
    micro_batch_size: Ints
    num_micro_batches: Ints
    gpu_attention: Ints
    gpu_ffn: Ints
    gpu_kv_micro_batches: Ints
    resident_dense: Ints
    chunk_tokens: Ints
    resident_total: Ints
    kv_tokens: Ints
    fits: NDArray[np.bool_]

    def __len__(self) -> int:
        """Number of candidates."""
        return len(self.batch_size)

    def point(self, space: Space, chosen: Ints) -> Point:
        """The closed form's view of the chosen candidates."""
        resident = self.resident_total[chosen] / space.spec.num_layers
        return Point(
            batch_size=self.batch_size[chosen].astype(float),
            num_micro_batches=self.num_micro_batches[chosen].astype(float),
            gpu_attention=self.gpu_attention[chosen],
            gpu_ffn=self.gpu_ffn[chosen],
            gpu_kv_micro_batches=self.gpu_kv_micro_batches[chosen],
            resident_experts=resident,
            host_expert_layers=np.minimum(space.spec.num_experts - resident, 1),
            resident_dense=self.resident_dense[chosen],
            chunk_tokens=self.chunk_tokens[chosen].astype(float),
            staging=int(space.staging),
        )

    def policy(self, space: Space, index: int) -> Policy:
        """One candidate as a policy; resident experts are spread evenly over the layers."""
        layers = space.spec.num_layers
        total = int(self.resident_total[index])
        return Policy(
            schedule=space.schedule,
            batch_size=int(self.batch_size[index]),
            micro_batch_size=int(self.micro_batch_size[index]),
            attention=Device.GPU if self.gpu_attention[index] else Device.CPU,
            ffn=Device.GPU if self.gpu_ffn[index] else Device.CPU,
            resident_experts=spread(total, layers),
            resident_dense=bool(self.resident_dense[index]),
            gpu_kv_micro_batches=int(self.gpu_kv_micro_batches[index]),
            kv_tokens_per_micro_batch=int(self.kv_tokens[index]),
            prefill_chunk_tokens=int(self.chunk_tokens[index]),
            staging=space.staging,
            dtype=space.dtype,
        )


def spread(total: int, layers: int) -> tuple[int, ...]:
    """`total` experts over the layers as evenly as integers allow."""
    return tuple((i + 1) * total // layers - i * total // layers for i in range(layers))


def make_grid(
    space: Space, pairs: NDArray[np.int64], *, kv_shares: list[float], chunk_factors: list[int]
) -> Grid:
    """All combinations of (micro-batch size, number) `pairs` with devices, KV shares and chunks.

    `pairs` has shape (candidates, 2). Every combination gets the largest residency that fits.
    """
    axes = np.array(
        [
            (attention, ffn, share, factor, dense)
            for attention, ffn in space.devices()
            for share in kv_shares
            for factor in chunk_factors
            for dense in ((1, 0) if space.profile.has_accelerator else (1,))
        ]
    )
    pair, axis = (index.ravel() for index in np.indices((len(pairs), len(axes))))
    micro_batch_size, num_micro_batches = pairs[pair, 0], pairs[pair, 1]
    attention, ffn, share, factor, dense = axes[axis].T
    batch_size = micro_batch_size * num_micro_batches
    if space.workload.num_requests is not None:
        batch_size = np.minimum(batch_size, space.workload.num_requests)
    on_gpu = np.rint(share * num_micro_batches).astype(np.int64)
    prompt_tokens = np.ceil(batch_size * space.workload.prompt_len).astype(np.int64)
    chunk = np.minimum(space.workload.max_prompt_len * factor.astype(np.int64), prompt_tokens)
    chunk = np.maximum(chunk, space.workload.max_prompt_len)
    kv_tokens = _kv_tokens(space.workload, micro_batch_size)
    return _with_residency(
        space,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        num_micro_batches=num_micro_batches,
        gpu_attention=attention.astype(np.int64),
        gpu_ffn=ffn.astype(np.int64),
        gpu_kv_micro_batches=on_gpu,
        resident_dense=dense.astype(np.int64),
        chunk_tokens=chunk,
        kv_tokens=kv_tokens,
    )


def _kv_tokens(workload: Workload, micro_batch_size: Ints) -> Ints:
    """`hrm.policy.kv_tokens_for` for an array."""
    mean = micro_batch_size * (workload.mean_context_len + KV_BLOCK_TOKENS / 2)
    tokens = np.rint(np.maximum(mean, workload.max_context_len)).astype(np.int64)
    return -(-tokens // KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS


def _with_residency(space: Space, **numbers: Ints) -> Grid:
    """Complete a grid with the most resident experts that fit the GPU, and check both levels."""
    spec, profile, dtype = space.spec, space.profile, space.dtype
    layers, experts, size = spec.num_layers, spec.num_experts, DTYPE_BYTES[dtype]
    expert_bytes, dense_bytes = spec.expert_parameters * size, spec.dense_parameters * size
    dense, on_gpu = numbers["resident_dense"], numbers["gpu_kv_micro_batches"]
    n = numbers["num_micro_batches"]
    gpu = gpu_purposes(
        spec,
        dtype,
        batch_size=numbers["batch_size"],
        micro_batch_size=numbers["micro_batch_size"],
        kv_tokens=numbers["kv_tokens"],
        chunk_tokens=numbers["chunk_tokens"],
        gpu_kv_micro_batches=on_gpu,
        streams_kv=numbers["gpu_attention"] * (on_gpu < n),
        ffn_on_cpu=1 - numbers["gpu_ffn"],
        resident_bytes=dense * layers * dense_bytes,
        max_streamed_bytes=0,
    )
    free = profile.top.usable_bytes - sum(gpu.values())
    # With q experts of every layer and r more resident, q·layers + r experts lie beside the slots.
    slots = WEIGHT_SLOTS * ((1 - dense) * dense_bytes + experts * expert_bytes)
    beyond_slots = np.floor_divide(free - slots, expert_bytes)
    per_layer = np.clip(beyond_slots // max(layers - WEIGHT_SLOTS, 1), 0, experts - 1)
    if layers <= WEIGHT_SLOTS:
        per_layer = np.zeros_like(per_layer)
    more = np.clip(beyond_slots - per_layer * (layers - WEIGHT_SLOTS), 0, layers - 1)
    dense_slots = WEIGHT_SLOTS * (1 - dense) * dense_bytes
    all_fit = free >= layers * experts * expert_bytes + dense_slots
    total = np.where(all_fit, layers * experts, per_layer * layers + more)
    fits = all_fit | (free >= slots)
    if not profile.has_accelerator:
        fits = all_fit
    streamed = layers * (1 - dense) * dense_bytes + (layers * experts - total) * expert_bytes
    largest = (1 - dense) * dense_bytes + (experts - total // layers) * expert_bytes
    pages = n if SCHEDULES[space.schedule].paged else 1
    cpu = cpu_purposes(
        spec,
        dtype,
        batch_size=numbers["batch_size"],
        micro_batch_size=numbers["micro_batch_size"],
        kv_tokens=numbers["kv_tokens"],
        num_micro_batches=n,
        gpu_kv_micro_batches=on_gpu,
        ffn_on_cpu=(1 - numbers["gpu_ffn"]) * (streamed > 0),
        streamed_bytes=streamed,
        staging_bytes=space.staging * STAGING_PAGES * size * -(-largest // (pages * size)),
    )
    needed = sum(cpu.values())
    if not profile.has_accelerator:
        needed = needed + sum(gpu.values()) + total * expert_bytes
    fits &= needed <= profile.host.usable_bytes
    return Grid(**numbers, resident_total=total.astype(np.int64), fits=fits)
