"""Runs without a model: the graphs alone, with tasks that sleep."""

from collections.abc import Callable
from typing import final

from executor.backends import AbstractBackend
from executor.backends.null import null_handlers
from executor.batching import Batch, Completion, Nowhere, Sink, chunks
from executor.engine import PhaseResult
from executor.generate import AbstractGenerator, BatchResult, Planned
from executor.handlers import LENGTH
from executor.model import Architecture
from executor.trace_budget import MAX_SPANS
from hrm.buffers import Purpose
from hrm.contract.pacing import Waits
from hrm.policy import ScheduleName
from hrm.schedules import Pipeline, decode_pipeline, iter_tasks, prefill_pipeline
from hrm.tasks import Phase, TaskId


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
        policy = self._policy_of(batch, schedule)
        prefill = prefill_pipeline(self.arch.spec, policy, num_chunks=num_chunks)
        decode = decode_pipeline(self.arch.spec, policy, num_steps=max(batch.num_steps, 1))

        def run(pipeline: Pipeline, kept_steps: int) -> PhaseResult:
            return self.engine.run(
                iter_tasks(pipeline, policy.schedule),
                null_handlers(self._seconds_of(pipeline, batch), self._waits.sleep),
                batch=index,
                kept_steps=kept_steps,
            )

        self.live.begin([prefill], decode)
        self.live.enter(Phase.PREFILL)
        prefilled = run(prefill, self._budget.prefill_steps)
        decoded = None
        if batch.num_steps:
            self.live.enter(Phase.DECODE, prefilled)
            decoded = run(decode, self._budget.steps(decode, policy.schedule, len(prefilled.spans)))
        completions = tuple(Completion(request, (0,) * request.params.max_tokens, LENGTH) for request in batch.requests)
        for completion in completions:
            sink.put(completion)
        return BatchResult(completions, prefilled, decoded, (batch.micro_batch_sizes,), num_chunks)
