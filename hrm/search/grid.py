"""Grids of policies of one kind, as NumPy arrays.

Where the GPU computes all experts, the largest residency that fits is best, so it is computed and
not enumerated. Where the host computes those that it holds, residents are a share of that work as
well, and fewer may be better.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hrm.closed_form import Point
from hrm.layers import ExpertDivision
from hrm.policy import Policy, kv_tokens_for, prefix_tokens_for, spread_experts
from hrm.schedules.orders import lookahead
from hrm.search.fit import Ints, fits_memory, gpu_room, most_residents
from hrm.search.space import Kind, Space
from hrm.tasks import Device


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
    gpu_prefill_ffn: Ints
    chunk_tokens: Ints
    prefix_buffer_tokens: Ints
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
        both = {name: np.concatenate([getattr(self, name), getattr(other, name)]) for name in _ARRAYS}
        return Grid(kind=self.kind, **both)

    @property
    def half_octaves(self) -> Ints:
        """Numbers of micro-batches in steps of about a factor of the root of two."""
        return (2 * np.log2(self.num_micro_batches)).round().astype(np.int64)

    def numbers(self) -> dict[str, Ints]:
        """The arrays that say how much memory is needed beside the weights."""
        return {name: getattr(self, name) for name in _ARRAYS}

    def places(self) -> Ints:
        """The places that `make_grid` makes the candidates of, as near as parts allow."""
        most = np.maximum(self.most_residents, 1)
        parts = -(-self.resident_total * ALL_THAT_FIT // most)
        parts = np.where(self.most_residents > 0, parts, ALL_THAT_FIT)
        columns = self.micro_batch_size, self.num_micro_batches, self.gpu_kv_micro_batches, parts
        return np.column_stack([*columns, self.chunk_tokens])

    def with_residents(self, space: Space, total: Ints) -> "Grid":
        """The same candidates with so many resident experts."""
        numbers = self.numbers()
        fits = fits_memory(space, self.kind, numbers, gpu_room(space, self.kind, numbers), total)
        return replace(self, resident_total=total, fits=fits)

    def with_chunks(self, space: Space, chunk_tokens: Ints) -> "Grid":
        """The same candidates with chunks of so many tokens, and all the residents that fit beside them."""
        numbers = {name: getattr(self, name) for name in _ARRAYS if name not in _FITTED}
        numbers["chunk_tokens"] = chunk_tokens
        return _fitted(space, self.kind, numbers, gpu_room(space, self.kind, numbers), ALL_THAT_FIT)

    def point(self, space: Space) -> Point:
        """The closed form's view of all candidates."""
        spec = space.spec
        resident = self.resident_total / spec.num_expert_layers
        some_on_host = np.minimum(spec.num_experts - resident, 1)
        return Point(
            batch_size=self.batch_size.astype(float),
            num_micro_batches=self.num_micro_batches.astype(float),
            lookahead=lookahead(self.num_micro_batches),
            num_weight_pages=self.num_micro_batches.astype(float),
            gpu_attention=self.kind.gpu_attention,
            gpu_ffn=self.kind.gpu_ffn,
            gpu_prefill_ffn=self.kind.gpu_ffn or self.gpu_prefill_ffn,
            gpu_kv_micro_batches=self.gpu_kv_micro_batches,
            resident_experts=resident,
            host_expert_layers=some_on_host * spec.num_expert_layers / spec.num_layers,
            last_on_host=spec.layers[-1].has_experts * (some_on_host >= 1),
            last_residents=spec.layers[-1].has_experts * -(-self.resident_total // spec.num_expert_layers),
            resident_dense=self.resident_dense,
            chunk_tokens=self.chunk_tokens.astype(float),
            staging=int(space.staging),
            experts_per_part=space.experts_per_part,
        )

    def policy(self, space: Space, index: int) -> Policy:
        """One candidate as a policy; resident experts are spread evenly over their layers.

        Where all of them are resident, they run on the GPU whatever the kind, and the policy says
        so if it may.
        """
        total = int(self.resident_total[index])
        all_on_gpu = total == space.everything
        may_run_on_gpu = (self.kind.gpu_attention, 1) in space.devices()
        gpu_ffn = self.kind.gpu_ffn or (all_on_gpu and may_run_on_gpu)
        gpu_prefill_ffn = gpu_ffn or all_on_gpu or self.gpu_prefill_ffn[index]
        return Policy(
            schedule=space.schedule,
            expert_division=space.expert_division or ExpertDivision.INNER,
            batch_size=int(self.batch_size[index]),
            micro_batch_size=int(self.micro_batch_size[index]),
            attention=Device.GPU if self.kind.gpu_attention else Device.CPU,
            ffn=Device.GPU if gpu_ffn else Device.CPU,
            prefill_ffn=Device.GPU if gpu_prefill_ffn else Device.CPU,
            resident_experts=spread_experts(space.spec, total),
            resident_dense=bool(self.resident_dense[index]),
            gpu_kv_micro_batches=int(self.gpu_kv_micro_batches[index]),
            kv_tokens_per_micro_batch=int(self.kv_tokens[index]),
            prefill_chunk_tokens=int(self.chunk_tokens[index]),
            prefix_buffer_tokens=int(self.prefix_buffer_tokens[index]),
            experts_per_part=space.experts_per_part if gpu_prefill_ffn and not all_on_gpu else 0,
            staging=space.staging,
            dtype=space.dtype,
            weight_format=space.weight_format,
            kv_format=space.kv_format,
        )


ALL_THAT_FIT: Final = 1000
QUARTERS: Final = (1.0, 0.75, 0.5, 0.25, 0.0)  # of the experts that fit: where the CPU computes others, fewer may do
PART, CHUNK = 3, 4  # columns of places
_ARRAYS = tuple(name for name in Grid.__dataclass_fields__ if name != "kind")
_FITTED = ("most_residents", "resident_total", "fits")


def make_grid(space: Space, kind: Kind, places: Ints) -> Grid:
    """All `places`, with projections resident and not, and experts of prefill wherever the space allows.

    Places have the columns micro-batch size, number of micro-batches, how many of these have their
    KV cache on the GPU, how many parts in `ALL_THAT_FIT` of the experts that fit the GPU are
    resident, and the tokens of a chunk. Below the longest prompt, a chunk splits it.
    """
    micro_batch_size, num_micro_batches, on_gpu, parts, chunk = np.ascontiguousarray(places.T)
    batch_size = micro_batch_size * num_micro_batches
    if space.workload.num_requests is not None:
        batch_size = np.minimum(batch_size, space.workload.num_requests)
    prompt_tokens = np.ceil(batch_size * space.workload.prompt_len).astype(np.int64)
    longest = space.workload.max_prompt_len
    chunk = np.minimum(chunk, np.maximum(prompt_tokens, longest))
    cpu_attention = (1 - kind.gpu_attention) * (on_gpu < num_micro_batches)
    numbers = {
        "batch_size": batch_size,
        "micro_batch_size": micro_batch_size,
        "num_micro_batches": num_micro_batches,
        "gpu_kv_micro_batches": on_gpu,
        "chunk_tokens": chunk,
        "prefix_buffer_tokens": prefix_tokens_for(
            space.spec, space.formats, longest, chunk, cpu_attention=cpu_attention
        ),
        "kv_tokens": kv_tokens_for(micro_batch_size, space.workload.mean_context_len, space.workload.max_context_len),
    }
    prefill = space.prefill_devices(kind.gpu_ffn)
    numbers = _of_every(numbers | {"parts": parts}, "gpu_prefill_ffn", prefill)
    numbers["room"] = gpu_room(space, kind, numbers)
    # What else a GPU holds is the same whether or not projections are resident.
    numbers = _of_every(numbers, "resident_dense", (1, 0) if space.profile.has_accelerator else (1,))
    return _fitted(space, kind, numbers, numbers.pop("room"), numbers.pop("parts"))


def _fitted(space: Space, kind: Kind, numbers: Mapping[str, Ints], room: Ints, parts: Ints | int) -> Grid:
    """Candidates with so many parts in `ALL_THAT_FIT` of the residents that fit the GPU's room."""
    most = most_residents(space, numbers["resident_dense"], numbers["gpu_prefill_ffn"], room)
    total = np.maximum(most, 0) * parts // ALL_THAT_FIT
    fits = (most >= 0) & fits_memory(space, kind, numbers, room, total)
    return Grid(kind=kind, **numbers, most_residents=most, resident_total=total, fits=fits)


def _of_every(numbers: dict[str, Ints], name: str, ways: tuple[int, ...]) -> dict[str, Ints]:
    """The numbers of every candidate once for each of the ways, which become one more number."""
    count = len(numbers["batch_size"])
    repeated = {other: values.repeat(len(ways)) for other, values in numbers.items()} if len(ways) > 1 else numbers
    return {**repeated, name: np.tile(ways, count)}
