"""A job on a fleet under way: workers are fed, watched and replaced, and what they tell is put down."""

import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from types import ModuleType
from typing import Any, Final, final

from executor.batching import Completion, Request
from executor.errors import RunError
from executor.handlers import ERROR
from executor.job.options import JobOptions
from executor.job.progress import JobProgress
from executor.job.report import Ending, versions
from executor.job.run import TRACE_JSON
from executor.job.trace_file import TraceFile
from executor.job.writer import OutputWriter
from executor.ray.assignment import MOST_DEATHS, Assignment
from executor.ray.cluster import ray_at
from executor.ray.members import Member, Members
from executor.ray.options import LOCAL_WORKERS, FleetOptions
from executor.ray.plans import Plan
from executor.ray.worker import Ended, Ready, Refused, WorkerReport
from executor.trace_budget import MAX_SPANS
from hrm.run_record import FleetRecord
from hrm.units import counted

_LOOK_S: Final = 1.0
_WAIT_S: Final = 0.5  # for any worker to have something, so that Ctrl-C is noticed
_FINISH_S: Final = 15.0  # for all workers to end and tell what they did
MOST_LOST: Final = 3  # workers one after the other that died before they were ready
MOST_IN_VAIN: Final = 8  # deaths, besides one a worker, with no answer in between: it is no one request
_RANKS: Final = 1000  # numbers of processes in the trace that a worker has


