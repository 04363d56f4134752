"""What a policy will do on a machine: closed form (the bound) and simulation (with its bubbles)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil

from hrm.causes import Limits, limits_of
from hrm.costs import EXECUTOR, Costs, Runtime
from hrm.hardware import HardwareProfile
from hrm.latency import Latency
from hrm.memory import MemoryPlan, plan_memory
from hrm.model_spec import ModelSpec
from hrm.parallel import Part, part_for
from hrm.phase_work import PhaseWork, Turn, decode_steps, prefill_phase
from hrm.phases import prefill_seconds, steps_seconds
from hrm.policy import PaperTuple, Parallelism, Policy
from hrm.tasks import Lane
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

    @property
    def host_memory_s(self) -> float:
        """Seconds that the host's memory needs to serve all lanes."""
        return self.work.host_memory_s

    @property
    def all_reduce_s(self) -> float:
        """Seconds of the GPUs' time in which they exchange sums."""
        return self.work.all_reduce_s


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A policy's predicted job: all batches of the workload, or one batch if it has no end.

    `part` is what the policy is for, the whole or one pipeline stage: shares of a policy are told
    here, of its own part. `turns` are the batches that the job's time consists of.
    `latency` is of a full batch's requests, in the policy's part of the machine.
    """

    policy: Policy
    part: Part
    runtime: Runtime
    workload: Workload
    turns: tuple[Turn, ...]
    num_requests: int
    num_batches: int
    generated_tokens: float
    prefill: PhaseEstimate
    decode: PhaseEstimate
    memory: MemoryPlan
    latency: Latency

    @property
    def seconds(self) -> float:
        """Predicted time of the job."""
        return self.prefill.seconds + self.decode.seconds

    @property
    def tokens_per_s(self) -> float:
        """Generation throughput: tokens generated over prefill and decode time."""
        return self.generated_tokens / self.seconds

    @property
    def bound_tokens_per_s(self) -> float:
        """Throughput if all lanes overlapped perfectly."""
        return self.generated_tokens / (self.prefill.bound_s + self.decode.bound_s)

    @property
    def paper_tuple(self) -> PaperTuple:
        """The policy in the paper's six numbers."""
        return self.policy.paper_tuple(self.part.spec)

    @property
    def weight_share_on_gpu(self) -> float:
        """The paper's r_w: share of the layers' weight bytes that lives on the GPU."""
        return self.policy.weight_share_on_gpu(self.part.spec)

    @property
    def costs(self) -> Costs:
        """What the tasks of the policy's part cost."""
        return Costs(self.part.spec, self.part.profile, self.policy.formats, self.runtime)

    @cached_property
    def limits(self) -> Limits:
        """What limits each phase, and the job; worked out when it is first asked for."""

        def seconds_of(costs: Costs) -> tuple[float, float]:
            predicted = self if costs == self.costs else self.changed(costs)
            return predicted.prefill.seconds, predicted.decode.seconds

        return limits_of(self.costs, self.turns, self.workload, seconds_of=seconds_of)

    def changed(self, costs: Costs) -> "Estimate":
        """The same job under the same policy where tasks cost something else."""
        batches = [_batch(costs, turn.policy, self.workload) for turn in self.turns]
        prefill, decode = _total(self.turns, batches)
        return replace(
            self, part=Part(costs.spec, costs.profile), runtime=costs.runtime, prefill=prefill, decode=decode
        )


