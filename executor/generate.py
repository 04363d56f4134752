"""Generates from batches of requests: the memory of a run, its weights, and its two phases."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from typing import Self, final

import torch

from executor.backends import AbstractBackend, in_thread_of_its_own
from executor.backends.null import null_handlers
from executor.batching import Batch, Batcher, Completion, Nowhere, Request, Sink, chunks
from executor.checkpoint import WeightSource
from executor.engine import Engine, PhaseResult
from executor.errors import JobError
from executor.families import Family
from executor.group import Alone, Group
from executor.handlers import (
    LENGTH,
    BatchState,
    DecodeHandlers,
    EndOfText,
    Generated,
    HostArenas,
    PrefillHandlers,
    RunMemory,
    allocate,
    never_stops,
)
from executor.live import LiveBatch
from executor.loading import Loading
from executor.model import Architecture
from executor.model.choices import settle_choices
from executor.native import kernels
from executor.trace_budget import MAX_SPANS, TraceBudget
from executor.warm_up import first_layers, small_batch
from hrm.buffers import Purpose
from hrm.contract.pacing import Waits
from hrm.memory import MemoryPlan
from hrm.policy import Policy, ScheduleName
from hrm.schedules import Pipeline, decode_pipeline, iter_tasks, prefill_pipeline
from hrm.tasks import Lane, Phase, TaskId


@dataclass(frozen=True, slots=True)
class Planned:
    """A policy and what it needs at each memory level."""

    policy: Policy
    memory: MemoryPlan


@dataclass(frozen=True, slots=True)
class BatchResult:
    """A batch's completions and what its phases took; `decode` is None if prefill ended it all.

    `micro_batch_sizes` counts requests, and `routed_tokens[i][e]` the tokens that layer i sent to
    expert e; it is empty where nothing was computed.
    """

    completions: tuple[Completion, ...]
    prefill: PhaseResult
    decode: PhaseResult | None
    micro_batch_sizes: tuple[int, ...]
    num_chunks: int
    routed_tokens: tuple[tuple[int, ...], ...] = ()


def check_request(request: Request, arch: Architecture, policy: Policy) -> None:
    """Raise JobError if the request could never be run under the policy, whatever is beside it."""
    length, new = len(request.prompt), request.params.max_tokens
    longest = policy.max_prompt_tokens(arch.spec)
    rules = (
        (length >= 1, "<empty>", "must have at least one token", "give a prompt"),
        (
            length <= longest,
            f"<{length} tokens>",
            f"must have at most the {longest} tokens that the policy prefills",
            "shorten it or solve a policy with a greater --max-prompt-len",
        ),
        (
            request.kv_tokens <= policy.kv_tokens_per_micro_batch,
            f"<{length} tokens, {new} to generate>",
            f"must fit the policy's micro-batch cache of {policy.kv_tokens_per_micro_batch} tokens",
            "lower max_tokens, or solve a policy with greater --max-prompt-len or --gen-len",
        ),
        (
            length + new <= arch.max_position_embeddings,
            f"<{length} tokens, {new} to generate>",
            f"must stay within the model's {arch.max_position_embeddings} positions{arch.why_no_longer}",
            "shorten the prompt or lower max_tokens",
        ),
        (
            length == 0 or 0 <= min(request.prompt) <= max(request.prompt) < arch.vocab_size,
            f"<token ids up to {max(request.prompt, default=0)}>",
            f"must hold token ids from 0 to {arch.vocab_size - 1}",
            "tokenise it with this model's tokenizer",
        ),
    )
    for holds, value, rule, remedy in rules:
        if not holds:
            raise JobError(f"{request.name}: prompt", value, rule, remedy)


class AbstractGenerator(ABC):
    """Runs batches; a context manager that owns the lanes.

    `policy` is what is run and `plan` what it needs; where that differs from what was asked for,
    `notice` says why, in a line. What crosses the link from memory that is not pinned though it
    should be is `pageable`. `load_s` says how long the weights and warming up took, `live` says how
    far the batch under way is, and `peak_bytes` how much of each level's purposes was ever in use.
    """

    load_s: float

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
        """The batches that run these requests: long texts apart from others, where they are rotated otherwise."""
        return iter(Batcher(requests, self.policy, lambda request: self.arch.is_long(request.num_positions)))

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
    def _planned(
        self, batch: Batch, schedule: ScheduleName | None, num_chunks: int
    ) -> tuple[Policy, Pipeline, Pipeline]:
        """What is run of a batch: its policy, and the pipelines of both phases."""
        spec, policy = self.arch.spec, batch.policy(self.policy)
        policy = policy if schedule is None else replace(policy, schedule=schedule)
        return (
            policy,
            prefill_pipeline(spec, policy, num_chunks=num_chunks),
            decode_pipeline(spec, policy, num_steps=max(batch.num_steps, 1)),
        )


@final
class Generator(AbstractGenerator):
    """Runs batches on real weights.

    Memory is allocated once, as planned, and weights are loaded into it once. If the system does
    not pin as much as a policy needs that stages no weights, `staged` is run, which does. Meanwhile
    `loading` tells how far that is. One of several ranks has its part of the model, and its `group` to sum up with.
    """

    def __init__(
        self,
        backend: AbstractBackend,
        arch: Architecture,
        planned: Planned,
        *,
        family: Family,
        source: WeightSource,
        staged: Planned | None = None,
        stops: EndOfText | None = None,
        loading: Loading | None = None,
        group: Group | None = None,
        max_spans: int = MAX_SPANS,
    ) -> None:
        start_s = time.perf_counter()
        super().__init__(backend, arch, planned, max_spans)
        self._state: BatchState | None = None
        self._prefilled: PhaseResult | None = None
        self._num_chunks = 0
        self._stops = stops or never_stops
        self._group = group or Alone()
        self._kv_peak = {"gpu": 0, "cpu": 0}
        threads = torch.get_num_threads()

        def load() -> tuple[HostArenas, RunMemory]:
            torch.set_num_threads(threads)
            computing = [lane for lane in (Lane.GPU, Lane.CPU) if lane not in backend.streams]
            settle_choices(arch.spec, getattr(torch, self.policy.dtype), map(backend.lane_threads, computing))
            host = HostArenas.allocate(backend, arch.spec, planned.policy, staged.policy if staged else None)
            memory = allocate(backend, arch, host)
            memory.weights.load(source, family, backend, loading, whole=arch.whole, rank=arch.rank)
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
        small._budget, small._kv_peak = TraceBudget(0), {"gpu": 0, "cpu": 0}  # noqa: SLF001 - the copy's own
        small.generate(batch)
        self.load_s += time.perf_counter() - start_s
        self._is_warm = True

    def generate(
        self, batch: Batch, *, index: int = 0, sink: Sink | None = None, schedule: ScheduleName | None = None
    ) -> BatchResult:
        """Prefill and decode a batch; TaskFailedError if a task fails."""
        sink = sink or Nowhere()
        arch, memory = self._arch_of(batch), self.memory
        parts = chunks(batch, self.policy.prefill_chunk_tokens)
        policy, prefill, decode = self._planned(batch, schedule, len(parts))
        self._state = self._prefilled = None
        memory.caches.assign([policy.kv_on_gpu(j) for j in range(len(batch.micro_batches))])
        self._count_kv(batch, policy)
        state = self._state = BatchState(batch, arch, self._stops, lambda ended: sink.put(_completion(ended)))
        self._num_chunks = len(parts)
        self.live.begin(prefill, decode, state)
        self.live.enter(Phase.PREFILL)
        prefilled = self._prefilled = self.engine.run(
            iter_tasks(prefill, policy.schedule),
            PrefillHandlers.make(self.backend, arch, policy, prefill, memory, state, self._group, parts),
            batch=index,
            kept_steps=self._budget.prefill_steps,
            finished=sink.stops,
        )
        decoded = None
        if state.num_active:
            state.start_decode()
            self.live.enter(Phase.DECODE, prefilled)
            decoded = self.engine.run(
                iter_tasks(decode, policy.schedule),
                DecodeHandlers.make(self.backend, arch, policy, decode, memory, state, self._group),
                batch=index,
                kept_steps=self._budget.steps(decode, policy.schedule, len(prefilled.spans)),
                finished=lambda: sink.stops() or state.num_active == 0,
            )
        completions = tuple(_completion(s) for members in state.sequences for s in members)
        return BatchResult(completions, prefilled, decoded, batch.micro_batch_sizes, len(parts), state.routed)

    def rescue(self) -> BatchResult | None:
        """What `generate` did until it raised."""
        state, prefilled = self._state, self._prefilled
        if state is None:
            return None
        completions = tuple(
            _completion(s) for members in state.sequences for s in members if s.finish_reason is not None
        )
        sizes = tuple(len(members) for members in state.sequences)
        last = self.engine.result()
        if prefilled is None:
            return BatchResult(completions, last, None, sizes, self._num_chunks, state.routed)
        return BatchResult(completions, prefilled, last, sizes, self._num_chunks, state.routed)

    @property
    def peak_bytes(self) -> dict[str, dict[Purpose, int]]:
        """Bytes ever in use by level and purpose."""
        memory = self.memory
        gpu = dict(self.plan.gpu.purposes)
        gpu[Purpose.WORKSPACE] = memory.workspace.high_water_bytes
        gpu[Purpose.LOGITS] = min(gpu[Purpose.LOGITS], memory.sampling_workspace.high_water_bytes)
        allocated = self.backend.peak_gpu_bytes()
        if allocated is not None:  # arenas are as planned, the rest are torch's temporaries
            planned = self.plan.gpu.purposes
            rest = allocated - sum(planned.values()) + planned[Purpose.WORKSPACE] + planned[Purpose.LOGITS]
            gpu[Purpose.WORKSPACE] = max(0, min(rest, planned[Purpose.WORKSPACE]))
            gpu[Purpose.LOGITS] = max(0, rest - gpu[Purpose.WORKSPACE])
        cpu = dict(self.plan.cpu.purposes)
        if self.plan.gpu is not self.plan.cpu and self.plan.gpu.name != self.plan.cpu.name:
            for level, purposes in (("gpu", gpu), ("cpu", cpu)):
                if Purpose.KV_CACHE in purposes:
                    purposes[Purpose.KV_CACHE] = self._kv_peak[level]
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

    def _count_kv(self, batch: Batch, policy: Policy) -> None:
        token_bytes = self.arch.spec.kv_bytes_per_token(policy.formats)
        used = {"gpu": 0, "cpu": 0}
        for j, micro_batch in enumerate(batch.micro_batches):
            level = "gpu" if policy.kv_on_gpu(j) else "cpu"
            used[level] += micro_batch.kv_tokens * token_bytes
        self._kv_peak = {level: max(self._kv_peak[level], used[level]) for level in used}


@final
class NullGenerator(AbstractGenerator):
    """Runs the same graphs with tasks that sleep for `seconds_of(pipeline)`; generates zeros."""

    def __init__(
        self,
        backend: AbstractBackend,
        arch: Architecture,
        planned: Planned,
        seconds_of: Callable[[Pipeline, Batch], Callable[[TaskId], float]],
        max_spans: int = MAX_SPANS,
    ) -> None:
        super().__init__(backend, arch, planned, max_spans)
        self.load_s = 0.0
        self._waits = backend.waits or Waits()
        self._seconds_of = seconds_of

    @property
    def peak_bytes(self) -> dict[str, dict[Purpose, int]]:
        """Nothing: no memory is used."""
        return {}

    def rescue(self) -> None:
        """Nothing: what a batch that was cut short has generated are no tokens of a model."""

    def generate(
        self, batch: Batch, *, index: int = 0, sink: Sink | None = None, schedule: ScheduleName | None = None
    ) -> BatchResult:
        """Sleep through both phases of a batch."""
        sink = sink or Nowhere()
        num_chunks = len(chunks(batch, self.policy.prefill_chunk_tokens))
        policy, prefill, decode = self._planned(batch, schedule, num_chunks)

        def run(pipeline: Pipeline, kept_steps: int) -> PhaseResult:
            return self.engine.run(
                iter_tasks(pipeline, policy.schedule),
                null_handlers(self._seconds_of(pipeline, batch), self._waits.sleep),
                batch=index,
                kept_steps=kept_steps,
            )

        self.live.begin(prefill, decode)
        self.live.enter(Phase.PREFILL)
        prefilled = run(prefill, self._budget.prefill_steps)
        decoded = None
        if batch.num_steps:
            self.live.enter(Phase.DECODE, prefilled)
            decoded = run(decode, self._budget.steps(decode, policy.schedule, len(prefilled.spans)))
        completions = tuple(Completion(request, (0,) * request.params.max_tokens, LENGTH) for request in batch.requests)
        for completion in completions:
            sink.put(completion)
        return BatchResult(completions, prefilled, decoded, batch.micro_batch_sizes, num_chunks)


def _completion(ended: Generated) -> Completion:
    return Completion(
        ended.placed.request, tuple(ended.tokens), ended.finish_reason or LENGTH, ended.error, tuple(ended.logprobs)
    )
