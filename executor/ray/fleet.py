"""`executor run --ray`: workers are started, fed, watched and replaced; answers go to the run directory."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Final, final

from executor.batching import Completion, Request
from executor.errors import RunError
from executor.handlers import ERROR
from executor.job.outputs import OUTPUTS
from executor.job.progress import JobProgress
from executor.job.run import JobOptions, run_job
from executor.job.writer import OutputWriter
from executor.ray.assignment import MOST_DEATHS, Assignment, Share
from executor.ray.cluster import LOCAL, ray_at
from executor.ray.worker import Ended, Ready, Refused, Worker
from hrm.units import counted

LOCAL_WORKERS: Final = 2  # that are started on this machine, if it is not said how many
_LOOK_S: Final = 1.0
_WAIT_S: Final = 0.5  # for any worker to have something, so that Ctrl-C is noticed
MOST_LOST: Final = 3  # workers one after the other that died before they were ready
MOST_IN_VAIN: Final = 8  # deaths, besides one a worker, with no answer in between: it is no one request


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetOptions:
    """Where the workers are, and how many: by default 2 on this machine, or one on every node."""

    address: str = LOCAL
    workers: int | None = None
    model: str = ""  # its name on the Hub, revision included: each node fetches it; else the folder is

    @property
    def is_local(self) -> bool:
        """Whether Ray is started for this run, on this machine."""
        return self.address == LOCAL


@dataclass(slots=True)
class FleetSummary:
    """What a fleet did."""

    workers: int = 0
    replaced: int = 0
    answered: int = 0
    generated_tokens: int = 0
    given_up: list[str] = field(default_factory=list[str])

    def text(self, output_dir: Path) -> str | None:
        """The same in a few lines; None if there was nothing to do."""
        if not self.workers:
            return None
        left_out = f", left out: {', '.join(self.given_up)}" if self.given_up else ""
        return (
            f"workers      {self.workers}{f', {self.replaced} replaced' if self.replaced else ''}\n"
            f"requests     {self.answered} answered{left_out}\n"
            f"tokens       {self.generated_tokens} generated\n"
            f"wrote        {output_dir / OUTPUTS}"
        )


def run_fleet(options: JobOptions, fleet: FleetOptions, progress: JobProgress | None = None) -> FleetSummary:
    """Run a job on many workers; answers, resuming and mistakes are as those of `run_job`.

    Raises RunError if Ray cannot be had, or workers die again and again before they are ready.
    """
    summary = FleetSummary()

    def answer(requests: Iterator[Request], writer: OutputWriter, progress: JobProgress) -> None:
        progress.stage = "starting Ray"
        with ray_at(fleet.address, fleet.workers or LOCAL_WORKERS) as ray:
            _Fleet(ray, options, fleet, summary, progress).answer(Assignment(requests), writer)

    run_job(options, progress, answer)
    return summary


@final
@dataclass(slots=True, eq=False)
class _Member:
    """A worker, what it was last asked, and the requests that it has."""

    actor: Any
    ready: Ready | None = None
    share: Share | None = None


@final
class _Fleet:
    """The workers of one run; `_asked` is what each is at work on, by Ray's reference."""

    def __init__(
        self, ray: ModuleType, options: JobOptions, fleet: FleetOptions, summary: FleetSummary, progress: JobProgress
    ) -> None:
        self._ray, self._summary, self._progress = ray, summary, progress
        nodes = [node for node in ray.nodes() if node["Alive"]]
        self._count = fleet.workers or (LOCAL_WORKERS if fleet.is_local else len(nodes))
        cpus = ray.cluster_resources().get("CPU", 1.0)
        emulated = options.accelerator.name in {"cpu", "emulated", "null"}
        self._actor_class = ray.remote(
            num_cpus=max(int(cpus // self._count), 1),  # Ray gives the actor's threads so many
            num_gpus=0 if emulated or not ray.cluster_resources().get("GPU") else 1,
            max_restarts=0,
            max_concurrency=2,
            scheduling_strategy="SPREAD",
        )(Worker)
        self._engine: dict[str, Any] = {
            "model": fleet.model or str(options.model.absolute()),
            "policy": str(options.policy.absolute()),
            "accelerator": options.accelerator,
            "schedule": options.schedule,
            "seed": options.seed,
            "sampling_defaults": options.sampling_defaults,
        }
        self._asked: dict[Any, _Member] = {}
        self._lost_in_a_row = self._in_vain = 0

    def answer(self, assignment: Assignment, writer: OutputWriter) -> None:
        """Have every request answered, or given up."""
        self._assignment, self._writer = assignment, writer
        self._summary.workers = self._count
        self._progress.stage = f"loading weights into {counted(self._count, 'worker')}"
        idle: list[_Member] = []
        for _ in range(self._count):
            self._start()
        while self._asked:
            found, _ = self._ray.wait(list(self._asked), num_returns=1, timeout=_WAIT_S)
            writer.stops()
            for reference in found:
                member = self._asked.pop(reference)
                try:
                    is_idle = self._heard(member, self._ray.get(reference))
                except self._ray.exceptions.RayError as error:
                    is_idle = self._lost(member, str(error))
                if is_idle:
                    idle.append(member)
            idle = [member for member in idle if not self._feed(member)]

    def _start(self) -> None:
        member = _Member(self._actor_class.remote(**self._engine))
        self._asked[member.actor.load.remote()] = member

    def _heard(self, member: _Member, told: Ready | Refused | Ended) -> bool:
        """Take what a worker tells; whether it has nothing to do now."""
        match told:
            case Refused():
                raise RunError("--ray", "<a worker>", f"cannot run this job: {told.message}", "correct it")
            case Ready():
                member.ready, self._lost_in_a_row = told, 0
                return True
            case Ended():
                for completion in told.completions:
                    self._ended(member, completion)
                if told.error is not None:
                    self._ray.kill(member.actor)
                    return self._lost(member, told.error)
                if told.is_last:
                    member.share = None
                    return True
                self._look(member)
                return False

    def _look(self, member: _Member) -> None:
        self._asked[member.actor.look.remote(_LOOK_S)] = member

    def _ended(self, member: _Member, completion: Completion) -> None:
        if member.share is None or not member.share.done(completion.request.name):
            return
        self._writer.put(completion)
        self._progress.ended_requests += 1
        self._in_vain = 0
        if completion.error is None:
            self._summary.answered += 1
            self._summary.generated_tokens += len(completion.tokens)

    def _feed(self, member: _Member) -> bool:
        """Give an idle worker requests; False if there are none now."""
        assert member.ready is not None
        share = self._assignment.next(member.ready.batch_size)
        if share is None:
            return False
        self._progress.stage = f"running on {counted(self._count, 'worker')}"
        member.share = share
        member.actor.begin.remote(list(share.left.values()))
        self._look(member)
        return True

    def _lost(self, member: _Member, why: str) -> bool:
        """Take back what a worker had, and start another; it is not idle."""
        reason = why.strip().splitlines()[0]
        if member.ready is None:
            self._lost_in_a_row += 1
            if self._lost_in_a_row >= MOST_LOST:
                rule = f"died before it was ready, as {MOST_LOST} did one after the other: {reason}"
                raise RunError("--ray", "<a worker>", rule, "run the job without --ray to see why")
        elif member.share is not None and member.share.left:
            self._in_vain += 1
            if self._in_vain > MOST_IN_VAIN + self._count:
                rule = f"died {self._in_vain} times with no answer in between: {reason}"
                raise RunError("--ray", "<a worker>", rule, "run the job without --ray to see why, then --resume")
            given_up = self._assignment.lost(member.share)
            self._progress.tell(f"a worker on {member.ready.node} died, and another takes its place: {reason}")
            if given_up is not None:
                self._summary.given_up.append(given_up.name)
                told = f"left out: {MOST_DEATHS} engines died with it, the last one of it alone: {reason}"
                self._writer.put(Completion(given_up, (), ERROR, told))
                self._progress.ended_requests += 1
        self._summary.replaced += 1
        self._start()
        return False
