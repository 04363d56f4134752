"""The actor: holds one engine, runs its share in a thread, and hands over what has ended."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, final

from executor.batching import Completion, Request
from executor.guard import in_a_line
from executor.trace_budget import MAX_SPANS
from hrm.errors import HrmError
from hrm.run_record import RunRecord

if TYPE_CHECKING:
    from executor.generate import BatchResult
    from executor.job.rank import PlainSpan, RankReport
    from hrm.trace import Span


@dataclass(frozen=True, slots=True)
class Ready:
    """An engine that is loaded: its node and plan, requests that run together, and how long one may be."""

    node: str
    policy: str  # the file
    plan: str  # in a line
    batch_size: int
    max_prompt_tokens: int
    max_kv_tokens: int

    def has_room(self, request: Request) -> bool:
        """Whether the engine can run a request that some policy of the job can."""
        return len(request.prompt) <= self.max_prompt_tokens and request.kv_tokens <= self.max_kv_tokens


@dataclass(frozen=True, slots=True)
class Refused:
    """Why there is no engine: a mistake of the user's, which another try would meet again."""

    node: str
    message: str


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker did until now, and spans by rank that were not told before.

    They are in seconds since `origin_s`, which is since 1970 by the clock of the worker's node.
    """

    record: RunRecord
    spans: "dict[int, list[PlainSpan]]"
    origin_s: float


@dataclass(frozen=True, slots=True)
class Ended:
    """Completions since the last look; `is_last` if the share is at its end, with what broke it, if anything."""

    completions: list[Completion]
    is_last: bool
    error: str | None = None
    report: WorkerReport | None = None


@final
class _Outlet:
    """The sink of an engine in a worker: a queue."""

    def __init__(self, queue: "SimpleQueue[Completion | Ended]") -> None:
        self._queue = queue

    def put(self, completion: Completion, /) -> None:
        self._queue.put(completion)

    def stops(self) -> bool:
        return False


@final
class Worker:
    """One engine in an actor's process, in a thread of its own: other ranks end with the thread that started them."""

    def __init__(self, max_spans: int = MAX_SPANS, **engine: Any) -> None:
        self._given, self._max_spans = engine, max_spans
        self._queue: SimpleQueue[Completion | Ended] = SimpleQueue()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    def load(self) -> Ready | Refused:
        """Load the engine; what is not a mistake of the user's is raised."""
        return self._thread.submit(self._load).result()

    def begin(self, requests: Sequence[Request]) -> None:
        """Begin to answer requests."""
        self._thread.submit(self._run, requests)

    def look(self, at_most_s: float) -> Ended:
        """What has ended since the last look; waits so long for the first."""
        found: list[Completion] = []
        try:
            item = self._queue.get(timeout=at_most_s)
            while not isinstance(item, Ended):
                found.append(item)
                item = self._queue.get_nowait()
        except Empty:
            return Ended(found, is_last=False)
        return Ended(found, is_last=True, error=item.error, report=item.report)

    def finish(self) -> WorkerReport:
        """End the engine, and tell all that it did."""
        return self._thread.submit(self._finish).result()

    def _load(self) -> Ready | Refused:
        from executor.job.report import Totals
        from executor.ray.engine import Engine

        node = os.uname().nodename
        try:
            self._engine = engine = Engine(**self._given)
        except HrmError as error:
            return Refused(node, str(error))
        self._started, self._totals = datetime.now(UTC), Totals()
        self._spans: list[Span] = []
        policy = engine.model.policy
        return Ready(
            node,
            engine.plan.path,
            engine.plan.text(policy),
            policy.batch_size * engine.generator.num_stages,
            policy.max_prompt_tokens(engine.model.arch.spec),
            policy.kv_tokens_per_micro_batch,
        )

    def _run(self, requests: Sequence[Request]) -> None:
        error, report = None, None
        try:
            self._engine.run(requests, _Outlet(self._queue), self._add)
            report = self._report()
        except BaseException as raised:  # noqa: BLE001 - told to who looks
            error = in_a_line(raised)
        self._queue.put(Ended([], is_last=True, error=error, report=report))

    def _add(self, result: "BatchResult") -> None:
        self._totals.add(result)
        for phase in (result.prefill, result.decode):
            if phase is not None and self._max_spans > 0:
                self._spans += phase.spans
                self._max_spans -= len(phase.spans)

    def _finish(self) -> WorkerReport:
        ranks = self._engine.finish()
        report = self._report(ranks)
        self._engine.close()
        return report

    def _report(self, ranks: "Sequence[RankReport]" = ()) -> WorkerReport:
        """What was done so far; the spans that were not told before, and those of other ranks at their end."""
        from executor.job.rank import PlainSpan

        engine = self._engine.generator.engine
        spans = {0: self._spans, **{rank.record.rank: rank.spans_since(engine.origin_s) for rank in ranks}}
        self._spans = []
        return WorkerReport(
            self._engine.record(self._totals, self._started),
            {rank: [PlainSpan.of(span) for span in own] for rank, own in spans.items()},
            time.time() - time.perf_counter() + engine.origin_s,
        )
