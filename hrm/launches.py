"""Launches where they are what limits: those of this executor, and those of other engines.

How many kernels and operators a task issues is a property of the code that runs it, and what each
costs is often assumed. A plan that they limit says both, and what fused kernels would make of it.
"""

from dataclasses import dataclass, replace
from typing import Final

from hrm.causes import Cause
from hrm.costs import Costs
from hrm.estimate import Estimate
from hrm.hardware import Figure, HardwareProfile, MemoryLevel
from hrm.phase_work import job_work
from hrm.scaling import Resource, with_resource

_LIMITS: Final = {Cause.GPU_LAUNCHES: Resource.GPU_LAUNCH_LATENCY, Cause.CPU_LAUNCHES: Resource.CPU_LAUNCH_LATENCY}


@dataclass(frozen=True, slots=True, kw_only=True)
class Launches:
    """The launches of a job that limit a phase of it, each of which takes `latency_s`.

    `share` is of the job's time. `fused_count` are those with fused kernels (one for each norm and
    rotary embedding, one for all experts of a layer), and `fused_tokens_per_s` the throughput then;
    both are None where kernels are fused already. `free_tokens_per_s` is the throughput if launches
    cost nothing, which is the most that replaying them (CUDA graphs) can give. All are of the same
    policy.
    """

    cause: Cause
    count: float
    latency_s: Figure
    share: float
    fused_count: float | None
    fused_tokens_per_s: float | None
    free_tokens_per_s: float


def launches_of(estimate: Estimate) -> list[Launches]:
    """The launches that limit a phase of the job, the GPU's and the CPU's apart; mostly none."""
    limits = {estimate.limits.prefill.cause, estimate.limits.decode.cause}
    return [_launches(estimate, cause) for cause in _LIMITS if cause in limits]


def _launches(estimate: Estimate, cause: Cause) -> Launches:
    costs = estimate.costs
    latency_s = _level(costs.profile, cause).processor.launch_latency_s
    fused = replace(costs, runtime=replace(costs.runtime, fused_kernels=True))
    free = replace(costs, profile=with_resource(costs.profile, _LIMITS[cause], 0.0))
    count, fused_count = _count(estimate, costs, cause), _count(estimate, fused, cause)
    is_fused = fused_count >= count
    return Launches(
        cause=cause,
        count=count,
        latency_s=latency_s,
        share=count * latency_s.value / estimate.seconds,
        fused_count=None if is_fused else fused_count,
        fused_tokens_per_s=None if is_fused else estimate.changed(fused).tokens_per_s,
        free_tokens_per_s=estimate.changed(free).tokens_per_s,
    )


def _level(profile: HardwareProfile, cause: Cause) -> MemoryLevel:
    return profile.top if cause is Cause.GPU_LAUNCHES else profile.host


def _count(estimate: Estimate, costs: Costs, cause: Cause) -> float:
    """How many launches the job has: by how many seconds it grows if each takes one more."""
    level = _level(costs.profile, cause)
    latency_s = level.processor.launch_latency_s
    slower = replace(latency_s, value=latency_s.value + 1.0)
    changed = replace(level, processor=replace(level.processor, launch_latency_s=slower))
    levels = tuple(changed if each is level else each for each in costs.profile.levels)
    slow = replace(costs, profile=replace(costs.profile, levels=levels))
    before_s, after_s = (
        sum(seconds for phase in work for seconds in phase.lane_s.values())
        for work in (job_work(each, estimate.turns, estimate.workload) for each in (costs, slow))
    )
    return after_s - before_s
