"""What is searched: kinds of policies, and grids of one kind as NumPy arrays.

Where the GPU computes all experts, the largest residency that fits is best, so it is computed and
not enumerated. Where the host computes those that it holds, residents are a share of that work as
well, and fewer may be better.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hrm.closed_form import Point
from hrm.errors import PolicyError
from hrm.hardware import HardwareProfile
from hrm.memory import cpu_purposes, gpu_purposes
from hrm.model_spec import ModelSpec
from hrm.numeric import Number
from hrm.policy import KV_BLOCK_TOKENS, Policy, ScheduleName
from hrm.schedules import SCHEDULES
from hrm.schedules.pipeline import STAGING_PAGES, WEIGHT_SLOTS
from hrm.tasks import Device
from hrm.units import DTYPE_BYTES
from hrm.workload import Workload

Ints = NDArray[np.int64]


class KvPlace(IntEnum):
    """How much of the KV cache lives on the GPU."""

    NONE = 0
    SOME = 1
    ALL = 2


@dataclass(frozen=True, slots=True)
class Kind:
    """Policies that differ in numbers only; the devices are 1 for the GPU and 0 for the CPU."""

    gpu_attention: int
    gpu_ffn: int
    kv: KvPlace


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """What is fixed in a search; `attention` and `ffn` of None leave the device open.

    Micro-batch sizes and their number are searched up to `max_micro_batch_size` and
    `max_micro_batches`.
    """

    spec: ModelSpec
    profile: HardwareProfile
    workload: Workload
    dtype: str
    schedule: ScheduleName
    staging: bool = False
    attention: Device | None = None
    ffn: Device | None = None
    max_micro_batch_size: int = 2**16
    max_micro_batches: int = 2**12

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

    def kinds(self) -> list[Kind]:
        """The kinds of policies to search.

        Where the whole cache lives on the GPU, attention runs there whatever is said of it: that
        kind is listed once for each device of the FFN.
        """
        devices = self.devices()
        all_on_gpu = not self.profile.has_accelerator or SCHEDULES[self.schedule].kv_on_gpu
        places = [KvPlace.ALL] if all_on_gpu else [KvPlace.NONE, KvPlace.SOME, KvPlace.ALL]
        first = devices[0][0]
        return [
            Kind(attention, ffn, kv)
            for attention, ffn in devices
            for kv in places
            if kv is not KvPlace.ALL or attention == first
        ]


def _choices(device: Device | None) -> tuple[int, ...]:
    """0 for the CPU, 1 for the GPU, both where the device is open."""
    return (1, 0) if device is None else (int(device is Device.GPU),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Candidates of one kind, one an entry of every array; `fits` are within both memories.

    `resident_total` experts are on the GPU, of `most_residents` that fit there.
    """

    kind: Kind
    batch_size: Ints
    micro_batch_size: Ints
    num_micro_batches: Ints
    gpu_kv_micro_batches: Ints
    resident_dense: Ints
    chunk_tokens: Ints
    most_residents: Ints
    resident_total: Ints
    kv_tokens: Ints
    fits: NDArray[np.bool_]

    def __len__(self) -> int:
        """Number of candidates."""
        return len(self.batch_size)

    def take(self, chosen: Ints) -> "Grid":
        """The chosen candidates only."""
        return Grid(kind=self.kind, **{name: getattr(self, name)[chosen] for name in _ARRAYS})

    def and_also(self, other: "Grid") -> "Grid":
        """The candidates of both."""
        both = {
            name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in _ARRAYS
        }
        return Grid(kind=self.kind, **both)

    def numbers(self) -> dict[str, Ints]:
        """The arrays that say how much memory is needed beside the weights."""
        return {name: getattr(self, name) for name in _ARRAYS}

    def places(self) -> Ints:
        """The places that `make_grid` makes the candidates of, as near as parts allow."""
        most = np.maximum(self.most_residents, 1)
        parts = -(-self.resident_total * ALL_THAT_FIT // most)
        parts = np.where(self.most_residents > 0, parts, ALL_THAT_FIT)
        columns = self.micro_batch_size, self.num_micro_batches, self.gpu_kv_micro_batches, parts
        return np.column_stack(columns)

    def with_residents(self, space: Space, total: Ints) -> "Grid":
        """The same candidates with so many resident experts."""
        fits = fits_memory(space, self.kind, self.numbers(), total)
        return replace(self, resident_total=total, fits=fits)

    def point(self, space: Space) -> Point:
        """The closed form's view of all candidates."""
        resident = self.resident_total / space.spec.num_layers
        return Point(
            batch_size=self.batch_size.astype(float),
            num_micro_batches=self.num_micro_batches.astype(float),
            gpu_attention=self.kind.gpu_attention,
            gpu_ffn=self.kind.gpu_ffn,
            gpu_kv_micro_batches=self.gpu_kv_micro_batches,
            resident_experts=resident,
            host_expert_layers=np.minimum(space.spec.num_experts - resident, 1),
            resident_dense=self.resident_dense,
            chunk_tokens=self.chunk_tokens.astype(float),
            staging=int(space.staging),
        )

    def policy(self, space: Space, index: int) -> Policy:
        """One candidate as a policy; resident experts are spread evenly over the layers.

        Where all of them are resident, they run on the GPU whatever the kind, and the policy says
        so if it may.
        """
        total, layers = int(self.resident_total[index]), space.spec.num_layers
        all_on_gpu = total == layers * space.spec.num_experts
        may_run_on_gpu = (self.kind.gpu_attention, 1) in space.devices()
        gpu_ffn = self.kind.gpu_ffn or (all_on_gpu and may_run_on_gpu)
        return Policy(
            schedule=space.schedule,
            batch_size=int(self.batch_size[index]),
            micro_batch_size=int(self.micro_batch_size[index]),
            attention=Device.GPU if self.kind.gpu_attention else Device.CPU,
            ffn=Device.GPU if gpu_ffn else Device.CPU,
            resident_experts=spread(total, layers),
            resident_dense=bool(self.resident_dense[index]),
            gpu_kv_micro_batches=int(self.gpu_kv_micro_batches[index]),
            kv_tokens_per_micro_batch=int(self.kv_tokens[index]),
            prefill_chunk_tokens=int(self.chunk_tokens[index]),
            staging=space.staging,
            dtype=space.dtype,
        )


ALL_THAT_FIT: Final = 1000
_ARRAYS = tuple(name for name in Grid.__dataclass_fields__ if name != "kind")


def spread(total: int, layers: int) -> tuple[int, ...]:
    """`total` experts over the layers as evenly as integers allow."""
    return tuple((i + 1) * total // layers - i * total // layers for i in range(layers))


def make_grid(space: Space, kind: Kind, places: Ints, chunk_factors: list[int]) -> Grid:
    """All combinations of `places` with chunks and with projections resident or not.

    `places` has the columns micro-batch size, number of micro-batches, how many of these have
    their KV cache on the GPU, and how many parts in `ALL_THAT_FIT` of the experts that fit the GPU
    are resident.
    """
    axes = np.array(
        [
            (factor, dense)
            for factor in chunk_factors
            for dense in ((1, 0) if space.profile.has_accelerator else (1,))
        ]
    )
    place, axis = (index.ravel() for index in np.indices((len(places), len(axes))))
    micro_batch_size, num_micro_batches, on_gpu, parts = places[place].T
    factor, dense = axes[axis].T
    batch_size = micro_batch_size * num_micro_batches
    if space.workload.num_requests is not None:
        batch_size = np.minimum(batch_size, space.workload.num_requests)
    prompt_tokens = np.ceil(batch_size * space.workload.prompt_len).astype(np.int64)
    chunk = np.minimum(space.workload.max_prompt_len * factor, prompt_tokens)
    chunk = np.maximum(chunk, space.workload.max_prompt_len)
    numbers = {
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        "num_micro_batches": num_micro_batches,
        "gpu_kv_micro_batches": on_gpu,
        "resident_dense": dense,
        "chunk_tokens": chunk,
        "kv_tokens": _kv_tokens(space.workload, micro_batch_size),
    }
    most = _most_residents(space, kind, numbers)
    total = np.maximum(most, 0) * parts // ALL_THAT_FIT
    fits = (most >= 0) & fits_memory(space, kind, numbers, total)
    return Grid(kind=kind, **numbers, most_residents=most, resident_total=total, fits=fits)


def _kv_tokens(workload: Workload, micro_batch_size: Ints) -> Ints:
    """`hrm.policy.kv_tokens_for` for an array."""
    mean = micro_batch_size * (workload.mean_context_len + KV_BLOCK_TOKENS / 2)
    tokens = np.rint(np.maximum(mean, workload.max_context_len)).astype(np.int64)
    return -(-tokens // KV_BLOCK_TOKENS) * KV_BLOCK_TOKENS


def gpu_needed(
    space: Space, kind: Kind, numbers: Mapping[str, Number], *, resident_bytes: Number,
    max_streamed_bytes: Number,
) -> Number:  # fmt: skip
    """Bytes at the GPU's level: of the layers' weights those that stay, and the slots."""
    on_gpu, n = numbers["gpu_kv_micro_batches"], numbers["num_micro_batches"]
    purposes = gpu_purposes(
        space.spec,
        space.dtype,
        batch_size=numbers["batch_size"],
        micro_batch_size=numbers["micro_batch_size"],
        kv_tokens=numbers["kv_tokens"],
        chunk_tokens=numbers["chunk_tokens"],
        gpu_kv_micro_batches=on_gpu,
        streams_kv=kind.gpu_attention * (on_gpu < n),
        ffn_on_cpu=1 - kind.gpu_ffn,
        resident_bytes=resident_bytes,
        max_streamed_bytes=max_streamed_bytes,
    )
    return sum(purposes.values())


def cpu_needed(
    space: Space, kind: Kind, numbers: Mapping[str, Number], *, streamed_bytes: Number,
    page_bytes: Number,
) -> Number:  # fmt: skip
    """Bytes at the host's level: of the layers' weights those that stream, in pages if staged."""
    purposes = cpu_purposes(
        space.spec,
        space.dtype,
        batch_size=numbers["batch_size"],
        micro_batch_size=numbers["micro_batch_size"],
        kv_tokens=numbers["kv_tokens"],
        num_micro_batches=numbers["num_micro_batches"],
        gpu_kv_micro_batches=numbers["gpu_kv_micro_batches"],
        ffn_on_cpu=(1 - kind.gpu_ffn) * (streamed_bytes > 0),
        streamed_bytes=streamed_bytes,
        staging_bytes=space.staging * STAGING_PAGES * page_bytes,
    )
    return sum(purposes.values())


def _most_residents(space: Space, kind: Kind, numbers: Mapping[str, Ints]) -> Ints:
    """The most resident experts that fit the GPU; -1 where not even none do."""
    spec, profile, size = space.spec, space.profile, DTYPE_BYTES[space.dtype]
    layers, experts = spec.num_layers, spec.num_experts
    expert_bytes, dense_bytes = spec.expert_parameters * size, spec.dense_parameters * size
    dense = numbers["resident_dense"]
    without_experts = gpu_needed(
        space, kind, numbers, resident_bytes=dense * layers * dense_bytes, max_streamed_bytes=0
    )
    free = profile.top.usable_bytes - without_experts
    # With q experts of every layer and r more resident, q·layers + r experts lie beside the slots.
    slots = WEIGHT_SLOTS * ((1 - dense) * dense_bytes + experts * expert_bytes)
    beyond_slots = np.floor_divide(free - slots, expert_bytes)
    per_layer = np.clip(beyond_slots // max(layers - WEIGHT_SLOTS, 1), 0, experts - 1)
    if layers <= WEIGHT_SLOTS:
        per_layer = np.zeros_like(per_layer)
    more = np.clip(beyond_slots - per_layer * (layers - WEIGHT_SLOTS), 0, layers - 1)
    dense_slots = WEIGHT_SLOTS * (1 - dense) * dense_bytes
    all_fit = free >= layers * experts * expert_bytes + dense_slots
    some_fit = (free >= slots) & profile.has_accelerator
    total = np.where(some_fit, per_layer * layers + more, -1)
    return np.where(all_fit, layers * experts, total).astype(np.int64)


def fits_memory(
    space: Space, kind: Kind, numbers: Mapping[str, Ints], total: Ints
) -> NDArray[np.bool_]:
    """Whether candidates with so many resident experts fit both levels."""
    spec, profile, size = space.spec, space.profile, DTYPE_BYTES[space.dtype]
    layers, experts, dense = spec.num_layers, spec.num_experts, numbers["resident_dense"]
    expert_bytes, dense_bytes = spec.expert_parameters * size, spec.dense_parameters * size
    largest = (1 - dense) * dense_bytes + (experts - total // layers) * expert_bytes
    gpu = gpu_needed(
        space, kind, numbers, max_streamed_bytes=largest,
        resident_bytes=dense * layers * dense_bytes + total * expert_bytes,
    )  # fmt: skip
    streamed = layers * (1 - dense) * dense_bytes + (layers * experts - total) * expert_bytes
    pages = numbers["num_micro_batches"] if SCHEDULES[space.schedule].paged else 1
    page_bytes = size * -(-largest // (pages * size))  # whole elements
    cpu = cpu_needed(space, kind, numbers, streamed_bytes=streamed, page_bytes=page_bytes)
    if not profile.has_accelerator:
        return gpu + cpu <= profile.host.usable_bytes
    return (gpu <= profile.top.usable_bytes) & (cpu <= profile.host.usable_bytes)
