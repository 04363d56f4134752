"""What a policy will do on a machine: closed form (the bound) and simulation (with its bubbles)."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil

from hrm.causes import Limits, limits_of
from hrm.costs import EXECUTOR, Costs, Runtime
from hrm.hardware import HardwareProfile
from hrm.latency import Latency
from hrm.memory import MemoryPlan, fullest, plan_shares
from hrm.model_spec import ModelSpec
from hrm.parallel import Part, Share, shares_for, used_of
from hrm.phase_work import Turn
from hrm.policy import PaperTuple, Parallelism, Policy
from hrm.stage_run import PhaseEstimate, StageRun, phase_of_job, total
from hrm.tasks import Lane, Phase
from hrm.workload import Workload

_Batches = tuple[tuple[PhaseEstimate, PhaseEstimate], ...]  # prefill and decode of batches by size


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """What the stage of a pipeline on the GPU of that number does in the whole job, and what it needs."""

    gpu: int
    policy: Policy
    part: Part
    turns: tuple[Turn, ...]
    batches: _Batches
    memory: MemoryPlan

    @cached_property
    def phases(self) -> tuple[PhaseEstimate, PhaseEstimate]:
        """Prefill and decode of the job."""
        prefill, decode = zip(*self.batches, strict=True)
        return total(self.turns, prefill), total(self.turns, decode)

    @property
    def prefill_s(self) -> float:
        """Prefill of its first batch, without what the pipeline waits to be filled."""
        costs = Costs(*self.part, self.policy.formats)
        return self.batches[0][0].seconds / costs.prefills_in_turn

    @property
    def seconds(self) -> float:
        """Time of the job, if the stage need not wait for another."""
        return sum(phase.seconds for phase in self.phases)

    def limits(self, workload: Workload, runtime: Runtime) -> Limits:
        """What limits it, whatever the other stages do."""

        def seconds_of(costs: Costs, phase: Phase) -> float:
            return phase_of_job(phase, costs, self.turns, workload).seconds

        costs = Costs(*self.part, self.policy.formats, runtime)
        return limits_of(costs, self.turns, workload, seconds_of=seconds_of)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A policy's predicted job: all batches of the workload, or one batch if it has no end.

    `part` is what the policy is for, the whole or one pipeline stage, and `part_policy` is its policy:
    shares of a policy are told here, of its own part. `turns` are the batches that the job's time
    consists of. Where stages are planned one by one, they are in `stages`; each phase then takes as
    long as its slowest stage, and `part` is the one that is slowest in all.
    `latency` is of a full batch's requests, in the policy's part of the machine.
    """

    policy: Policy
    part: Part
    part_policy: Policy
    stages: tuple[StageEstimate, ...] = ()
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
        return self.part_policy.paper_tuple(self.part.spec)

    @property
    def weight_share_on_gpu(self) -> float:
        """The paper's r_w: share of the layers' weight bytes that lives on the GPU."""
        return self.part_policy.weight_share_on_gpu(self.part.spec)

    @property
    def costs(self) -> Costs:
        """What the tasks of the policy's part cost."""
        return Costs(self.part.spec, self.part.profile, self.policy.formats, self.runtime)

    @cached_property
    def limits(self) -> Limits:
        """What limits each phase, and the job; worked out when it is first asked for."""
        if self.stages:
            return self._limits_of_stages()
        own = {Phase.PREFILL: self.prefill.seconds, Phase.DECODE: self.decode.seconds}

        def seconds_of(costs: Costs, phase: Phase) -> float:
            return own[phase] if costs == self.costs else phase_of_job(phase, costs, self.turns, self.workload).seconds

        return limits_of(self.costs, self.turns, self.workload, seconds_of=seconds_of)

    def _limits_of_stages(self) -> Limits:
        """What limits the stage that is slowest in prefill, that in decode, and that in all."""
        in_prefill, in_decode = _slowest_in_phases(self.stages)
        slowest: dict[tuple[Phase, ...], StageEstimate] = {
            (Phase.PREFILL,): in_prefill,
            (Phase.DECODE,): in_decode,
            (Phase.PREFILL, Phase.DECODE): _slowest(self.stages),
        }
        return Limits(lambda phases: slowest[phases].limits(self.workload, self.runtime).of_phases(phases))

    def changed(self, costs: Costs) -> "Estimate":
        """The same job under the same policy where tasks of its part cost something else; other stages are left out."""
        prefill, decode = (
            phase_of_job(phase, costs, self.turns, self.workload) for phase in (Phase.PREFILL, Phase.DECODE)
        )
        part = Part(costs.spec, costs.profile)
        return replace(self, part=part, stages=(), runtime=costs.runtime, prefill=prefill, decode=decode)


def estimate(
    spec: ModelSpec, policy: Policy, profile: HardwareProfile, workload: Workload, *, runtime: Runtime = EXECUTOR
) -> Estimate:
    """Predict a job under a policy.

    In pipeline parallel as many batches are under way as there are stages: a job of fewer takes as
    long as if it had as many. Raises PolicyError if the policy is not for this model; whether it
    fits is for the caller to check (`estimate(...).memory.check_fits()`).
    """
    predicted = Prospect(spec, policy, profile, workload, runtime).above(0.0)
    assert predicted is not None, "no job is slower than nothing"
    return predicted


