"""Weights: what stays on the GPU, what streams to it page by page, and where each piece is found.

A layer's other weights lie contiguously in host memory, its dense part first if that streams, then
the experts that do not stay; a page is a slice of them. On the GPU they land in one of two slots,
without the experts if the CPU computes these in both phases, or if they stream in parts: each part
then lands in one of two slots for parts. The page table is made of views, one set for each place
where a layer, or a part of its experts, can lie.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor

from executor.backends import AbstractBackend
from executor.checkpoint import WeightSource
from executor.families import Family
from executor.families.base import RankPart
from executor.loading import Loading, Target, fill
from executor.model import (
    DenseWeights,
    Experts,
    ExpertWeights,
    HeadWeights,
    dense_tensors,
    dense_views,
    expert_tensors,
    experts_in,
    head_views,
)
from executor.model.layout import num_elements
from hrm.buffers import Purpose
from hrm.contract.rings import EXPERT_SLOTS, STAGING_PAGES, WEIGHT_SLOTS
from hrm.formats import ALIGNMENT_BYTES
from hrm.formats import aligned as aligned_bytes
from hrm.layers import Block, Layer
from hrm.model_spec import ModelSpec
from hrm.placement import Place
from hrm.policy import Policy
from hrm.tasks import Device, Lane, Phase

NumberedExperts = Sequence[tuple[int, ExpertWeights]]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """A layer as its tasks find it while it lies in one slot.

    `on_gpu` are the experts there from the start, `experts` those and the ones in the slot, if any
    come there.
    """

    dense: DenseWeights
    on_gpu: Experts
    experts: Experts
    has_experts: bool


@dataclass(frozen=True, slots=True)
class PartOfExperts:
    """Some experts of a layer where they lie on the host, where they go in each slot, and as they are used there."""

    on_host: Tensor
    slots: Sequence[Tensor]
    experts: Sequence[Experts]


@dataclass(frozen=True, slots=True)
class LayerPages:
    """A layer's weights: what is read to where, and as they are found in each place.

    `on_host` is all that does not stay on the GPU. `dense` and `experts` are the vectors that are read, the experts
    that stay on the GPU apart from the others. `in_slots` is the layer while it lies in either slot, `parts` are those
    that its experts stream in, and the rest is what the CPU computes with.
    """

    on_host: Tensor
    dense: Tensor
    experts: tuple[Tensor, Tensor]
    in_slots: tuple[LayerWeights, ...]
    parts: Sequence[PartOfExperts]
    host_experts: NumberedExperts
    host_mixer: Any
    host_ffn: Any


WEIGHTS_ON_GPU: Final = (Purpose.RESIDENT_WEIGHTS, Purpose.WEIGHT_SLOTS, Purpose.EXPERT_SLOTS)
_PURPOSES: Final = (*WEIGHTS_ON_GPU, Purpose.WEIGHTS, Purpose.STAGING)


class StoredWeights(NamedTuple):
    """Where a model's weights are read, and of which family they are, which says how they are stored."""

    source: WeightSource
    family: Family


