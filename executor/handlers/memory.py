"""All memory of a run, each purpose as large as hrm.memory planned it.

N requests in a batch, T tokens, D hidden, K experts per token, B buffers; of a token X elements of a
row between projections and attention, or as many as lie in its bytes if what is cached of it is quantised, O of
attention's output, S of what waits for it.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from executor.backends import AbstractBackend
from executor.handlers.arenas import HostArenas
from executor.kv_cache import KvCaches
from executor.model import Architecture, Routing, Workspace
from executor.model.in_place import put
from executor.weight_pages import WEIGHTS_ON_GPU, WeightPages
from hrm.buffers import Purpose, bytes_by_purpose
from hrm.contract.rings import BUFFERS
from hrm.contract.rows import NUMBERS_PER_REQUEST, NUMBERS_PER_TOKEN, ROUTING_BYTES, TOKEN_NUMBER_BYTES
from hrm.formats import Formats
from hrm.model_spec import ModelSpec
from hrm.tasks import Device


@final
class Exchange:
    """One level's decode buffers: a row per request, with all that moves between the levels.

    `routed`, `expert_output`, `pending`, `weights` and `experts` are there only if the CPU computes
    experts, `held` only on the GPU, and `sent`, hidden states on their way to the next stage of a pipeline, only
    on the host of one. What layers of different kinds have of different widths is found by
    `narrow`. `numbers` are NUMBERS_PER_REQUEST for each request, once for each reach of the model;
    see executor.model.numbers.
    """

    def __init__(
        self,
        spec: ModelSpec,
        formats: Formats,
        memory: Tensor,
        *,
        num_requests: int,
        ffn_on_cpu: bool,
        holds: bool = False,
        sends: bool = False,
    ) -> None:
        mixers = [kind.mixer for kind in spec.layer_kinds()]
        dtype: torch.dtype = getattr(torch, formats.compute.name)
        start = 0

        def rows(width: int, of: torch.dtype) -> Tensor:
            nonlocal start
            end = start + num_requests * width * of.itemsize
            start, part = end, memory[start:end]
            return part.view(of).view(num_requests, width)

        routed = int(ffn_on_cpu)
        # First what kernels read 16 bytes at a time: its rows are multiples of that.
        self.hidden_ND = rows(spec.hidden_size, dtype)
        self.sent_ND = rows(sends * spec.hidden_size, dtype)
        self.rows_NX = rows(max(mixer.sent_bytes(formats) for mixer in mixers) // dtype.itemsize, dtype)
        self.attention_NO = rows(max(mixer.returned_elements for mixer in mixers), dtype)
        self.held_NS = rows(holds * max(mixer.held_elements for mixer in mixers), dtype)
        self.routed_ND = rows(routed * spec.hidden_size, dtype)
        self.expert_output_ND = rows(routed * spec.hidden_size, dtype)
        self.pending_NP = rows(routed * spec.pending_elements, dtype)
        reaches = spec.num_reaches
        self.numbers = rows(reaches * NUMBERS_PER_REQUEST, torch.int64).view(reaches, -1)
        self.experts_NK = rows(routed * spec.experts_per_token, torch.int64)
        self.weights_NK = rows(routed * spec.experts_per_token, torch.float32)

    def routed(self, span: slice) -> "Routed":
        """What goes to the CPU's experts of the rows of `span`, which is within one micro-batch's."""
        pending_RP = narrow(self.pending_NP, span, self.pending_NP.shape[1])
        return Routed(self.routed_ND[span], self.weights_NK[span], self.experts_NK[span], pending_RP)


def narrow(buffer_NW: Tensor, span: slice, width: int) -> Tensor:
    """The rows of `span`, which is within one micro-batch's, with fewer elements each.

    They lie one after the other from where the micro-batch's begin.
    """
    count, widest = span.stop - span.start, buffer_NW.shape[1]
    return buffer_NW.as_strided((count, width), (width, 1), buffer_NW.storage_offset() + span.start * widest)


@final
@dataclass(frozen=True, slots=True)
class Routed:
    """Tokens on their way to the CPU's experts: what these compute, and with which weights.

    Of each there is also what waits for its experts' sum, rows of contiguous memory.
    """

    tokens_TD: Tensor  # noqa: N815
    weights_TK: Tensor  # noqa: N815
    experts_TK: Tensor  # noqa: N815
    pending_TP: Tensor  # noqa: N815

    @property
    def routing(self) -> Routing:
        """Which experts they go to."""
        return Routing(self.weights_TK, self.experts_TK)

    @property
    def pending_2TD(self) -> Tensor:  # noqa: N802
        """What waits as `executor.model.feed_forward` has it, if anything does."""
        return self.pending_TP.view(2, *self.tokens_TD.shape)

    def keep(self, x_TD: Tensor, routing: Routing, pending_2TD: Tensor | None) -> None:
        """Write them all."""
        put(self.tokens_TD, x_TD)
        put(self.weights_TK, routing.weights_TK)
        put(self.experts_TK, routing.experts_TK)
        if pending_2TD is not None:
            put(self.pending_2TD, pending_2TD)

    def copies_to(self, there: "Routed") -> list[tuple[Tensor, Tensor]]:
        """The copies, target first, that bring them to another place."""
        parts = ("tokens_TD", "weights_TK", "experts_TK", "pending_TP")
        return [(getattr(there, name), getattr(self, name)) for name in parts]


@final
class RoutedTokens:
    """One level's buffers of chunks on their way to the CPU's experts, if it computes any in prefill."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, memory: Tensor) -> None:
        width, waiting = spec.hidden_size * dtype.itemsize, spec.pending_elements * dtype.itemsize
        chosen = spec.experts_per_token
        tokens = len(memory) // (BUFFERS * (width + waiting + ROUTING_BYTES * chosen))
        of_tokens, of_pending, of_weights, of_experts = memory.split(
            [BUFFERS * tokens * each for each in (width, waiting, 4 * chosen, 8 * chosen)]
        )
        self._tokens_BTD = of_tokens.view(dtype).view(BUFFERS, tokens, spec.hidden_size)
        self._pending_BTP = of_pending.view(dtype).view(BUFFERS, tokens, spec.pending_elements)
        self._weights_BTK = of_weights.view(torch.float32).view(BUFFERS, tokens, chosen)
        self._experts_BTK = of_experts.view(torch.int64).view(BUFFERS, tokens, chosen)

    def of(self, slot: int, count: int) -> Routed:
        """So many tokens in one of the buffers."""
        each = self._tokens_BTD, self._weights_BTK, self._experts_BTK, self._pending_BTP
        return Routed(*(part[slot, :count] for part in each))


