"""Generates from batches of requests: the memory of a run, its weights, and its two phases."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import islice
from typing import Self, final

import torch

from executor.backends import AbstractBackend, in_thread_of_its_own
from executor.batching import Batch, Batcher, Completion, Nowhere, Request, Sink, chunks
from executor.checks import check_request
from executor.engine import Engine, PhaseResult, in_turns_of, joined
from executor.handlers import LENGTH, BatchState, EndOfText, Generated, HostArenas, RunMemory, allocate, never_stops
from executor.live import LiveBatch
from executor.loading import Loading
from executor.model import Architecture
from executor.model.choices import settle_choices
from executor.native import kernels
from executor.trace_budget import MAX_SPANS, TraceBudget
from executor.under_way import Peers, UnderWay, decode_handlers
from executor.warm_up import first_layers, small_batch
from executor.weight_pages import StoredWeights
from hrm.buffers import Purpose
from hrm.memory import MemoryPlan
from hrm.policy import Policy, ScheduleName
from hrm.schedules import decode_pipeline, iter_tasks, prefill_pipeline
from hrm.tasks import Device, Lane, Phase


@dataclass(frozen=True, slots=True)
class Planned:
    """A policy and what it needs at each memory level."""

    policy: Policy
    memory: MemoryPlan


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run is made from; `staged` is what is run if not as much is pinned as planned."""

    backend: AbstractBackend
    planned: Planned
    staged: Planned | None = None


@dataclass(frozen=True, slots=True)
class BatchResult:
    """A batch's completions and what its phases took; `decode` is None if prefill ended it all.

    `micro_batch_sizes[b]` counts requests of each micro-batch of the b-th batch under way, one but in a pipeline, and
    `num_chunks` those of all. `routed_tokens[i][e]` counts the tokens that layer i sent to expert e; it is empty where
    nothing was computed.
    """

    completions: tuple[Completion, ...]
    prefill: PhaseResult
    decode: PhaseResult | None
    micro_batch_sizes: tuple[tuple[int, ...], ...]
    num_chunks: int
    routed_tokens: tuple[tuple[int, ...], ...] = ()


class AbstractGenerator(ABC):
    """Runs batches; a context manager that owns the lanes.

    `policy` is what is run and `plan` what it needs; where that differs from what was asked for,
    `notice` says why, in a line. What crosses the link from memory that is not pinned though it
    should be is `pageable`. `load_s` says how long the weights and warming up took, `live` says how
    far the batch under way is, and `peak_bytes` how much of each level's purposes was ever in use. Of a
    pipeline's stages there are so many.
    """

    load_s: float
    num_stages: int = 1

    def __init__(self, backend: AbstractBackend, arch: Architecture, planned: Planned, max_spans: int) -> None:
        kernels()  # a mistake in EXECUTOR_NATIVE comes out before anything runs
        self.backend, self.arch = backend, arch
        self.policy, self.plan = planned.policy, planned.memory
        self.notice, self.pageable = "", tuple[str, ...]()
        self.engine = Engine(backend.enter_lane, backend.streams, backend.is_of_device, backend.waits)
        self.live = LiveBatch(self.engine)
        self._budget = TraceBudget(max_spans)

    @final
    def __enter__(self) -> Self:
        """Start the lanes, and leave all cores to them; may be entered again after its end."""
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self.engine.__enter__()
        return self

    @final
    def __exit__(self, *exception: object) -> None:
        """End the lanes and give torch its threads back."""
        self.engine.__exit__(*exception)
        torch.set_num_threads(self._threads)

    @final
    def check(self, request: Request) -> None:
        """Raise JobError if the request could never be run."""
        check_request(request, self.arch, self.policy)

    @final
    def batches(self, requests: Iterator[Request]) -> Iterator[Batch]:
        """The batches that run these requests: long texts apart from others, where they are rotated otherwise.

        In a pipeline, as many at once as there are stages.
        """
        apart = iter(Batcher(requests, self.policy, lambda request: self.arch.is_long(request.num_positions)))
        while several := list(islice(apart, self.num_stages)):
            yield Batch.together(several)

    def warm_up(self) -> None:  # noqa: B027 - where nothing is computed, nothing gets any faster
        """Have kernels ready for the sizes that the policy gives them, once; before any batch, within the lanes."""

    @property
    @abstractmethod
    def peak_bytes(self) -> dict[str, dict[Purpose, int]]:
        """Bytes ever in use by level and purpose; none where nothing is computed."""

    @abstractmethod
    def generate(
        self, batch: Batch, *, index: int = 0, sink: Sink | None = None, schedule: ScheduleName | None = None
    ) -> BatchResult:
        """Run both phases of one of the `batches`; TaskFailedError if a task fails.

        `sink` is given every completion as soon as its request has ended. Another `schedule` than
        the policy's must need the same memory.
        """

    @abstractmethod
    def rescue(self) -> BatchResult | None:
        """What `generate` did until it raised: its completions are the requests ended by then.

        None if it raised before the lanes had anything to do, or where nothing is computed.
        """

    @final
    def _policy_of(self, batch: Batch, schedule: ScheduleName | None) -> Policy:
        """What is run of the policy for a batch."""
        policy = batch.policy(self.policy)
        return policy if schedule is None else replace(policy, schedule=schedule)