@final
class WeightPages:
    """The page table and the memory behind it, which is handed in as flat tensors, each for its purpose.

    Resident weights are what stays on the GPU and the head, weight slots what two layers stream whole, expert slots
    two parts of experts if they stream so, weights all that does not stay on the GPU and the token embedding, and
    staging the pinned pages. Experts have the numbers that the model's router gives
    them: of several ranks `rank` has those of its own.
    """

    def __init__(self, spec: ModelSpec, policy: Policy, memory: Mapping[Purpose, Tensor], *, rank: int = 0) -> None:
        dtype: torch.dtype = getattr(torch, policy.dtype)
        resident, slots, parts, host, staging = (memory[purpose].view(dtype) for purpose in _PURPOSES)
        self._spec, self._rank, self._staging, self.dtype = spec, rank, staging, dtype
        self._resident, self._host = _Cursor(resident), _Cursor(host)
        self._slots, self._part_slots = slots.view(WEIGHT_SLOTS, -1), parts.view(EXPERT_SLOTS, -1)
        self._for_cpu: list[tuple[Tensor, Tensor]] = []
        any_on_host = any(policy.host_bytes(spec, index) for index in range(spec.num_layers))
        cpu_experts = policy.ffn is Device.CPU and any_on_host
        self._layers = [self._pages_of(policy, index, cpu_experts=cpu_experts) for index in range(spec.num_layers)]
        self._head = self._resident.take(spec.head_parameters)
        self.head: HeadWeights | None = head_views(spec, self._head) if spec.has_head else None
        self.embedding: Tensor = self._host.take(spec.embedding_parameters).view(-1, spec.hidden_size)

    def _pages_of(self, policy: Policy, index: int, *, cpu_experts: bool) -> LayerPages:
        spec, layer, count = self._spec, self._spec.layers[index], policy.resident_experts[index]
        num_dense = num_elements(dense_tensors(layer), self.dtype)
        streamed_dense = 0 if policy.resident_dense else num_dense
        num_streamed = policy.streamed_bytes(spec, index, Phase.PREFILL) // self.dtype.itemsize
        on_host = self._host.take(policy.host_bytes(spec, index) // self.dtype.itemsize)
        dense = self._resident.take(num_dense - streamed_dense)
        resident = self._resident.take(count * num_elements(expert_tensors(layer), self.dtype))
        others, first = on_host[streamed_dense:], layer.experts_of(self._rank).start
        fixed, first_on_host = experts_in(layer, resident, first), first + count
        in_slots: list[LayerWeights] = []
        for slot in self._slots:
            in_slot = experts_in(layer, slot[streamed_dense:num_streamed], first_on_host)
            views = dense_views(layer, slot[:streamed_dense] if streamed_dense else dense)
            in_slots.append(LayerWeights(views, fixed, fixed + in_slot, layer.has_experts))
        mixer, ffn = in_slots[0].dense.mixer, in_slots[0].dense.ffn
        if streamed_dense:
            dense = on_host[:streamed_dense]
            views = dense_views(layer, dense)
            mixer, ffn = views.mixer, views.ffn
        if not streamed_dense and policy.kv_caches_at(Place.HOST) > 0:
            mixer = self._copied(layer.mixer, mixer)
        if not streamed_dense and cpu_experts:
            ffn = self._copied(layer.ffn[0], ffn)
        return LayerPages(
            on_host=on_host,
            dense=dense,
            experts=(resident, others),
            in_slots=tuple(in_slots),
            parts=self._parts_of(layer, others, first_on_host, policy.experts_per_part),
            host_experts=experts_in(layer, others, first_on_host).each,
            host_mixer=mixer,
            host_ffn=ffn,
        )

    def _parts_of(self, layer: Layer, experts: Tensor, first: int, per_part: int) -> list[PartOfExperts]:
        """The parts that experts, numbered from the first, stream in if they do, each with its views in every slot."""
        found: list[PartOfExperts] = []
        size = self._part_slots.shape[1]
        for number, on_host in enumerate(experts.split(size) if size and len(experts) else ()):
            slots = [slot[: len(on_host)] for slot in self._part_slots]
            views = [experts_in(layer, slot, first + number * per_part) for slot in slots]
            found.append(PartOfExperts(on_host, slots, views))
        return found

    def _copied(self, block: Block, weights: Any) -> Any:
        """A block's weights on the GPU, but for what its part on the CPU reads, which has a place there too."""
        here: dict[str, Tensor] = {}
        for tensor in block.tensors:
            if tensor.name in block.host_tensors:
                here[tensor.name] = self._host.take(tensor.parameters, aligned=True).view(tensor.shape)
                self._for_cpu.append((here[tensor.name], getattr(weights, tensor.name)))
        return replace(weights, **here)

    def load(
        self,
        stored: StoredWeights,
        backend: AbstractBackend,
        loading: Loading | None,
        *,
        whole: ModelSpec | None = None,
        first_layer: int = 0,
    ) -> None:
        """Read every weight once, straight to where it stays; `loading` tells how far that is.

        Of several ranks one reads what it has of the `whole` model's, and of several stages its layers from
        `first_layer` on.
        """
        (source, family), spec = stored, whole or self._spec
        part = RankPart(self._spec, self._rank) if self._spec.ranks > 1 else None

        def read(place: Target) -> None:
            family.load(source, spec, place.tensors, place.flat, first_layer + place.layer, place.expert, part=part)

        head = self.head if self._spec.has_embedding and family.has_one_head(spec, source.names) else None
        fill(self._places(one_head=head is not None), read, loading or Loading())
        twice = [*self._for_cpu, *([(head.lm_head, self.embedding)] if head is not None else [])]
        backend.transfer(Lane.STAGE, twice)
        backend.synchronise()

    def _places(self, *, one_head: bool) -> list[Target]:
        spec = self._spec
        head = spec.head_tensors[: -1 if one_head else None]
        outside = (spec.embedding_tensors, self.embedding.view(-1)), (head, self._head)
        places = [Target(each, flat[: num_elements(each, flat.dtype)]) for each, flat in outside if each]
        for index, (layer, pages) in enumerate(zip(spec.layers, self._layers, strict=True)):
            places.append(Target(dense_tensors(layer), pages.dense, index))
            tensors = expert_tensors(layer)
            size = num_elements(tensors, self._head.dtype)
            parts = (part.view(-1, size) for part in pages.experts if len(part))
            experts = enumerate(chain.from_iterable(parts))
            places += [Target(tensors, flat, index, expert) for expert, flat in experts]
        return places

    def layer(self, layer: int, slot: int) -> LayerWeights:
        """The layer's weights, its streamed ones in that slot."""
        return self._layers[layer].in_slots[slot]

    def part(self, layer: int, number: int) -> PartOfExperts:
        """One of the parts that the layer's experts stream in."""
        return self._layers[layer].parts[number]

    def on_host(self, layer: int, page: slice) -> Tensor:
        """One page where it lies in host memory."""
        return self._layers[layer].on_host[page]

    def of_layer(self, layer: int) -> LayerPages:
        """All of a layer's weights, those that the CPU computes with among them."""
        return self._layers[layer]

    def in_slot(self, slot: int, page: slice) -> Tensor:
        """Where that page goes on the GPU."""
        return self._slots[slot][page]

    def staged(self, slot: int, page: slice) -> Tensor:
        """Where that page goes on its way: one of the pinned pages."""
        room = len(self._staging) // STAGING_PAGES
        start = slot * room
        assert page.stop - page.start <= room, (page, room)
        return self._staging[start : start + page.stop - page.start]


def page_slice(num_bytes: int, num_pages: int, page: int, dtype: torch.dtype) -> slice:
    """Elements, in a vector of that dtype, that make up a page of a layer's streamed weights."""
    assert num_bytes % ALIGNMENT_BYTES == 0, num_bytes
    parts, size = num_bytes // ALIGNMENT_BYTES, ALIGNMENT_BYTES // dtype.itemsize
    return slice(page * parts // num_pages * size, (page + 1) * parts // num_pages * size)


@final
class _Cursor:
    """Cuts a flat tensor into consecutive parts."""

    def __init__(self, flat: Tensor) -> None:
        self._flat, self._next = flat, 0

    def take(self, count: int, *, aligned: bool = False) -> Tensor:
        """So many elements, and none of what aligns the next part, if it is to be."""
        part = self._flat.narrow(0, self._next, count)
        size = self._flat.itemsize
        self._next += aligned_bytes(count * size) // size if aligned else count
        return part
