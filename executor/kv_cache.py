"""KV caches: one tensor a micro-batch, on the GPU's or the host's level, cut into whole blocks.

L layers, C tokens of a micro-batch's cache, G kv heads, d head_dim. A request owns consecutive
blocks of KV_BLOCK_TOKENS tokens, enough for its prompt and all that it may generate.
"""

from collections.abc import Sequence
from typing import final

from torch import Tensor

from hrm.contract.rings import BUFFERS
from hrm.model_spec import ModelSpec
from hrm.policy import Policy


@final
class KvCaches:
    """The caches of a batch; `gpu`, `host` and `buffers` are flat tensors of the run's dtype."""

    def __init__(self, spec: ModelSpec, policy: Policy, *, gpu: Tensor, host: Tensor, buffers: Tensor) -> None:
        token = spec.attention.cached_shape
        tokens = policy.kv_tokens_per_micro_batch
        on_gpu = policy.gpu_kv_micro_batches
        on_host = policy.num_micro_batches - on_gpu
        self._gpu_xLC2Gd = gpu.view(on_gpu, spec.num_layers, tokens, *token)
        self._host_xLC2Gd = host.view(on_host, spec.num_layers, tokens, *token)
        self._buffers_BC2Gd = buffers.view(BUFFERS if len(buffers) else 0, tokens, *token)
        self._of_micro_batch: list[Tensor] = []

    def assign(self, on_gpu: Sequence[bool]) -> None:
        """Give each micro-batch of a batch its cache on the level that it asks for."""
        gpu, host = iter(self._gpu_xLC2Gd), iter(self._host_xLC2Gd)
        self._of_micro_batch = [next(gpu if here else host) for here in on_gpu]

    def of(self, micro_batch: int, layer: int) -> Tensor:
        """One layer of a micro-batch's cache where it lives, (C, 2, G, d)."""
        return self._of_micro_batch[micro_batch][layer]

    def buffer(self, slot: int) -> Tensor:
        """One of the buffers on the GPU, (C, 2, G, d)."""
        return self._buffers_BC2Gd[slot]