@final
class PrefillBuffers:
    """Chunks on the GPU, one in use and one in transfer, and all hidden states on the host.

    `prefix` keeps of one layer what a prompt that is split needs of its earlier parts, until its last
    one. It and `kv` are bytes, of which `executor.kv_cache.cache_rows` makes a layer's rows.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        *,
        gpu: Tensor,
        host: Tensor,
        host_routed: Tensor,
        prefix: Tensor,
        chunk_tokens: int,
    ) -> None:
        numbers = TOKEN_NUMBER_BYTES * BUFFERS * chunk_tokens
        self.numbers_BT = gpu[:numbers].view(torch.int64).view(BUFFERS, -1)
        hidden = numbers + BUFFERS * chunk_tokens * spec.hidden_size * dtype.itemsize
        self.hidden_BTD = gpu[numbers:hidden].view(dtype).view(BUFFERS, chunk_tokens, spec.hidden_size)
        routed = len(gpu) - len(host_routed)
        self.kv_B = gpu[hidden:routed].view(BUFFERS, -1)
        self.routed = RoutedTokens(spec, dtype, gpu[routed:])
        self.host_routed = RoutedTokens(spec, dtype, host_routed)
        self.prefix = prefix
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
    planned = bytes_by_purpose(host.needs.on_gpu())

    def take(purpose: Purpose) -> Tensor:
        return backend.allocate(Device.GPU, planned[purpose])

    layers, logits = planned[Purpose.WORKSPACE], planned[Purpose.LOGITS]
    workspace, sampling_workspace = backend.workspace(layers, layers + logits)
    on_gpu = {purpose: take(purpose) for purpose in WEIGHTS_ON_GPU}
    weights = WeightPages(spec, policy, {**host.memory, **on_gpu}, rank=arch.rank)
    kv_buffers = take(Purpose.KV_BUFFERS)
    idle = kv_buffers[: len(kv_buffers) // BUFFERS]  # until decode, and as long as any prompt is cached
    caches = KvCaches(
        spec,
        policy,
        gpu=take(Purpose.KV_CACHE),
        host=host.memory[Purpose.KV_CACHE],
        buffers=kv_buffers,
        batches=host.needs.batches,
    )

    return RunMemory(
        weights=weights,
        caches=caches,
        gpu=_exchange(spec, host, take(Purpose.EXCHANGE), on_host=False),
        host=_exchange(spec, host, host.memory[Purpose.EXCHANGE], on_host=True),
        prefill=PrefillBuffers(
            spec,
            dtype,
            gpu=take(Purpose.PREFILL_BUFFERS),
            host=host.memory[Purpose.PREFILL_HIDDEN],
            host_routed=host.memory[Purpose.PREFILL_BUFFERS],
            prefix=take(Purpose.PREFIX_BUFFER) if planned[Purpose.PREFIX_BUFFER] > len(idle) else idle,
            chunk_tokens=policy.prefill_chunk_tokens,
        ),
        workspace=workspace,
        sampling_workspace=sampling_workspace,
        host_workspace=Workspace(host.memory[Purpose.WORKSPACE]),
        tokens_at_once=max(policy.micro_batch_size, policy.prefill_chunk_tokens),
    )


def _exchange(spec: ModelSpec, host: HostArenas, memory: Tensor, *, on_host: bool) -> Exchange:
    """What decode's tasks hand over at one level."""
    return Exchange(
        spec,
        host.policy.formats,
        memory,
        num_requests=int(host.needs.places),
        ffn_on_cpu=len(host.memory[Purpose.WORKSPACE]) > 0,
        holds=not on_host,
        sends=on_host and host.needs.batches > 1,
    )
