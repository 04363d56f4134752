"""Weights: what stays on the GPU, what streams to it page by page, and where each piece is found.

A layer's streamed weights lie contiguously in host memory, its dense part first if that streams,
then the experts that do not stay; a page is a slice of them. On the GPU they land in one of two
slots. The page table is made of views, one set for each place where a layer can lie.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from torch import Tensor

from executor.checkpoint import WeightSource
from executor.families import AbstractFamily
from executor.model import (
    Architecture,
    DenseWeights,
    ExpertStack,
    ExpertWeights,
    HeadWeights,
    dense_views,
    expert_stack,
    expert_views,
    head_views,
)
from hrm.contract.rings import STAGING_PAGES, WEIGHT_SLOTS
from hrm.model_spec import ModelSpec
from hrm.policy import Policy

NumberedExperts = Sequence[tuple[int, ExpertWeights]]


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """A layer as its tasks find it while it lies in one slot.

    `on_gpu` are the experts there from the start, `all_experts` those and the ones in the slot; the
    stacks are the same experts, those of a place together.
    """

    dense: DenseWeights
    on_gpu: NumberedExperts
    all_experts: NumberedExperts
    stacks_on_gpu: tuple[ExpertStack, ...]
    all_stacks: tuple[ExpertStack, ...]


@final
class WeightPages:
    """The page table and the memory behind it, which is handed in as flat tensors of the dtype.

    `resident` holds what stays on the GPU and the head, `slots` two layers' streamed weights,
    `host` all that streams and the token embedding, and `staging` the pinned pages.
    """

    def __init__(
        self, spec: ModelSpec, policy: Policy, *, resident: Tensor, slots: Tensor, host: Tensor, staging: Tensor
    ) -> None:
        self._spec, self._policy = spec, policy
        self.num_experts = spec.num_experts
        resident_parts, host_parts = _Cursor(resident), _Cursor(host)
        self._slots = slots.view(WEIGHT_SLOTS, -1)
        self._staging = staging
        self._streamed: list[Tensor] = []
        self._layers: list[tuple[LayerWeights, ...]] = []
        self.host_experts: list[NumberedExperts] = []
        self._sources: list[tuple[DenseWeights, NumberedExperts]] = []
        for layer, count in enumerate(policy.resident_experts):
            streamed = host_parts.take(policy.formats.weights.elements_in(policy.streamed_bytes(spec, layer)))
            self._streamed.append(streamed)
            fixed_dense = (
                dense_views(spec, resident_parts.take(spec.dense_parameters)) if policy.resident_dense else None
            )
            resident_experts = resident_parts.take(count * spec.expert_parameters)
            fixed, fixed_stacks = self._experts(resident_experts, 0)
            host_dense, host_experts, _ = self._views(streamed, count)
            self.host_experts.append(host_experts)
            dense = fixed_dense or host_dense
            assert dense is not None
            self._sources.append((dense, [*fixed, *host_experts]))
            places: list[LayerWeights] = []
            for slot in self._slots:
                slot_dense, slot_experts, slot_stacks = self._views(slot[: len(streamed)], count)
                here = fixed_dense or slot_dense
                assert here is not None
                stacks = (*fixed_stacks, *slot_stacks)
                places.append(LayerWeights(here, fixed, [*fixed, *slot_experts], fixed_stacks, stacks))
            self._layers.append(tuple(places))
        self.head: HeadWeights = head_views(spec, resident_parts.take(spec.head_parameters))
        self.embedding: Tensor = host_parts.take(spec.embedding_parameters).view(spec.vocab_size, spec.hidden_size)

    def load(self, source: WeightSource, family: AbstractFamily, arch: Architecture) -> None:
        """Read every weight once, straight to where it stays."""
        family.load_embedding(source, self.embedding)
        family.load_head(source, arch, self.head.final_norm, self.head.lm_head)
        for layer, (dense, experts) in enumerate(self._sources):
            family.load_dense(source, arch, layer, dense)
            for index, weights in experts:
                family.load_expert(source, arch, layer, index, weights)

    def layer(self, layer: int, load_index: int) -> LayerWeights:
        """The layer's weights, its streamed ones in the slot of its `load_index`."""
        return self._layers[layer][load_index % WEIGHT_SLOTS]

    def on_host(self, layer: int, page: slice) -> Tensor:
        """One page where it lies in host memory."""
        return self._streamed[layer][page]

    def in_slot(self, load_index: int, page: slice) -> Tensor:
        """Where that page goes on the GPU."""
        return self._slots[load_index % WEIGHT_SLOTS][page]

    def staged(self, pages_before: int, page: slice) -> Tensor:
        """Where that page goes on its way; `pages_before` counts all pages staged earlier."""
        room = len(self._staging) // STAGING_PAGES
        start = pages_before % STAGING_PAGES * room
        assert page.stop - page.start <= room, (page, room)
        return self._staging[start : start + page.stop - page.start]

    def _views(
        self, flat: Tensor, num_resident: int
    ) -> tuple[DenseWeights | None, NumberedExperts, tuple[ExpertStack, ...]]:
        parts = _Cursor(flat)
        spec = self._spec
        dense = None
        if not self._policy.resident_dense:
            dense = dense_views(spec, parts.take(spec.dense_parameters))
        streamed = (spec.num_experts - num_resident) * spec.expert_parameters
        return dense, *self._experts(parts.take(streamed), num_resident)

    def _experts(self, flat: Tensor, first: int) -> tuple[NumberedExperts, tuple[ExpertStack, ...]]:
        """All experts that lie in `flat`, one by one and as one stack if there are any."""
        if not len(flat):
            return [], ()
        each = flat.view(-1, self._spec.expert_parameters)
        experts = [(first + e, expert_views(self._spec, part)) for e, part in enumerate(each)]
        return experts, (expert_stack(self._spec, flat, first),)


def page_slice(num_elements: int, num_pages: int, page: int) -> slice:
    """Elements of a layer's streamed weights that make up one of its pages."""
    return slice(page * num_elements // num_pages, (page + 1) * num_elements // num_pages)


@final
class _Cursor:
    """Cuts a flat tensor into consecutive parts."""

    def __init__(self, flat: Tensor) -> None:
        self._flat, self._next = flat, 0

    def take(self, count: int) -> Tensor:
        part = self._flat.narrow(0, self._next, count)
        self._next += count
        return part
