"""Measured beside predicted: a run directory laid over the model of the machine it ran on."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from hrm.acts import ACTS, waits_for_ranks
from hrm.buffers import Purpose
from hrm.costs import EXECUTOR, Costs, Runtime
from hrm.hardware import HardwareProfile
from hrm.model_spec import ModelSpec
from hrm.parallel import ranks_of
from hrm.phases import decode_work, prefill_work, simulate_work, step_seconds
from hrm.policy import Parallelism, Policy, ScheduleName
from hrm.run_record import FleetRecord, KindTotal, RunRecord, WorkloadRecord
from hrm.scaling import paced
from hrm.tasks import Lane, Phase
from hrm.trace import Trace
from hrm.workload import Workload

_Row = TypeVar("_Row")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A figure measured and predicted."""

    measured: float
    predicted: float

    @property
    def error(self) -> float | None:
        """How far the prediction lies above (or below) the measurement, as a share of it."""
        return self.predicted / self.measured - 1 if self.measured else None

    def to_json(self) -> dict[str, float | None]:
        """Both figures and the error."""
        return {"measured": self.measured, "predicted": self.predicted, "error": self.error}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Predicted seconds of the batches that a run had, by phase, kind and lane."""

    phase_s: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(Phase, 0.0))
    kind_s: dict[tuple[Phase, str], float] = field(default_factory=dict[tuple[Phase, str], float])
    lane_s: dict[tuple[Phase, Lane], float] = field(default_factory=dict[tuple[Phase, Lane], float])

    def add(self, phase: Phase, seconds: float, tasks: Trace, times: int) -> None:
        """Count a part of a phase that takes so long and is run so many times."""
        self.phase_s[phase] += times * seconds
        for kind, kind_s in tasks.seconds_by_kind().items():
            self.kind_s[phase, kind] = self.kind_s.get((phase, kind), 0.0) + times * kind_s
        for lane, lane_s in tasks.busy_s().items():
            self.lane_s[phase, lane] = self.lane_s.get((phase, lane), 0.0) + times * lane_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """A run against its prediction: every kind of task and every lane that was predicted or run.

    On several GPUs these are rank 0's, but a phase is predicted to take as long as its slowest rank, and `rank_s` has
    what every rank did beside waiting for others and summing up with them.
    """

    run: RunRecord
    tokens_per_s: Comparison
    phase_tokens_per_s: dict[Phase, Comparison]
    kind_s: dict[tuple[Phase, str], Comparison]
    lane_s: dict[tuple[Phase, Lane], Comparison]
    rank_s: dict[tuple[Phase, int], Comparison]

    @property
    def slowest_rank(self) -> int | None:
        """The rank that the others wait for most; None if there is one only."""
        own_s: dict[int, float] = {}
        for (_, rank), comparison in self.rank_s.items():
            own_s[rank] = own_s.get(rank, 0.0) + comparison.measured
        return max(own_s, key=lambda rank: own_s[rank], default=None)

    def to_json(self) -> dict[str, Any]:
        """Everything compared; errors are shares of the measured figure."""
        return {
            "outcome": self.run.outcome,
            "accelerator": self.run.accelerator,
            "schedule": self.run.schedule,
            "tokens_per_s": self.tokens_per_s.to_json(),
            "phase_tokens_per_s": {phase.value: both.to_json() for phase, both in self.phase_tokens_per_s.items()},
            "lane_s": _by_phase({(p, lane.value): c for (p, lane), c in self.lane_s.items()}),
            "kind_s": _by_phase(self.kind_s),
            "rank_s": _by_phase({(phase, str(rank)): c for (phase, rank), c in self.rank_s.items()}),
            "slowest_rank": self.slowest_rank,
            "memory": self.run.memory,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetValidation:
    """The workers of a fleet that had a batch, by their numbers, each against its own prediction."""

    fleet: FleetRecord
    workers: dict[int, Validation]

    @property
    def tokens_per_s(self) -> Comparison:
        """Of all workers while they were at work, and as predicted, summed up."""
        rates = [one.tokens_per_s for one in self.workers.values()]
        return Comparison(
            measured=sum(rate.measured for rate in rates), predicted=sum(rate.predicted for rate in rates)
        )

    def to_json(self) -> dict[str, Any]:
        """Everything compared, worker by worker."""
        return {
            "outcome": self.fleet.outcome,
            "tokens_per_s": self.tokens_per_s.to_json(),
            "workers": {str(number): one.to_json() for number, one in self.workers.items()},
        }


def validate_fleet(fleet: FleetRecord) -> FleetValidation:
    """Compare what each worker of a fleet did with what is predicted for its batches."""
    runs = {one.worker: one.run for one in fleet.workers if one.run is not None and one.run.totals.generated_tokens}
    return FleetValidation(fleet=fleet, workers={number: validate(run) for number, run in runs.items()})


def _by_phase(named: dict[tuple[Phase, str], Comparison]) -> dict[str, dict[str, Any]]:
    return {phase.value: {name: c.to_json() for (p, name), c in named.items() if p is phase} for phase in Phase}


def validate(run: RunRecord) -> Validation:
    """Predict the batches that the run had, at their real lengths, and compare."""
    of_ranks = predict_ranks(run)
    predicted = of_ranks[0]
    phase_s = {phase: max(one.phase_s[phase] for one in of_ranks) for phase in Phase}
    totals, decode_tokens = run.totals, run.totals.generated_tokens - run.totals.requests
    tokens = {Phase.PREFILL: totals.prompt_tokens, Phase.DECODE: decode_tokens}
    measured_s = {Phase.PREFILL: totals.prefill_s, Phase.DECODE: totals.decode_s}

    def rate(count: float, measured_s: float, predicted_s: float) -> Comparison:
        return Comparison(
            measured=count / measured_s if measured_s else 0.0, predicted=count / predicted_s if predicted_s else 0.0
        )

    return Validation(
        run=run,
        tokens_per_s=rate(totals.generated_tokens, sum(measured_s.values()), sum(phase_s.values())),
        phase_tokens_per_s={phase: rate(tokens[phase], measured_s[phase], phase_s[phase]) for phase in Phase},
        kind_s=_beside(
            {(phase, name): kind.seconds for phase in Phase for name, kind in run.phase(phase).kinds.items()},
            predicted.kind_s,
        ),
        lane_s=_beside(
            {(phase, Lane(name)): lane.busy_s for phase in Phase for name, lane in run.phase(phase).lanes.items()},
            predicted.lane_s,
        ),
        rank_s={
            (phase, rank): Comparison(
                measured=_own_seconds(run, phase, {name: kind.seconds for name, kind in kinds.items()}),
                predicted=_own_seconds(
                    run, phase, {name: s for (p, name), s in of_ranks[rank].kind_s.items() if p is phase}
                ),
            )
            for phase in Phase
            for rank, kinds in _kinds_of_ranks(run, phase).items()
        },
    )


def _kinds_of_ranks(run: RunRecord, phase: Phase) -> dict[int, dict[str, KindTotal]]:
    """The tasks of each rank in a phase; none if there is one rank only."""
    if not run.ranks:
        return {}
    others = {rank.rank: rank.phases[phase.value].kinds for rank in run.ranks if phase.value in rank.phases}
    return {0: run.phase(phase).kinds, **others}


def _own_seconds(run: RunRecord, phase: Phase, kind_s: Mapping[str, float]) -> float:
    """Seconds of the tasks in which a rank waits for no other: not sums, the choice of tokens, and what it receives."""
    in_pipeline = run.policy_file.policy.parallelism is Parallelism.PIPELINE
    together = {act.name for act in ACTS[phase] if waits_for_ranks(act, in_pipeline=in_pipeline)}
    return sum(seconds for name, seconds in kind_s.items() if name not in together)


def _beside(measured_s: Mapping[_Row, float], predicted_s: Mapping[_Row, float]) -> dict[_Row, Comparison]:
    """A row for everything that was measured, and for what else was predicted; the other side is 0."""
    return {
        row: Comparison(measured=measured_s.get(row, 0.0), predicted=predicted_s.get(row, 0.0))
        for row in {**measured_s, **predicted_s}
    }


def predict_ranks(run: RunRecord) -> list[Prediction]:
    """Simulate every batch of the run with its real size and lengths, on each rank with its own link's pace."""
    plan, paces = run.policy_file, {0: (run.accelerator.h2d_bytes_per_s, run.accelerator.d2h_bytes_per_s)}
    paces |= {rank.rank: (rank.h2d_bytes_per_s, rank.d2h_bytes_per_s) for rank in run.ranks if rank.h2d_bytes_per_s}
    policy = replace(plan.policy, schedule=ScheduleName(run.schedule))
    shares = ranks_of(policy, plan.model, plan.profile)
    known: dict[tuple[int, tuple[float | None, float | None]], Prediction] = {}
    found: list[Prediction] = []
    for rank, share in enumerate(shares):
        alike = shares.index(share), paces.get(rank, paces[0])
        if alike not in known:
            known[alike] = _predicted(run, share.policy, share.part.spec, paced(share.part.profile, *alike[1]))
        found.append(known[alike])
    return found


