"""What limits a phase: not the lane that is busy the longest, but what its seconds are spent on.

A cause is found by asking what a job would take if the cause cost less. The same closed form that
makes the seconds answers: every resource of the machine is given in turn at a lower cost. `hrm
whatif` does the same with searches and simulations, so that report and what-if agree.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache, cached_property
from typing import Final

from hrm.costs import Costs
from hrm.phase_work import HOST_MEMORY, PhaseWork, Turn, phase_work
from hrm.scaling import Resource, at_cost, resources
from hrm.tasks import Lane, Phase
from hrm.workload import Workload

NEARLY_EQUAL: Final = 0.01  # of a phase's time: savings that differ by less are told apart no more
RIVAL: Final = 0.2  # of the most that is saved in closed form: a prediction may turn it round
_SLIGHTLY: Final = 2.0**-10
_NEARLY_NOTHING: Final = 1e-9


class Cause(StrEnum):
    """What may limit a phase: the value in tables, plots and files, the phrase in sentences."""

    GPU_COMPUTE = "GPU compute"
    GPU_MEMORY = "GPU memory"
    GPU_LAUNCHES = "GPU launches"
    CPU_COMPUTE = "CPU compute"
    CPU_MEMORY = "CPU memory"
    CPU_LAUNCHES = "CPU launches"
    H2D_LINK = "H2D link"
    D2H_LINK = "D2H link"
    LINK_LATENCY = "link latency"
    PEER_LINK = "peer link"
    PEER_LATENCY = "peer latency"
    STAGING = "staging"
    HOST_MEMORY = "host memory"
    SYNCHRONISING = "syncs"
    RUNNING_TASKS = "tasks"
    WAITING = "waiting"
    NOTHING = "nothing"

    @property
    def phrase(self) -> str:
        """What follows "limited by" in a sentence."""
        return _PHRASES[self]


_PHRASES: Final = {
    Cause.GPU_COMPUTE: "the GPU's compute",
    Cause.GPU_MEMORY: "the GPU's memory bandwidth",
    Cause.GPU_LAUNCHES: "the launches of GPU kernels",
    Cause.CPU_COMPUTE: "the CPU's compute",
    Cause.CPU_MEMORY: "the CPU's memory bandwidth",
    Cause.CPU_LAUNCHES: "the launches of CPU operators",
    Cause.H2D_LINK: "the host-to-device link",
    Cause.D2H_LINK: "the device-to-host link",
    Cause.LINK_LATENCY: "the latency of transfers between host and GPU",
    Cause.PEER_LINK: "the links between GPUs",
    Cause.PEER_LATENCY: "the latency between GPUs",
    Cause.STAGING: "the staging copies to pinned memory",
    Cause.HOST_MEMORY: "the host's memory, which CPU and links share",
    Cause.SYNCHRONISING: "waits for the GPU after every task",
    Cause.RUNNING_TASKS: "running so many tasks, whatever they do",
    Cause.WAITING: "tasks that wait for one another",
    Cause.NOTHING: "nothing",
}
_CAUSES: Final = {
    Resource.GPU_FLOPS: Cause.GPU_COMPUTE,
    Resource.GPU_BANDWIDTH: Cause.GPU_MEMORY,
    Resource.GPU_LAUNCH_LATENCY: Cause.GPU_LAUNCHES,
    Resource.CPU_FLOPS: Cause.CPU_COMPUTE,
    Resource.CPU_BANDWIDTH: Cause.CPU_MEMORY,
    Resource.CPU_LAUNCH_LATENCY: Cause.CPU_LAUNCHES,
    Resource.H2D_BANDWIDTH: Cause.H2D_LINK,
    Resource.D2H_BANDWIDTH: Cause.D2H_LINK,
    Resource.LINK_LATENCY: Cause.LINK_LATENCY,
    Resource.PEER_BANDWIDTH: Cause.PEER_LINK,
    Resource.PEER_LATENCY: Cause.PEER_LATENCY,
}
# The host's memory bandwidth goes by other names where it is not the CPU that waits for it.
_MEMORY_OF: Final = {Lane.STAGE.value: Cause.STAGING, HOST_MEMORY: Cause.HOST_MEMORY}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What limits a phase.

    `cause` is what would shorten the phase most if it cost half as much, and `saved_s` by how much
    each would. `waiting_s` is how much longer the phase takes than the lane with the most work.
    """

    cause: Cause
    saved_s: dict[Cause, float]
    waiting_s: float


@dataclass(frozen=True, eq=False)
class Limits:
    """What limits each phase of a job, and both together, worked out from such phases when it is first asked for."""

    of_phases: Callable[[tuple[Phase, ...]], Limit]

    @cached_property
    def prefill(self) -> Limit:
        """What limits prefill."""
        return self.of_phases((Phase.PREFILL,))

    @cached_property
    def decode(self) -> Limit:
        """What limits decode."""
        return self.of_phases((Phase.DECODE,))

    @cached_property
    def job(self) -> Limit:
        """What limits both phases together."""
        return self.of_phases((Phase.PREFILL, Phase.DECODE))


