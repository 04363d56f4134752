"""Weights: what stays on the GPU, what streams to it page by page, and where each piece is found.

A layer's other weights lie contiguously in host memory, its dense part first if that streams, then
the experts that do not stay; a page is a slice of them. On the GPU they land in one of two slots,
without the experts if the CPU computes these in both phases, or if they stream in parts: each part
then lands in one of two slots for parts. The page table is made of views, one set for each place
where a layer, or a part of its experts, can lie.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, final

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


@final
class WeightPages:
    """The page table and the memory behind it, which is handed in as flat tensors of the dtype.

    `resident` holds what stays on the GPU and the head, `slots` what two layers stream whole, `parts`
    two parts of experts if they stream so, `host` all that does not stay on the GPU and the token
    embedding, and `staging` the pinned pages. Experts have the numbers that the model's router gives
    them: of several ranks `rank` has those of its own.
    """

    def __init__(
        self,
        spec: ModelSpec,
        policy: Policy,
        *,
        resident: Tensor,
        slots: Tensor,
        parts: Tensor,
        host: Tensor,
        staging: Tensor,
        rank: int = 0,
    ) -> None:
        self._spec, self._rank = spec, rank
        resident_parts, host_parts = _Cursor(resident), _Cursor(host)
        self._slots, self._part_slots = slots.view(WEIGHT_SLOTS, -1), parts.view(EXPERT_SLOTS, -1)
        self._staging = staging
        self.dtype = slots.dtype
        self._on_host: list[Tensor] = []
        self._layers: list[tuple[LayerWeights, ...]] = []
        self._parts: list[list[PartOfExperts]] = []
        self._dense: list[Tensor] = []
        self._experts: list[list[Tensor]] = []
        self.host_experts: list[NumberedExperts] = []
        self.host_mixers: list[Any] = []
        self.host_ffns: list[Any] = []
        self._for_cpu: list[tuple[Tensor, Tensor]] = []
        cpu_attends = policy.kv_caches_at(Place.HOST) > 0
        any_on_host = any(policy.host_bytes(spec, index) for index in range(spec.num_layers))
        cpu_experts = policy.ffn is Device.CPU and any_on_host
        for index, (layer, count) in enumerate(zip(spec.layers, policy.resident_experts, strict=True)):
            num_dense = num_elements(dense_tensors(layer), resident.dtype)
            streamed_dense = 0 if policy.resident_dense else num_dense
            on_host = host_parts.take(policy.host_bytes(spec, index) // host.itemsize)
            num_streamed = policy.streamed_bytes(spec, index, Phase.PREFILL) // slots.itemsize
            resident_dense = resident_parts.take(num_dense - streamed_dense)
            resident_experts = resident_parts.take(count * num_elements(expert_tensors(layer), resident.dtype))
            first = layer.experts_of(rank).start
            fixed = experts_in(layer, resident_experts, first)
            first_on_host = first + count
            self._on_host.append(on_host)
            self._dense.append(on_host[:streamed_dense] if streamed_dense else resident_dense)
            self._experts.append([resident_experts, on_host[streamed_dense:]])
            self.host_experts.append(experts_in(layer, on_host[streamed_dense:], first_on_host).each)
            streamed_experts = on_host[streamed_dense:] if len(parts) else on_host[:0]
            self._parts.append(self._parts_of(layer, streamed_experts, first_on_host, policy.experts_per_part))
            places: list[LayerWeights] = []
            for slot in self._slots:
                dense = dense_views(layer, slot[:streamed_dense] if streamed_dense else resident_dense)
                in_slot = experts_in(layer, slot[streamed_dense:num_streamed], first_on_host)
                places.append(LayerWeights(dense, fixed, fixed + in_slot, layer.has_experts))
            self._layers.append(tuple(places))
            dense = places[0].dense
            if streamed_dense:
                dense = dense_views(layer, on_host[:streamed_dense])
            elif cpu_attends:
                dense = replace(dense, mixer=self._copied(layer.mixer, dense.mixer, host_parts))
            if not streamed_dense and cpu_experts:
                dense = replace(dense, ffn=self._copied(layer.ffn[0], dense.ffn, host_parts))
            self.host_mixers.append(dense.mixer)
            self.host_ffns.append(dense.ffn)
        self._head = resident_parts.take(spec.head_parameters)
        self.head: HeadWeights | None = head_views(spec, self._head) if spec.has_head else None
        self.embedding: Tensor = host_parts.take(spec.embedding_parameters).view(-1, spec.hidden_size)

    def _parts_of(self, layer: Layer, experts: Tensor, first: int, per_part: int) -> "list[PartOfExperts]":
        """The parts that experts, numbered from the first, stream in, each with its views in every slot."""
        found: list[PartOfExperts] = []
        for number, on_host in enumerate(experts.split(self._part_slots.shape[1]) if len(experts) else ()):
            slots = [slot[: len(on_host)] for slot in self._part_slots]
            views = [experts_in(layer, slot, first + number * per_part) for slot in slots]
            found.append(PartOfExperts(on_host, slots, views))
        return found

    def _copied(self, block: Block, weights: Any, host: "_Cursor") -> Any:
        """A block's weights on the GPU, but for what its part on the CPU reads, which has a place there too."""
        here: dict[str, Tensor] = {}
        for tensor in block.tensors:
            if tensor.name in block.host_tensors:
                here[tensor.name] = host.take(tensor.parameters, aligned=True).view(tensor.shape)
                self._for_cpu.append((here[tensor.name], getattr(weights, tensor.name)))
        return replace(weights, **here)

    def load(
        self,
        source: WeightSource,
        family: Family,
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
        spec = whole or self._spec
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
        for index, layer in enumerate(spec.layers):
            places.append(Target(dense_tensors(layer), self._dense[index], index))
            tensors = expert_tensors(layer)
            size = num_elements(tensors, self._head.dtype)
            parts = (part.view(-1, size) for part in self._experts[index] if len(part))
            experts = enumerate(chain.from_iterable(parts))
            places += [Target(tensors, flat, index, expert) for expert, flat in experts]
        return places

    def layer(self, layer: int, slot: int) -> LayerWeights:
        """The layer's weights, its streamed ones in that slot."""
        return self._layers[layer][slot]

    def part(self, layer: int, number: int) -> "PartOfExperts":
        """One of the parts that the layer's experts stream in."""
        return self._parts[layer][number]

    def on_host(self, layer: int, page: slice) -> Tensor:
        """One page where it lies in host memory."""
        return self._on_host[layer][page]

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
