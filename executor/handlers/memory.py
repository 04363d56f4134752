"""All memory of a run, each purpose as large as hrm.memory planned it.

N requests in a batch, T tokens, D hidden, Q = heads*head_dim, X = Q+2KV, K experts per token,
G kv heads, d head_dim, B buffers.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from executor.backends import AbstractBackend
from executor.handlers.arenas import HostArenas
from executor.kv_cache import KvCaches
from executor.model import Architecture, Workspace
from executor.weight_pages import WeightPages
from hrm.buffers import Purpose, by_purpose
from hrm.contract.rings import BUFFERS
from hrm.contract.rows import NUMBERS_PER_REQUEST, NUMBERS_PER_TOKEN, TOKEN_NUMBER_BYTES
from hrm.model_spec import ModelSpec
from hrm.tasks import Device


@final
class Exchange:
    """One level's decode buffers: a row per request, with all that moves between the levels.

    `routed`, `expert_output`, `weights` and `experts` are there only if the CPU computes experts.
    `numbers` are NUMBERS_PER_REQUEST for each request; see executor.model.numbers.
    """

    def __init__(
        self, spec: ModelSpec, dtype: torch.dtype, memory: Tensor, *, num_requests: int, ffn_on_cpu: bool
    ) -> None:
        start = 0

        def rows(width: int, of: torch.dtype) -> Tensor:
            nonlocal start
            end = start + num_requests * width * of.itemsize
            start, part = end, memory[start:end]
            return part.view(of).view(num_requests, width)

        routed = int(ffn_on_cpu)
        # First what kernels read 16 bytes at a time: its rows are multiples of that.
        self.hidden_ND = rows(spec.hidden_size, dtype)
        self.qkv_NX = rows(spec.attention.projected_size, dtype)
        self.attention_NQ = rows(spec.attention.returned_elements, dtype)
        self.routed_ND = rows(routed * spec.hidden_size, dtype)
        self.expert_output_ND = rows(routed * spec.hidden_size, dtype)
        self.numbers = rows(NUMBERS_PER_REQUEST, torch.int64).flatten()
        self.experts_NK = rows(routed * spec.experts_per_token, torch.int64)
        self.weights_NK = rows(routed * spec.experts_per_token, torch.float32)


@final
class PrefillBuffers:
    """Chunks on the GPU, one in use and one in transfer, and all hidden states on the host.

    `prefix_C2Gd` keeps one layer's keys and values of a prompt that is split, until its last part.
    """

    def __init__(
        self, spec: ModelSpec, dtype: torch.dtype, *, gpu: Tensor, host: Tensor, prefix: Tensor, chunk_tokens: int
    ) -> None:
        numbers = TOKEN_NUMBER_BYTES * BUFFERS * chunk_tokens
        self.numbers_BT = gpu[:numbers].view(torch.int64).view(BUFFERS, -1)
        elements = gpu[numbers:].view(dtype)
        hidden = BUFFERS * chunk_tokens * spec.hidden_size
        self.hidden_BTD = elements[:hidden].view(BUFFERS, chunk_tokens, spec.hidden_size)
        self.kv_BT2Gd = elements[hidden:].view(BUFFERS, chunk_tokens, *spec.attention.cached_shape)
        self.prefix_C2Gd = prefix.view(dtype).view(-1, *spec.attention.cached_shape)
        tokens = len(host) // (spec.hidden_size * dtype.itemsize + TOKEN_NUMBER_BYTES)
        self.host_numbers_T2 = host[: TOKEN_NUMBER_BYTES * tokens].view(torch.int64).view(-1, NUMBERS_PER_TOKEN)
        elements = host[TOKEN_NUMBER_BYTES * tokens :].view(dtype)
        self.host_TD = elements.view(tokens, spec.hidden_size)


@dataclass(frozen=True, slots=True)
class RunMemory:
    """All memory of a run; made once, used by every batch.

    `tokens_at_once` is what the workspace was planned for.
    """

    weights: WeightPages
    caches: KvCaches
    gpu: Exchange
    host: Exchange
    prefill: PrefillBuffers
    workspace: Workspace
    sampling_workspace: Workspace
    host_workspace: Workspace
    tokens_at_once: int


def allocate(backend: AbstractBackend, arch: Architecture, host: HostArenas) -> RunMemory:
    """All memory of a run beside the host's, each purpose as large as planned."""
    spec, policy = arch.spec, host.policy
    dtype: torch.dtype = getattr(torch, policy.dtype)
    planned = by_purpose(host.needs.on_gpu())

    def take(purpose: Purpose) -> Tensor:
        return backend.allocate(Device.GPU, planned[purpose])

    layers, logits = planned[Purpose.WORKSPACE], planned[Purpose.LOGITS]
    workspace, sampling_workspace = backend.workspace(layers, layers + logits)
    weights = WeightPages(
        spec,
        policy,
        resident=take(Purpose.RESIDENT_WEIGHTS).view(dtype),
        slots=take(Purpose.WEIGHT_SLOTS).view(dtype),
        host=host.memory[Purpose.WEIGHTS].view(dtype),
        staging=host.memory[Purpose.STAGING].view(dtype),
    )
    kv_buffers = take(Purpose.KV_BUFFERS)
    caches = KvCaches(
        spec,
        policy,
        gpu=take(Purpose.KV_CACHE).view(dtype),
        host=host.memory[Purpose.KV_CACHE].view(dtype),
        buffers=kv_buffers.view(dtype),
    )

    def exchange(memory: Tensor) -> Exchange:
        ffn_on_cpu = len(host.memory[Purpose.WORKSPACE]) > 0
        return Exchange(spec, dtype, memory, num_requests=policy.batch_size, ffn_on_cpu=ffn_on_cpu)

    return RunMemory(
        weights=weights,
        caches=caches,
        gpu=exchange(take(Purpose.EXCHANGE)),
        host=exchange(host.memory[Purpose.EXCHANGE]),
        prefill=PrefillBuffers(
            spec,
            dtype,
            gpu=take(Purpose.PREFILL_BUFFERS),
            host=host.memory[Purpose.PREFILL_HIDDEN],
            # Decode's KV buffers are as long as any prompt, and idle until then.
            prefix=kv_buffers[: len(kv_buffers) // BUFFERS] if len(kv_buffers) else take(Purpose.PREFIX_BUFFER),
            chunk_tokens=policy.prefill_chunk_tokens,
        ),
        workspace=workspace,
        sampling_workspace=sampling_workspace,
        host_workspace=Workspace(host.memory[Purpose.WORKSPACE]),
        tokens_at_once=max(policy.micro_batch_size, policy.prefill_chunk_tokens),
    )
