"""The work of a job's phases in closed form: seconds of every lane and of the host's memory."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from hrm.closed_form import DecodeStep, Point, sampled_contexts, whole_prefill
from hrm.contention import UNSHARED, Contention
from hrm.costs import Costs
from hrm.lane_work import PhaseSeconds
from hrm.policy import Policy
from hrm.tasks import Lane, Phase
from hrm.workload import Workload

HOST_MEMORY: Final = "host memory"
CORES: Final = "cores"
_NEARLY: Final = 1 - 1e-9  # sums of the same seconds in another order


class Turn(NamedTuple):
    """A policy over one batch, and how many times as long as it the job takes for such batches."""

    policy: Policy
    times: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseWork:
    """Seconds of work in each lane, and what follows for the phase.

    `host_memory_s` is what the host's memory needs to serve all of them, `cores_s` what those take that share
    cores, and `all_reduce_s` the part of the GPUs' time in which they exchange sums. `bound_s` is the longest
    of them all, and `in_order_s` what the schedule's order leaves at least: more where lanes work in turn.
    Where tasks want more of the host's memory or cores together than there is, which is their `contention`, they take
    longer, and the phase `stretched_s` at least; `contends` says whether any does.
    """

    bound_s: float = 0.0
    in_order_s: float = 0.0
    stretched_s: float = 0.0
    lane_s: dict[Lane, float]
    host_memory_s: float = 0.0
    cores_s: float = 0.0
    all_reduce_s: float = 0.0
    contention: Contention = UNSHARED
    contends: bool = False

    @staticmethod
    def of(seconds: PhaseSeconds, *, in_order_s: float) -> "PhaseWork":
        """The work in its seconds in closed form."""
        contention = seconds.contention
        stretch, stretched_s = contention.settled(seconds.stretched_s, contention.least_s)
        return PhaseWork(
            bound_s=contention.least_s,
            in_order_s=in_order_s,
            stretched_s=stretched_s,
            lane_s={lane: float(of_lane) for lane, of_lane in seconds.lanes.items()},
            host_memory_s=float(seconds.host_memory_s),
            cores_s=float(sum(seconds.shared_cores)),
            all_reduce_s=float(sum(of_act for act, of_act in seconds.acts.items() if act.reduces)),
            contention=contention,
            contends=any(
                stretch.at_memory * float(at_memory_s) * _NEARLY > float(seconds.acts[act])
                for act, at_memory_s in seconds.at_memory.items()
            ),
        )

    def least_s(self, *, exact: bool) -> float:
        """What the phase takes at least, simulated; if these seconds are not `exact`, tasks may take less in all."""
        return max(self.bound_s, _NEARLY * self.stretched_s) if exact else self.bound_s

    @property
    def busy_s(self) -> dict[str, float]:
        """Seconds of all that may be the longest: every lane, and the memory and cores that they share."""
        lanes = {lane.value: seconds for lane, seconds in self.lane_s.items()}
        return {**lanes, HOST_MEMORY: self.host_memory_s, CORES: self.cores_s}

    @property
    def longest(self) -> str:
        """Which of `busy_s` has the most; a lane, where the host's memory has no more."""
        busy_s = self.busy_s
        return max(busy_s, key=lambda name: busy_s[name])

    @staticmethod
    def total(parts: Iterable[tuple[float, "PhaseWork"]]) -> "PhaseWork":
        """Works one after the other, each repeated so many times."""
        known = list(parts)
        return PhaseWork(
            bound_s=sum(count * work.bound_s for count, work in known),
            in_order_s=sum(count * work.in_order_s for count, work in known),
            stretched_s=sum(count * work.stretched_s for count, work in known),
            lane_s={lane: sum(count * work.lane_s[lane] for count, work in known) for lane in Lane},
            host_memory_s=sum(count * work.host_memory_s for count, work in known),
            cores_s=sum(count * work.cores_s for count, work in known),
            all_reduce_s=sum(count * work.all_reduce_s for count, work in known),
            contends=any(work.contends for _, work in known),
        )


def prefill_phase(costs: Costs, policy: Policy, workload: Workload) -> PhaseWork:
    """The work of the prefill of one batch."""
    point = Point.of_policy(policy, costs.spec)
    seconds = whole_prefill(costs, point, workload)
    return PhaseWork.of(seconds, in_order_s=float(max(*seconds.terms, *seconds.shared_cores)))


def step_work(costs: Costs, policy: Policy, context: float, *, active_share: float) -> PhaseWork:
    """The work of a decode step at a mean context, in which that share of the requests is still generating."""
    step = DecodeStep.of_point(costs, Point.of_policy(policy, costs.spec), policy.schedule, active_share)
    return _of_step(step, context)


def _of_step(step: DecodeStep, context: float) -> PhaseWork:
    seconds = step.seconds(context)
    return PhaseWork.of(seconds, in_order_s=float(max(step.in_order(seconds))))


class StepsAlike(NamedTuple):
    """The work of one decode step at a mean context, which stands for so many steps."""

    context: float
    steps: float
    work: PhaseWork


def decode_steps(costs: Costs, policy: Policy, workload: Workload) -> list[StepsAlike]:
    """The work of the decode steps of one batch."""
    if not workload.decode_steps:
        return []
    point = Point.of_policy(policy, costs.spec)
    step = DecodeStep.of_point(costs, point, policy.schedule, workload.active_share)
    contexts = sampled_contexts(costs.spec, workload)
    return [StepsAlike(context, steps, _of_step(step, context)) for context, steps in contexts.items()]


def phase_work(phase: Phase, costs: Costs, turns: Sequence[Turn], workload: Workload) -> PhaseWork:
    """The work of a phase in all batches of a job."""
    if phase is Phase.PREFILL:
        return PhaseWork.total((count, prefill_phase(costs, policy, workload)) for policy, count in turns)
    return PhaseWork.total(
        (count * steps, work) for policy, count in turns for _, steps, work in decode_steps(costs, policy, workload)
    )


def job_work(costs: Costs, turns: Sequence[Turn], workload: Workload) -> tuple[PhaseWork, PhaseWork]:
    """The work of both phases."""
    prefill, decode = (phase_work(phase, costs, turns, workload) for phase in (Phase.PREFILL, Phase.DECODE))
    return prefill, decode