class Prospect:
    """A policy's job before it is simulated, of which the closed form tells how fast it may be at most."""

    def __init__(
        self, spec: ModelSpec, policy: Policy, profile: HardwareProfile, workload: Workload, runtime: Runtime = EXECUTOR
    ) -> None:
        self.policy, self.profile, self.workload, self.runtime = policy, profile, workload, runtime
        self.shares = shares_for(policy, spec, profile)
        self.num_requests = requests = workload.requests_or(policy.batch_size)
        self.generated_tokens = requests * workload.generated_tokens
        turns: tuple[Turn, ...] = (Turn(policy, 1.0),)
        if workload.num_requests is not None:
            pipeline = policy.parallelism is Parallelism.PIPELINE
            turns = _turns(policy, requests, used_of(profile, policy).num_gpus if pipeline else 1)
        known: dict[Hashable, StageRun] = {}
        self._runs: list[StageRun] = []
        for index, share in enumerate(self.shares):
            own_turns = _of_share(turns, index if policy.stage_lengths else None)
            same = what_tells_apart(share), own_turns
            if same not in known:
                known[same] = StageRun(share, own_turns, workload, runtime)
            self._runs.append(known[same])
        self._different = list(known.values())

    @property
    def at_most_tokens_per_s(self) -> float:
        """No higher throughput is possible, as far as is known."""
        least_s = max(run.prefill_s for run in self._different) + max(run.decode_s for run in self._different)
        return self.generated_tokens / least_s

    def above(self, tokens_per_s: float) -> Estimate | None:
        """What simulating the job gives; None as soon as it is known that no so high throughput is reached.

        The closed form may show it, or decode, however good prefill is: that takes longest to simulate.
        """
        runs = self._different
        for simulate in (*(run.simulate_decode for run in runs), *(run.simulate_prefill for run in runs)):
            if self.at_most_tokens_per_s < tokens_per_s:
                return None
            simulate()
        return self._estimate()

    def _estimate(self) -> Estimate:
        policy = self.policy
        memories = plan_shares(self.shares, self.profile)
        stages = [
            StageEstimate(
                gpu=index,
                policy=share.policy,
                part=share.part,
                turns=run.turns,
                batches=tuple(zip(run.prefills, run.decodes, strict=True)),
                memory=memory,
            )
            for index, (share, run, memory) in enumerate(zip(self.shares, self._runs, memories, strict=True))
        ]
        slowest = _slowest(stages)
        prefill, decode = (stage.phases[phase] for phase, stage in enumerate(_slowest_in_phases(stages)))
        return Estimate(
            policy=policy,
            part=slowest.part,
            part_policy=slowest.policy,
            stages=tuple(stages) if policy.stage_lengths else (),
            runtime=self.runtime,
            workload=self.workload,
            turns=slowest.turns,
            num_requests=self.num_requests,
            num_batches=ceil(self.num_requests / policy.batch_size),
            generated_tokens=self.generated_tokens,
            prefill=prefill,
            decode=decode,
            memory=fullest(stage.memory for stage in stages),
            latency=_latency(stages, self.workload),
        )


def _slowest(stages: Sequence[StageEstimate]) -> StageEstimate:
    return max(stages, key=lambda stage: stage.seconds)


def _slowest_in_phases(stages: Sequence[StageEstimate]) -> tuple[StageEstimate, StageEstimate]:
    """The stage that takes longest to prefill, and that which takes longest to decode."""
    by_phase = [max(stages, key=lambda stage, of=phase: stage.phases[of].seconds) for phase in range(2)]
    return by_phase[0], by_phase[1]


def slowest_share(policy: Policy, spec: ModelSpec, profile: HardwareProfile, workload: Workload) -> Share:
    """The policy with its part of model and machine; of stages that are planned one by one, the slowest."""
    shares = shares_for(policy, spec, profile)
    if len(shares) == 1:
        return shares[0]
    predicted = estimate(spec, policy, profile, workload)
    return Share(predicted.part_policy, predicted.part)


def _of_share(turns: Sequence[Turn], stage: int | None) -> tuple[Turn, ...]:
    if stage is None:
        return tuple(turns)
    return tuple(Turn(turn.policy.of_stage(stage), turn.times) for turn in turns)


def what_tells_apart(share: Share) -> Hashable:
    """Stages for which this is the same take equally long: they may have other layers of the model, but such ones.

    Stages on GPUs alike with as large a share of the host have one and the same profile, see `stage_part`.
    """
    spec, profile = share.part
    return spec.layers, spec.has_embedding, spec.has_head, id(profile), share.policy


def _latency(stages: Sequence[StageEstimate], workload: Workload) -> Latency:
    """What requests of the first batch wait for; a stage that stands for all is passed as often as there are."""
    first, last = stages[0], stages[-1]
    policy = first.turns[0].policy
    prefill, _ = last.batches[0]
    return Latency.of_batch(
        prefill_s=[stage.prefill_s for stage in stages],
        num_stages=first.part.profile.num_stages,
        gpu_s_a_layer=prefill.lane_s[Lane.GPU] / last.part.spec.num_layers,
        chunks=int(workload.chunks(policy.batch_size, policy.prefill_chunk_tokens)),
        decode_s=max(stage.batches[0][1].seconds for stage in stages),
        decode_steps=workload.decode_steps,
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
