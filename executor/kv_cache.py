"""KV caches: one for each micro-batch, on the GPU's or the host's level, layer after layer.

A request owns consecutive rows of a layer's cache: of one in which every token has its own, whole
blocks of KV_BLOCK_TOKENS, enough for its prompt and all that it may generate.

L layers, C rows of a micro-batch's cache, W elements of a row, or bytes if it has codes.
"""

from collections.abc import Sequence
from copy import copy
from typing import final

import torch
from torch import Tensor

from executor.model.kv_rows import row_dtype
from hrm.buffers import cache_bytes_in
from hrm.contract.rings import BUFFERS
from hrm.layers import Layer
from hrm.model_spec import ModelSpec
from hrm.policy import Policy


@final
class KvCaches:
    """The caches of a batch, of all those that are under way; `gpu`, `host` and `buffers` are flat tensors of bytes."""

    def __init__(
        self, spec: ModelSpec, policy: Policy, *, gpu: Tensor, host: Tensor, buffers: Tensor, batches: int = 1
    ) -> None:
        on_gpu = policy.gpu_kv_micro_batches
        self._spec, self._policy = spec, policy
        size, tokens = policy.micro_batch_size, policy.kv_tokens_per_micro_batch
        self._sizes = [int(cache_bytes_in(layer, policy.formats, size, tokens)) for layer in spec.layers]
        self._gpu = self._layers_of(gpu, batches * on_gpu)
        self._host = self._layers_of(host, batches * (policy.num_micro_batches - on_gpu))
        self._buffers = buffers.view(BUFFERS, -1)
        self._of_micro_batch: list[list[Tensor]] = []

    def _layers_of(self, flat: Tensor, count: int) -> list[list[Tensor]]:
        """The layers' caches of so many micro-batches."""
        return [
            [
                cache_rows(layer, self._policy, part)
                for layer, part in zip(self._spec.layers, cache.split(self._sizes), strict=True)
            ]
            for cache in flat.view(count, sum(self._sizes))
        ]

    def assigned(self, on_gpu: Sequence[bool], batches: int) -> "tuple[KvCaches, ...]":
        """The caches of so many batches, each micro-batch's on the level that it asks for in any of them."""
        gpu, host = iter(self._gpu), iter(self._host)
        found = tuple(copy(self) for _ in range(batches))
        for caches in found:
            caches._of_micro_batch = [next(gpu if here else host) for here in on_gpu]  # noqa: SLF001 - its own
        return found

    def of(self, micro_batch: int, layer: int) -> Tensor:
        """One layer of a micro-batch's cache where it lives, (C, W)."""
        return self._of_micro_batch[micro_batch][layer]

    def buffer(self, slot: int, layer: int) -> Tensor:
        """One of the buffers on the GPU, for that layer, (C, W)."""
        return cache_rows(self._spec.layers[layer], self._policy, self._buffers[slot][: self._sizes[layer]])


def cache_rows(layer: Layer, policy: Policy, memory: Tensor) -> Tensor:
    """Memory for a layer's cache as rows: a token's in the run's dtype or in codes, or bytes of a state."""
    mixer, dtype = layer.mixer, torch.uint8
    row_bytes = mixer.cached_bytes(policy.formats) or mixer.state_bytes(policy.formats)
    if mixer.cached_elements:
        dtype = row_dtype(policy.formats.kv_cache, getattr(torch, policy.dtype))
    return _rows(memory, row_bytes, dtype)


def prefix_rows(num_elements: int, policy: Policy, memory: Tensor) -> Tensor:
    """Memory for earlier parts of a prompt as rows of so many elements, in the run's dtype."""
    dtype: torch.dtype = getattr(torch, policy.dtype)
    return _rows(memory, num_elements * dtype.itemsize, dtype)


def _rows(memory: Tensor, row_bytes: int, dtype: torch.dtype) -> Tensor:
    """Whole rows of memory; what is left over is none."""
    return memory[: memory.shape[0] // row_bytes * row_bytes].view(dtype).view(-1, row_bytes // dtype.itemsize)