def limits_of(
    costs: Costs, turns: Sequence[Turn], workload: Workload, *, seconds_of: Callable[[Costs, Phase], float]
) -> Limits:
    """What limits a job; `seconds_of` are those of its phases, as they are predicted.

    What each cause would save is found in closed form. Where it is not clear which would save most, or
    what one would, those that may are predicted, which takes longer.
    """
    cheaper = _at_costs(costs, 0.5)

    @cache
    def closed(cause: Cause | None, phase: Phase) -> PhaseWork:
        return phase_work(phase, costs if cause is None else cheaper[cause], turns, workload)

    @cache
    def predicted_s(cause: Cause | None, phase: Phase) -> float:
        return seconds_of(costs if cause is None else cheaper[cause], phase)

    def limit(phases: tuple[Phase, ...]) -> Limit:
        def work(cause: Cause | None) -> PhaseWork:
            return PhaseWork.total((1.0, closed(cause, phase)) for phase in phases)

        halved = {cause: work(cause) for cause in cheaper}
        contended = any(closed(None, phase).contends for phase in phases)
        return _limit(
            work(None), halved, lambda cause: sum(predicted_s(cause, phase) for phase in phases), contended=contended
        )

    return Limits(limit)


Spent = dict[str, dict[Cause, float]]


def spent_of(costs: Costs, turns: Sequence[Turn], workload: Workload) -> tuple[Spent, Spent]:
    """The seconds of every lane, and of the host's memory, by cause, in prefill and in decode.

    They grow in proportion to all costs together, so that the parts add up: a cause's is how fast
    they grow with its own.
    """
    at_less = _at_costs(costs, 1 - _SLIGHTLY)

    def spent(phase: Phase) -> Spent:
        now = phase_work(phase, costs, turns, workload)
        less = {cause: phase_work(phase, each, turns, workload) for cause, each in at_less.items()}
        return {
            name: {
                _named(cause, name): part
                for cause, work in less.items()
                if (part := (of_lane - work.busy_s[name]) / _SLIGHTLY) > _NEARLY_NOTHING * of_lane
            }
            for name, of_lane in now.busy_s.items()
            if of_lane > 0
        }

    return spent(Phase.PREFILL), spent(Phase.DECODE)


def _at_costs(costs: Costs, factor: float) -> dict[Cause, Costs]:
    """The costs with each cause at `factor` times what it costs, one at a time."""
    found = {
        cause: replace(costs, profile=at_cost(costs.profile, resource, factor))
        for resource in resources(costs.profile)
        if (cause := _CAUSES.get(resource)) is not None
    }
    if costs.runtime.synchronise_s:
        waits = replace(costs.runtime, synchronise_s=factor * costs.runtime.synchronise_s)
        found[Cause.SYNCHRONISING] = replace(costs, runtime=waits)
    if (shared := costs.profile.lane_threads) is not None:
        cheaper = replace(costs.profile, lane_threads=replace(shared, task_s=shared.task_s.times(factor)))
        found[Cause.RUNNING_TASKS] = replace(costs, profile=cheaper)
    return found


def _limit(
    now: PhaseWork, halved: Mapping[Cause, PhaseWork], predicted_s: Callable[[Cause | None], float], *, contended: bool
) -> Limit:
    longest, seconds = now.longest, predicted_s(None)
    waiting_s = max(0.0, seconds - now.bound_s)
    saved_s = {cause: now.in_order_s - work.in_order_s for cause, work in halved.items()}
    most_s = max(*saved_s.values(), NEARLY_EQUAL * seconds)
    unclear = Cause.CPU_MEMORY if contended else None  # no lane tells how much longer a chain of tasks takes by it
    rivals = [cause for cause, saved in saved_s.items() if saved > RIVAL * most_s or cause is unclear]
    if len(rivals) + (waiting_s / 2 > RIVAL * most_s) > 1:
        saved_s |= {cause: seconds - predicted_s(cause) for cause in rivals}
    in_longest_s = {cause: now.busy_s[longest] - work.busy_s[longest] for cause, work in halved.items()}
    enough_s = max(saved_s.values()) - NEARLY_EQUAL * seconds
    nearly = [cause for cause, saved in saved_s.items() if saved >= enough_s]
    best = max(nearly, key=lambda cause: (in_longest_s[cause], saved_s[cause]))
    if seconds <= 0:
        cause = Cause.NOTHING
    elif waiting_s / 2 > max(saved_s[best], in_longest_s[best]):
        cause = Cause.WAITING
    else:
        cause = _named(best, longest)
    named = {_named(cause, longest): saved for cause, saved in saved_s.items()}
    return Limit(cause=cause, saved_s={**named, Cause.WAITING: waiting_s / 2}, waiting_s=waiting_s)


def _named(cause: Cause, where: str) -> Cause:
    """The cause by the name that it has there: the host's memory bandwidth has several."""
    return _MEMORY_OF.get(where, cause) if cause is Cause.CPU_MEMORY else cause
