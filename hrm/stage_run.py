"""What the phases of a job take on a stage: at least, by their closed form, and when they are simulated."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hrm.costs import Costs, Runtime
from hrm.parallel import Share
from hrm.phase_work import PhaseWork, StepsAlike, Turn, decode_steps, prefill_phase
from hrm.phases import prefill_seconds, steps_seconds
from hrm.policy import Policy
from hrm.tasks import Device, Lane, Phase
from hrm.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseEstimate:
    """One phase of the whole job: simulated seconds, and its work in closed form."""

    seconds: float
    work: PhaseWork

    @property
    def bound_s(self) -> float:
        """Seconds if all lanes overlapped perfectly."""
        return self.work.bound_s

    @property
    def lane_s(self) -> dict[Lane, float]:
        """Seconds of work in each lane."""
        return self.work.lane_s


class StageRun:
    """What a stage takes for the phases of its turns: at least, until they are simulated."""

    def __init__(self, share: Share, turns: tuple[Turn, ...], workload: Workload, runtime: Runtime) -> None:
        self.turns, self.workload = turns, workload
        self.costs = costs = Costs(share.part.spec, share.part.profile, share.policy.formats, runtime)
        self.prefill_works = [prefill_phase(costs, turn.policy, workload) for turn in turns]
        self.steps = [decode_steps(costs, turn.policy, workload) for turn in turns]
        # Of the CPU's experts the closed form knows means over layers, which may seem to take longer than all of them.
        in_prefill, in_decode = (share.policy.ffn_in(phase) is Device.GPU for phase in (Phase.PREFILL, Phase.DECODE))
        least_s = (costs.prefills_in_turn * work.least_s(exact=in_prefill) for work in self.prefill_works)
        self.prefill_s = self._in_all(least_s)
        least_s = (sum(alike.steps * alike.work.least_s(exact=in_decode) for alike in steps) for steps in self.steps)
        self.decode_s = self._in_all(least_s)
        self.prefills: list[PhaseEstimate] = []
        self.decodes: list[PhaseEstimate] = []

    def _in_all(self, seconds: Iterable[float]) -> float:
        return sum(turn.times * of_turn for turn, of_turn in zip(self.turns, seconds, strict=True))

    def simulate_decode(self) -> None:
        """Find out what decode takes."""
        turns = zip(self.turns, self.steps, strict=True)
        self.decodes = [_decode(self.costs, turn.policy, self.workload, steps) for turn, steps in turns]
        self.decode_s = self._in_all(decode.seconds for decode in self.decodes)

    def simulate_prefill(self) -> None:
        """Find out what prefill takes."""
        turns = zip(self.turns, self.prefill_works, strict=True)
        self.prefills = [_prefill(self.costs, turn.policy, self.workload, work) for turn, work in turns]
        self.prefill_s = self._in_all(prefill.seconds for prefill in self.prefills)


def phase_of_job(phase: Phase, costs: Costs, turns: Sequence[Turn], workload: Workload) -> PhaseEstimate:
    """A phase of a job that has these turns."""
    if phase is Phase.DECODE:
        steps = [(turn.policy, decode_steps(costs, turn.policy, workload)) for turn in turns]
        return total(turns, [_decode(costs, policy, workload, of_turn) for policy, of_turn in steps])
    works = [(turn.policy, prefill_phase(costs, turn.policy, workload)) for turn in turns]
    return total(turns, [_prefill(costs, policy, workload, work) for policy, work in works])


def total(turns: Sequence[Turn], phases: Sequence[PhaseEstimate]) -> PhaseEstimate:
    """A phase of a job whose turns take that for it."""
    of_turns = [(turn.times, phase) for turn, phase in zip(turns, phases, strict=True)]
    return PhaseEstimate(
        seconds=sum(times * phase.seconds for times, phase in of_turns),
        work=PhaseWork.total((times, phase.work) for times, phase in of_turns),
    )


def _prefill(costs: Costs, policy: Policy, workload: Workload, work: PhaseWork) -> PhaseEstimate:
    """Prefill of one batch, of which that is the work."""
    simulated_s = prefill_seconds(costs, policy, workload, work=work)
    return PhaseEstimate(seconds=costs.prefills_in_turn * max(simulated_s, work.bound_s), work=work)


def _decode(costs: Costs, policy: Policy, workload: Workload, steps: Sequence[StepsAlike]) -> PhaseEstimate:
    """Decode of one batch, of whose steps that is the work."""
    active = workload.active_share * policy.batch_size / policy.num_micro_batches
    simulated_s = steps_seconds(costs, policy, {step.context: step.work for step in steps}, tokens=active)
    # A model of one layer is not yet in its steady state when the steps are taken, and long ones are shortened.
    seconds = sum(step.steps * max(step.work.bound_s, s) for step, s in zip(steps, simulated_s, strict=True))
    return PhaseEstimate(seconds=seconds, work=PhaseWork.total((step.steps, step.work) for step in steps))