@final
class Generator(AbstractGenerator):
    """Runs batches on real weights.

    Memory is allocated once, as planned, and weights are loaded into it once. If the system does
    not pin as much as a policy needs that stages no weights, what is prepared as `staged` is run, which does.
    Meanwhile `loading` tells how far that is. Where it has `peers`, it has its part of the model.
    """

    def __init__(
        self,
        prepared: Prepared,
        arch: Architecture,
        stored: StoredWeights,
        *,
        stops: EndOfText | None = None,
        loading: Loading | None = None,
        peers: Peers | None = None,
        max_spans: int = MAX_SPANS,
    ) -> None:
        start_s, backend, staged = time.perf_counter(), prepared.backend, prepared.staged
        super().__init__(backend, arch, prepared.planned, max_spans)
        self._under_way: list[UnderWay] = []
        self._stops = stops or never_stops
        self._peers = peers or Peers()
        self.num_stages, self._peers.stages.waits = self._peers.stages.size, self.engine.waits
        self._kv_peak = dict.fromkeys(Device, 0)
        threads = torch.get_num_threads()

        def load() -> tuple[HostArenas, RunMemory]:
            torch.set_num_threads(threads)
            computing = [lane for lane in Lane if lane.computes and lane not in backend.streams]
            settle_choices(arch.spec, getattr(torch, self.policy.dtype), map(backend.lane_threads, computing))
            alternative, batches = staged.policy if staged else None, self.num_stages
            host = HostArenas.allocate(backend, arch.spec, self.policy, alternative, batches=batches, loading=loading)
            memory = allocate(backend, arch, host)
            memory.weights.load(stored, backend, loading, whole=arch.whole, first_layer=arch.first_layer)
            backend.ready()
            return host, memory

        host, self.memory = in_thread_of_its_own(load)
        self.notice, self.pageable = host.notice, host.pageable
        if staged is not None and host.policy == staged.policy:
            self.policy, self.plan = staged.policy, staged.memory
        self.load_s = time.perf_counter() - start_s
        self._is_warm = False

    def warm_up(self) -> None:
        """Run a few layers on a small batch, in the run's own memory."""
        if self._is_warm:
            return
        start_s, small = time.perf_counter(), copy(self)  # which has the same memory and lanes
        small.arch, policy = first_layers(self.arch, self.policy)
        batch, small.policy = small_batch(small.arch, policy)
        small.live = LiveBatch(self.engine)
        small._budget, small._kv_peak = TraceBudget(0), dict.fromkeys(Device, 0)  # noqa: SLF001 - the copy's own
        small.generate(batch)
        self.load_s += time.perf_counter() - start_s
        self._is_warm = True

    def generate(
        self, batch: Batch, *, index: int = 0, sink: Sink | None = None, schedule: ScheduleName | None = None
    ) -> BatchResult:
        """Prefill and decode a batch; TaskFailedError if a task fails."""
        sink, spec, policy = sink or Nowhere(), self.arch.spec, self._policy_of(batch, schedule)
        self._under_way = []
        parts = batch.under_way
        on_gpu = [policy.kv_on_gpu(j) for j in range(policy.num_micro_batches)]
        places = self.policy.micro_batch_size if self.num_stages > 1 else None
        self._count_kv(parts, on_gpu)
        for part, caches in zip(parts, self.memory.caches.assigned(on_gpu, len(parts)), strict=True):
            arch = self._arch_of(part)
            state = BatchState(part, arch, self._stops, lambda ended: sink.put(_completion(ended)), places=places)
            memory = replace(self.memory, caches=caches)
            pieces = chunks(part, policy.prefill_chunk_tokens)
            pipeline = prefill_pipeline(spec, policy, num_chunks=len(pieces))
            self._under_way.append(UnderWay(self.backend, arch, policy, memory, state, self._peers, pieces, pipeline))
        decode = decode_pipeline(spec, policy, num_steps=self.num_stages * max(batch.num_steps, 1))
        states = [each.state for each in self._under_way]
        self.live.begin([each.prefill for each in self._under_way], decode, states)
        for each in self._under_way:
            self.live.enter(Phase.PREFILL)
            each.prefilled = self.engine.run(
                iter_tasks(each.prefill, policy.schedule),
                each.prefill_handlers(),
                batch=index,
                kept_steps=self._budget.prefill_steps,
                finished=sink.stops,
            )
            each.end_prefill()
        decoded = None
        if batch.num_steps and any(state.num_active for state in states):
            prefilled = joined([each.prefilled for each in self._under_way if each.prefilled is not None])
            self.live.enter(Phase.DECODE, prefilled)
            decoded = self.engine.run(
                iter_tasks(decode, policy.schedule),
                decode_handlers(self._under_way, decode, self.num_stages),
                batch=index,
                kept_steps=self._budget.steps(decode, policy.schedule, len(prefilled.spans)),
                finished=lambda: sink.stops() or not any(state.num_active for state in states),
            )
        for each in self._under_way:
            each.end(batch.num_steps)
        return self._result(None if decoded is None else in_turns_of(decoded, self.num_stages))

    def rescue(self) -> BatchResult | None:
        """What `generate` did until it raised."""
        if not self._under_way:
            return None
        last = self.engine.result()
        in_decode = all(each.prefilled is not None for each in self._under_way)
        return self._result(last if in_decode else None, cut_short=last)

    def _result(self, decoded: PhaseResult | None, cut_short: PhaseResult | None = None) -> BatchResult:
        """What came of the batch; if it was cut short, of the requests that had ended."""
        under_way = self._under_way
        sequences = [s for each in under_way for members in each.state.sequences for s in members]
        prefilled = [each.prefilled for each in under_way if each.prefilled is not None]
        if cut_short is not None:
            sequences = [s for s in sequences if s.finish_reason is not None]
            prefilled += [cut_short] * (decoded is None)
        routed = torch.tensor([each.state.routed for each in under_way]).sum(0)
        return BatchResult(
            tuple(_completion(s) for s in sequences),
            joined(prefilled),
            decoded,
            tuple(tuple(map(len, each.state.sequences)) for each in under_way),
            sum(len(each.chunks) for each in under_way),
            tuple(map(tuple, routed.tolist())),
        )

    @property
    def peak_bytes(self) -> dict[str, dict[Purpose, int]]:
        """Bytes ever in use by level and purpose."""
        memory = self.memory
        gpu = dict(self.plan.gpu.purposes)
        gpu[Purpose.WORKSPACE] = memory.workspace.high_water_bytes
        logits = gpu.get(Purpose.LOGITS, 0)  # none in a stage without the LM head
        gpu[Purpose.LOGITS] = min(logits, memory.sampling_workspace.high_water_bytes)
        allocated = self.backend.peak_gpu_bytes()
        if allocated is not None:  # arenas are as planned, the rest are torch's temporaries
            planned = self.plan.gpu.purposes
            rest = allocated - sum(planned.values()) + planned[Purpose.WORKSPACE] + logits
            gpu[Purpose.WORKSPACE] = max(0, min(rest, planned[Purpose.WORKSPACE]))
            gpu[Purpose.LOGITS] = max(0, rest - gpu[Purpose.WORKSPACE])
        cpu = dict(self.plan.cpu.purposes)
        if self.plan.gpu is not self.plan.cpu and self.plan.gpu.name != self.plan.cpu.name:
            for device, purposes in ((Device.GPU, gpu), (Device.CPU, cpu)):
                if Purpose.KV_CACHE in purposes:
                    purposes[Purpose.KV_CACHE] = self._kv_peak[device]
            if Purpose.WORKSPACE in cpu:
                cpu[Purpose.WORKSPACE] = memory.host_workspace.high_water_bytes
            return {self.plan.gpu.name: gpu, self.plan.cpu.name: cpu}
        gpu[Purpose.WORKSPACE] += memory.host_workspace.high_water_bytes
        gpu[Purpose.KV_CACHE] = sum(self._kv_peak.values())
        return {self.plan.gpu.name: gpu}

    def _arch_of(self, batch: Batch) -> Architecture:
        lengths = [request.num_positions for request in batch.requests]
        assert len({self.arch.is_long(length) for length in lengths}) == 1, "batches() keeps long texts apart"
        return self.arch.for_positions(max(lengths))

    def _count_kv(self, parts: Sequence[Batch], on_gpu: Sequence[bool]) -> None:
        token_bytes = self.arch.spec.kv_bytes_per_token(self.policy.formats)
        used = dict.fromkeys(Device, 0)
        for part in parts:
            for micro_batch, here in zip(part.micro_batches, on_gpu, strict=True):
                used[Device.GPU if here else Device.CPU] += micro_batch.kv_tokens * token_bytes
        self._kv_peak = {device: max(self._kv_peak[device], used[device]) for device in Device}


def _completion(ended: Generated) -> Completion:
    return Completion(
        ended.placed.request, tuple(ended.tokens), ended.finish_reason or LENGTH, ended.error, tuple(ended.logprobs)
    )
