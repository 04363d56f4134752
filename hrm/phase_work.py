"""The work of a job's phases in closed form: seconds of every lane and of the host's memory."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from hrm.closed_form import DecodeStep, Point, sampled_contexts, whole_prefill
from hrm.costs import ALONE, Costs, Stretch
from hrm.lane_work import PhaseSeconds, contended_s
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
    Tasks take longer by the `stretch`, where together they want more of the host's memory or cores than there is, and
    the phase with them `stretched_s` at least.
    """

    bound_s: float = 0.0
    in_order_s: float = 0.0
    stretched_s: float = 0.0
    lane_s: dict[Lane, float]
    host_memory_s: float = 0.0
    cores_s: float = 0.0
    all_reduce_s: float = 0.0
    stretch: Stretch = ALONE

    @staticmethod
    def of(seconds: PhaseSeconds, *, in_order_s: float) -> "PhaseWork":
        """The work in its seconds in closed form."""
        lanes, host_memory_s, stretch = seconds.lanes, seconds.host_memory_s, seconds.stretch
        return PhaseWork(
            bound_s=float(max(*lanes.values(), host_memory_s, *seconds.shared_cores)),
            in_order_s=in_order_s,
            stretched_s=seconds.stretched_s(stretch),
            lane_s={lane: float(of_lane) for lane, of_lane in lanes.items()},
            host_memory_s=float(host_memory_s),
            cores_s=float(sum(seconds.shared_cores)),
            all_reduce_s=float(sum(of_act for act, of_act in seconds.acts.items() if act.reduces)),
            stretch=stretch,
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
    def contends(self) -> bool:
        """Whether lanes want the host's memory at once: it takes longer for all of them than for any."""
        return contended_s(self.lane_s, self.host_memory_s) > 0

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
        )


def prefill_phase(costs: Costs, policy: Policy, workload: Workload) -> PhaseWork:
    """The work of the prefill of one batch."""
    point = Point.of_policy(policy, costs.spec)
    seconds = whole_prefill(costs, point, workload)
    return PhaseWork.of(seconds, in_order_s=float(max(*seconds.terms, *seconds.shared_cores)))


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
    found: list[StepsAlike] = []
    for context, steps in sampled_contexts(costs.spec, workload).items():
        seconds = step.seconds(context)
        work = PhaseWork.of(seconds, in_order_s=float(max(step.in_order(seconds))))
        found.append(StepsAlike(context, steps, work))
    return found


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