@final
class FleetWork:
    """The workers of one run; `_asked` is what each is at work on, by Ray's reference."""

    def __init__(self, options: JobOptions, fleet: FleetOptions, plans: Sequence[Plan]) -> None:
        self._options, self._fleet, self._plans = options, fleet, plans
        self._started, self._start_s = datetime.now(UTC), time.time()
        self._first_s: float | None = None  # when a request was sent
        self._last_s: float | None = None  # and when an answer came
        self._asked: dict[Any, Member] = {}
        self._idle: list[Member] = []
        self._members: list[Member] = []
        self._given_up: list[str] = []
        self._refusals: list[str] = []
        self._answered = self._failed = self._tokens = 0
        self._lost_in_a_row = self._in_vain = 0

    def answer(self, requests: Iterator[Request], writer: OutputWriter, progress: JobProgress) -> None:
        """Have every request answered, or given up."""
        self._assignment, self._writer, self._progress = Assignment(requests), writer, progress
        folder = self._options.output_dir
        self._trace = TraceFile(folder / f"{TRACE_JSON}.partial", progress.tell)
        progress.stage = "starting Ray"
        try:
            with ray_at(self._fleet.address, self._fleet.workers or LOCAL_WORKERS) as ray:
                self._answer(ray)
        finally:
            self._trace.end(folder / TRACE_JSON)

    def record(self, ending: Ending) -> FleetRecord:
        """What run.json holds of it."""
        first_s, last_s = self._first_s, self._last_s
        seconds = 0.0 if first_s is None or last_s is None else last_s - first_s
        return FleetRecord(
            outcome=ending.outcome,
            message=ending.message,
            started=self._started.isoformat(timespec="seconds"),
            ended=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=seconds,
            requests=self._answered,
            failed_requests=self._failed,
            generated_tokens=self._tokens,
            tokens_per_s=self._tokens / seconds if seconds > 0 else 0.0,
            given_up=self._given_up,
            workers=[member.record(member.ready) for member in self._members if member.ready is not None],
            versions=versions(),
        )

    def _answer(self, ray: ModuleType) -> None:
        self._ray = ray
        count = self._fleet.count(sum(node["Alive"] for node in ray.nodes()))
        self._start = self._members_of(ray, count).start
        self._progress.stage = f"loading weights into {counted(count, 'worker')}"
        for _ in range(count):
            self._ask_to_load()
        while self._asked and not self._is_served:
            found, _ = ray.wait(list(self._asked), num_returns=1, timeout=_WAIT_S)
            self._writer.stops()
            for reference in found:
                self._hear(reference)
            self._idle = [member for member in self._idle if not self._feed(member)]
        for request in self._assignment.rest():
            self._give_up(request, "no worker of the fleet has room for it")
        self._finish()

    def _members_of(self, ray: ModuleType, count: int) -> Members:
        options = self._options
        engine = {
            "max_spans": MAX_SPANS // count,
            "model": self._fleet.model or str(options.model.absolute()),
            "policy": self._plans,
            "accelerator": options.accelerator,
            "schedule": options.schedule,
            "seed": options.seed,
            "sampling_defaults": options.sampling_defaults,
            "own_plan": self._fleet.own_plans,
        }
        return Members(ray, count, self._plans, options.accelerator.name, engine, self._members)

    @property
    def _is_served(self) -> bool:
        """Whether all was answered: workers that are still to come have nothing to do."""
        return self._assignment.is_empty and not any(member.share for member in self._asked.values())

    def _ask_to_load(self) -> None:
        member = self._start()
        self._asked[member.actor.load.remote()] = member

    def _look(self, member: Member) -> None:
        self._asked[member.actor.look.remote(_LOOK_S)] = member

    def _hear(self, reference: Any) -> None:
        """Take what a worker tells."""
        member = self._asked.pop(reference)
        try:
            told = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            self._lost(member, str(error))
            return
        match told:
            case Refused():
                self._refused(member, told)
            case Ready():
                member.ready, self._lost_in_a_row = told, 0
                self._tell_refusals()
                self._progress.tell(f"{member.name} runs {told.plan}")
                self._idle.append(member)
            case Ended():
                self._ended(member, told)

    def _refused(self, member: Member, told: Refused) -> None:
        """Do without a worker that cannot run the job; RunError if there is no other."""
        member.alive = False
        if not self._asked and not self._idle:
            raise RunError("--ray", f"<a worker on {told.node}>", f"cannot run this job: {told.message}", "correct it")
        self._ray.kill(member.actor)
        self._refusals.append(
            f"worker {member.number} on {told.node} is left out, as it cannot run this: {told.message}"
        )
        if any(other.alive and other.ready for other in self._members):
            self._tell_refusals()

    def _tell_refusals(self) -> None:
        """Tell of workers that are left out, once there is one that is not: if none is, that is one error."""
        for refusal in self._refusals:
            self._progress.tell(refusal)
        self._refusals.clear()

    def _ended(self, member: Member, told: Ended) -> None:
        for completion in told.completions:
            self._put(member, completion)
        if told.report is not None:
            self._take(member, told.report)
        if told.error is not None:
            self._ray.kill(member.actor)
            self._lost(member, told.error)
        elif told.is_last:
            member.share = None
            self._idle.append(member)
        else:
            self._look(member)

    def _put(self, member: Member, completion: Completion) -> None:
        if member.share is None or not member.share.done(completion.request.name):
            return
        self._writer.put(completion)
        self._progress.end_elsewhere(completion)
        self._in_vain, self._last_s = 0, time.time()
        if completion.error is not None:
            self._failed += 1
            return
        member.requests += 1
        member.generated_tokens += len(completion.tokens)
        self._answered += 1
        self._tokens += len(completion.tokens)

    def _take(self, member: Member, report: WorkerReport) -> None:
        """Put down what a worker tells of itself."""
        member.run = report.record
        for rank, plain in report.spans.items():
            spans = [span.later(report.origin_s - self._start_s) for span in plain]
            process = f"{member.name}, rank {rank}" if rank or report.record.ranks else member.name
            self._trace.add(spans, rank=_RANKS * member.number + rank, process=process)

    def _feed(self, member: Member) -> bool:
        """Give an idle worker requests; False if there are none for it now."""
        assert member.ready is not None
        share = self._assignment.next(member.ready.batch_size, member.ready.has_room)
        if share is None:
            return False
        self._progress.stage = f"running on {counted(sum(one.alive for one in self._members), 'worker')}"
        if self._first_s is None:
            self._first_s = time.time()
        self._progress.elsewhere = True
        member.share = share
        member.actor.begin.remote(list(share.left.values()))
        self._look(member)
        return True

    def _lost(self, member: Member, why: str) -> None:
        """Take back what a worker had, and start another."""
        reason = why.strip().splitlines()[0]
        member.alive = False
        if member.ready is None:
            self._lost_in_a_row += 1
            if self._lost_in_a_row >= MOST_LOST:
                rule = f"died before it was ready, as {MOST_LOST} did one after the other: {reason}"
                raise RunError("--ray", "<a worker>", rule, "run the job without --ray to see why")
        elif member.share is not None and member.share.left:
            self._in_vain += 1
            if self._in_vain > MOST_IN_VAIN + len(self._asked):
                rule = f"died {self._in_vain} times with no answer in between: {reason}"
                raise RunError("--ray", "<a worker>", rule, "run the job without --ray to see why, then --resume")
            given_up = self._assignment.lost(member.share)
            self._progress.tell(f"{member.name} died, and another takes its place: {reason}")
            if given_up is not None:
                self._give_up(given_up, f"{MOST_DEATHS} engines died with it, the last one of it alone: {reason}")
        member.share = None
        self._ask_to_load()

    def _give_up(self, request: Request, why: str) -> None:
        self._given_up.append(request.name)
        self._failed += 1
        completion = Completion(request, (), ERROR, f"left out: {why}")
        self._writer.put(completion)
        self._progress.end_elsewhere(completion)

    def _finish(self) -> None:
        """Have workers end, and tell all that they did; what one does not tell in time is left as it is known."""
        self._progress.stage = "ending"
        asked = {member.actor.finish.remote(): member for member in self._members if member.alive and member.run}
        found, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=_FINISH_S) if asked else ([], [])
        for reference in found:
            try:
                self._take(asked[reference], self._ray.get(reference))
            except self._ray.exceptions.RayError:
                continue