def _predicted(run: RunRecord, policy: Policy, spec: ModelSpec, profile: HardwareProfile) -> Prediction:
    """What a rank with this part of model and machine does in the run."""
    runtime = runtime_with(run.accelerator.pageable, profile)
    costs = Costs(spec, profile, policy.formats, runtime)
    prediction = Prediction()
    alike = Counter[tuple[int, int]]()
    for batch in run.batches:
        alike[batch.requests, batch.decode_steps] += batch.count
    for (requests, decode_steps), count in alike.items():
        _add_batch(prediction, costs, policy, run.workload, requests, decode_steps, count)
    return prediction


def _add_batch(
    prediction: Prediction,
    costs: Costs,
    policy: Policy,
    lengths: WorkloadRecord,
    requests: int,
    decode_steps: int,
    count: int,
) -> None:
    smaller = policy.for_batch(requests)
    workload = Workload(
        name="measured",
        prompt_len=lengths.prompt_len,
        max_prompt_len=lengths.max_prompt_len,
        gen_len=max(lengths.max_gen_len, 1),
    )
    prefill = simulate_work(prefill_work(costs, smaller, workload))
    prediction.add(Phase.PREFILL, prefill.makespan_s, prefill, count)
    # A pipeline's first stage does so when its own prompts are through, and waits for tokens of the last.
    prediction.phase_s[Phase.DECODE] += count * (costs.prefills_in_turn - 1) * prefill.makespan_s
    if not decode_steps:
        return
    # Requests that end early leave the others more room: the mean number active decides. Failed ones have no tokens.
    active = requests * max(lengths.gen_len - 1, 0.0) / decode_steps
    context = lengths.prompt_len + lengths.gen_len / 2
    work = decode_work(costs, smaller, context, num_steps=1, tokens=active / smaller.num_micro_batches)
    step_s = step_seconds(costs, smaller, context, tokens=work.tokens)
    prediction.add(Phase.DECODE, step_s, simulate_work(work), count * decode_steps)


def runtime_with(pageable: Collection[str], profile: HardwareProfile) -> Runtime:
    """The executor where those purposes of the host's memory are not pinned.

    A KV cache then crosses the pageable link, if it is known how fast that is.
    """
    known = profile.has_link(profile.host.name, profile.top.name, "pageable")
    slow = known and Purpose.KV_CACHE in pageable
    return replace(EXECUTOR, kv_link="pageable") if slow else EXECUTOR