def estimate(
    spec: ModelSpec, policy: Policy, profile: HardwareProfile, workload: Workload, *, runtime: Runtime = EXECUTOR
) -> Estimate:
    """Predict a job under a policy.

    In pipeline parallel as many batches are under way as there are stages: a job of fewer takes as
    long as if it had as many. Raises PolicyError if the policy is not for this model; whether it
    fits is for the caller to check (`estimate(...).memory.check_fits()`).
    """
    part = part_for(policy, spec, profile)
    costs = Costs(part.spec, part.profile, policy.formats, runtime)
    requests = workload.requests_or(policy.batch_size)
    turns: tuple[Turn, ...] = (Turn(policy, 1.0),)
    if workload.num_requests is not None:
        pipeline = policy.parallelism is Parallelism.PIPELINE
        turns = _turns(policy, requests, profile.num_gpus if pipeline else 1)
    batches = [_batch(costs, turn.policy, workload) for turn in turns]
    prefill, decode = _total(turns, batches)
    return Estimate(
        policy=policy,
        part=part,
        runtime=runtime,
        workload=workload,
        turns=turns,
        num_requests=requests,
        num_batches=ceil(requests / policy.batch_size),
        generated_tokens=requests * workload.generated_tokens,
        prefill=prefill,
        decode=decode,
        memory=plan_memory(spec, policy, profile),
        latency=_latency(costs, turns[0].policy, workload, *batches[0]),
    )


def _latency(
    costs: Costs, policy: Policy, workload: Workload, prefill: PhaseEstimate, decode: PhaseEstimate
) -> Latency:
    """What requests of a batch with these phases wait for."""
    tokens = policy.batch_size * workload.prompt_len
    return Latency.of_batch(
        prefill_s=prefill.seconds / costs.prefills_in_turn,
        gpu_s_a_layer=prefill.lane_s[Lane.GPU] / costs.spec.num_layers,
        chunks=ceil(tokens / policy.prefill_chunk_tokens),
        decode_s=decode.seconds,
        decode_steps=workload.decode_steps,
        num_stages=costs.profile.num_stages,
    )


def _turns(policy: Policy, requests: int, num_stages: int) -> tuple[Turn, ...]:
    """Batches by size, each as often as the job takes its time.

    The batches that go through a pipeline together take as long as if each were the largest of
    them, and as if there were one for every stage.
    """
    full, rest = divmod(requests, policy.batch_size)
    turns = [Turn(policy, float(ceil(full / num_stages) * num_stages))] if full else []
    if rest and full % num_stages == 0:  # else it goes with full ones, of which some are missing
        turns.append(Turn(policy.for_batch(rest), float(num_stages)))
    return tuple(turns)


def _batch(costs: Costs, policy: Policy, workload: Workload) -> tuple[PhaseEstimate, PhaseEstimate]:
    """Both phases of one batch."""
    active = workload.active_share * policy.batch_size / policy.num_micro_batches
    steps = decode_steps(costs, policy, workload)
    simulated_s = steps_seconds(costs, policy, {step.context: step.work.stretch for step in steps}, tokens=active)
    # A model of one layer is not yet in its steady state when the steps are taken.
    decode_s = sum(step.steps * max(step.work.bound_s, s) for step, s in zip(steps, simulated_s, strict=True))
    prefill = prefill_phase(costs, policy, workload)
    prefill_s = prefill_seconds(costs, policy, workload, stretch=prefill.stretch)
    return (
        PhaseEstimate(seconds=costs.prefills_in_turn * prefill_s, work=prefill),
        PhaseEstimate(seconds=decode_s, work=PhaseWork.total((step.steps, step.work) for step in steps)),
    )


def _total(
    turns: Sequence[Turn], batches: Sequence[tuple[PhaseEstimate, PhaseEstimate]]
) -> tuple[PhaseEstimate, PhaseEstimate]:
    """Both phases of a job whose turns have these batches."""

    def over(phases: Sequence[PhaseEstimate]) -> PhaseEstimate:
        times = [turn.times for turn in turns]
        return PhaseEstimate(
            seconds=sum(count * phase.seconds for count, phase in zip(times, phases, strict=True)),
            work=PhaseWork.total((count, phase.work) for count, phase in zip(times, phases, strict=True)),
        )

    return over([prefill for prefill, _ in batches]), over([decode for _, decode in batches])
