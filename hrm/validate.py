"""Measured beside predicted: a run directory laid over the model of the machine it ran on."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Final, cast

from hrm.acts import NAMES
from hrm.costs import EXECUTOR, Costs, Runtime
from hrm.decoding import read_json
from hrm.errors import PolicyError, ProfileError, TraceError
from hrm.estimate import decode_work, prefill_work, simulate_work, step_seconds, with_batch_size
from hrm.hardware import HardwareProfile, Link
from hrm.numeric import Spread
from hrm.parallel import part_for
from hrm.policy import Policy, ScheduleName
from hrm.policy_file import PolicyFile, check_policy_file
from hrm.strict import decode_strictly
from hrm.tasks import Lane, Phase
from hrm.workload import Workload

RUN_SCHEMA: Final = 1
LARGEST: Final = 10**15  # of what a run measures: seconds, bytes, tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class KindRecord:
    """All tasks of one kind in one phase of a run."""

    count: int
    seconds: float
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneRecord:
    """One lane in one phase of a run; runs of before bytes were counted by lane have 0."""

    busy_s: float
    num_bytes: int = 0

    @property
    def bytes_per_s(self) -> float:
        """What it moved a second while it was at work."""
        return self.num_bytes / self.busy_s if self.busy_s else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseRecord:
    """One phase of a run over all its batches."""

    seconds: float
    kinds: dict[str, KindRecord]
    lanes: dict[str, LaneRecord]
    step_s: Spread = field(default_factory=Spread)


@dataclass(frozen=True, slots=True, kw_only=True)
class TotalsRecord:
    """What a run generated and how long it took."""

    requests: int
    prompt_tokens: int
    generated_tokens: int
    prefill_s: float
    decode_s: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRecord:
    """One batch of a run."""

    requests: int
    decode_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadRecord:
    """The lengths that the job really had."""

    prompt_len: float
    max_prompt_len: int
    gen_len: float
    max_gen_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceleratorRecord:
    """What the run ran on; `h2d_bytes_per_s` is the pace of an emulated link.

    `pageable` are purposes of the host's memory that cross the link but were not pinned.
    """

    name: str
    description: str
    h2d_bytes_per_s: float | None = None
    d2h_bytes_per_s: float | None = None
    pageable: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelRecord:
    """Planned and peak bytes of one memory level."""

    capacity_bytes: int
    planned_total_bytes: int
    peak_total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What `hrm validate` reads of a run.json; the file holds more."""

    schema: int
    outcome: str
    schedule: str
    accelerator: AcceleratorRecord
    totals: TotalsRecord
    workload: WorkloadRecord
    phases: dict[str, PhaseRecord]
    memory: dict[str, LevelRecord]
    batches: list[BatchRecord]
    policy_file: PolicyFile


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


@dataclass(slots=True, kw_only=True)
class Prediction:
    """Predicted seconds of the batches that a run had, by phase, kind and lane."""

    phase_s: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(Phase, 0.0))
    kind_s: dict[tuple[Phase, str], float] = field(default_factory=lambda: defaultdict[tuple[Phase, str], float](float))
    lane_s: dict[tuple[Phase, Lane], float] = field(
        default_factory=lambda: defaultdict[tuple[Phase, Lane], float](float)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """A run against its prediction."""

    run: RunRecord
    tokens_per_s: Comparison
    phase_tokens_per_s: dict[Phase, Comparison]
    kind_s: dict[tuple[Phase, str], Comparison]
    lane_s: dict[tuple[Phase, Lane], Comparison]

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
            "memory": self.run.memory,
        }


def _by_phase(named: dict[tuple[Phase, str], Comparison]) -> dict[str, dict[str, Any]]:
    return {phase.value: {name: c.to_json() for (p, name), c in named.items() if p is phase} for phase in Phase}


def read_run(folder: Path) -> RunRecord:
    """Read a run directory's run.json; TraceError if there is none or it cannot be used."""
    path = folder / "run.json"
    plain = read_json(path, "a run.json that executor run wrote", TraceError, remedy="give the --output-dir of a run")
    try:
        record = decode_strictly(plain, RunRecord, str(path), other_keys=True)
        check_policy_file(record.policy_file, f"{path}: policy_file")
    except (ProfileError, PolicyError) as error:
        raise TraceError(error.where, error.value, error.rule, "run the job again") from error
    if record.schema != RUN_SCHEMA:
        raise TraceError(f"{path}: schema", record.schema, f"must be {RUN_SCHEMA}", "run the job again")
    for where, value, rule in _impossible(record):
        raise TraceError(f"{path}: {where}", value, rule, "run the job again")
    if not record.totals.generated_tokens:
        raise TraceError(
            f"{path}: totals.generated_tokens",
            0,
            "must be more than 0: nothing was run",
            "look into outputs.jsonl for the reason",
        )
    return record


def _impossible(record: RunRecord) -> Iterator[tuple[str, object, str]]:
    """What no run can have measured: where it stands, its value, and what must hold."""
    names = {"phases": [x.value for x in Phase], "schedule": [x.value for x in ScheduleName]}
    if record.schedule not in names["schedule"]:
        yield "schedule", record.schedule, f"must be one of {', '.join(names['schedule'])}"
    for phase, of_phase in record.phases.items():
        for where, given, known in (
            ("phases", [phase], names["phases"]),
            (f"phases.{phase}.kinds", of_phase.kinds, NAMES),
            (f"phases.{phase}.lanes", of_phase.lanes, [lane.value for lane in Lane]),
        ):
            for name in given:
                if name not in known:
                    yield where, name, f"must be of {', '.join(known)}"
    for index, batch in enumerate(record.batches):
        if batch.requests < 1:
            yield f"batches[{index}].requests", batch.requests, "must be at least 1"
    measured = {item.name: getattr(record, item.name) for item in fields(record)}
    del measured["policy_file"], measured["schema"]
    for where, value in _numbers(measured, ""):
        if not 0 <= value <= LARGEST:
            yield where, value, f"must be from 0 to {LARGEST:.0e}"


def _numbers(node: Any, where: str) -> Iterator[tuple[str, float]]:
    """Every number in a record, with its path."""
    match node:
        case int() | float():
            yield where, node
        case dict():
            for key, inner in cast("dict[str, Any]", node).items():
                yield from _numbers(inner, f"{where}.{key}".removeprefix("."))
        case list() | tuple():
            for index, inner in enumerate(cast("list[Any]", node)):
                yield from _numbers(inner, f"{where}[{index}]")
        case _ if is_dataclass(node):
            for item in fields(node):
                yield from _numbers(getattr(node, item.name), f"{where}.{item.name}")
        case _:
            pass


def validate(run: RunRecord) -> Validation:
    """Predict the batches that the run had, at their real lengths, and compare."""
    predicted = predict_run(run)
    totals, decode_tokens = run.totals, run.totals.generated_tokens - run.totals.requests
    tokens = {Phase.PREFILL: totals.prompt_tokens, Phase.DECODE: decode_tokens}
    measured_s = {Phase.PREFILL: totals.prefill_s, Phase.DECODE: totals.decode_s}

    def rate(count: float, measured_s: float, predicted_s: float) -> Comparison:
        return Comparison(
            measured=count / measured_s if measured_s else 0.0, predicted=count / predicted_s if predicted_s else 0.0
        )

    records = {phase: run.phases[phase.value] for phase in Phase if phase.value in run.phases}
    return Validation(
        run=run,
        tokens_per_s=rate(totals.generated_tokens, sum(measured_s.values()), sum(predicted.phase_s.values())),
        phase_tokens_per_s={phase: rate(tokens[phase], measured_s[phase], predicted.phase_s[phase]) for phase in Phase},
        kind_s={
            (phase, name): Comparison(measured=kind.seconds, predicted=predicted.kind_s[phase, name])
            for phase, record in records.items()
            for name, kind in record.kinds.items()
        },
        lane_s={
            (phase, Lane(name)): Comparison(measured=lane.busy_s, predicted=predicted.lane_s[phase, Lane(name)])
            for phase, record in records.items()
            for name, lane in record.lanes.items()
        },
    )


def predict_run(run: RunRecord) -> Prediction:
    """Simulate every batch of the run with its real size and lengths."""
    plan = run.policy_file
    profile = paced(plan.profile, run.accelerator)
    policy = replace(plan.policy, schedule=ScheduleName(run.schedule))
    runtime = runtime_with(run.accelerator.pageable, profile)
    costs = Costs(*part_for(policy, plan.model, profile), policy.formats, runtime)
    prediction = Prediction()
    alike = Counter((batch.requests, batch.decode_steps) for batch in run.batches)
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
    smaller = with_batch_size(policy, min(requests, policy.batch_size))
    workload = Workload(
        name="measured",
        prompt_len=lengths.prompt_len,
        max_prompt_len=lengths.max_prompt_len,
        gen_len=max(lengths.max_gen_len, 1),
    )
    prefill = simulate_work(prefill_work(costs, smaller, workload))
    prediction.phase_s[Phase.PREFILL] += count * prefill.makespan_s
    for kind, seconds in prefill.seconds_by_kind().items():
        prediction.kind_s[Phase.PREFILL, kind] += count * seconds
    for lane, seconds in prefill.busy_s().items():
        prediction.lane_s[Phase.PREFILL, lane] += count * seconds
    if not decode_steps:
        return
    # Requests that end early leave the others more room: the mean number active decides.
    active = requests * (lengths.gen_len - 1) / decode_steps
    context = lengths.prompt_len + lengths.gen_len / 2
    work = decode_work(costs, smaller, context, num_steps=1, tokens=active / smaller.num_micro_batches)
    step = simulate_work(work)
    steps = count * decode_steps
    scale = step_seconds(costs, smaller, context, tokens=work.tokens)
    prediction.phase_s[Phase.DECODE] += steps * scale
    for kind, seconds in step.seconds_by_kind().items():
        prediction.kind_s[Phase.DECODE, kind] += steps * seconds
    for lane, seconds in step.busy_s().items():
        prediction.lane_s[Phase.DECODE, lane] += steps * seconds


def runtime_with(pageable: Collection[str], profile: HardwareProfile) -> Runtime:
    """The executor where those purposes of the host's memory are not pinned.

    A KV cache then crosses the pageable link, if it is known how fast that is.
    """
    known = profile.has_link(profile.host.name, profile.top.name, "pageable")
    slow = known and "kv_cache" in pageable
    return replace(EXECUTOR, kv_link="pageable") if slow else EXECUTOR


def paced(profile: HardwareProfile, accelerator: AcceleratorRecord) -> HardwareProfile:
    """The profile with the links as the run paced them."""
    if not profile.has_accelerator or accelerator.h2d_bytes_per_s is None:
        return profile
    paces = {
        (profile.host.name, profile.top.name): accelerator.h2d_bytes_per_s,
        (profile.top.name, profile.host.name): accelerator.d2h_bytes_per_s,
    }

    def at_pace(link: Link) -> Link:
        pace = paces.get((link.source, link.target))
        if link.kind != "pinned" or pace is None:
            return link
        figure = replace(link.bandwidth_bytes_per_s.planned, value=pace, curve=())
        rate = replace(link.bandwidth_bytes_per_s, achieved=figure)
        return replace(link, bandwidth_bytes_per_s=rate)

    return replace(profile, links=tuple(at_pace(link) for link in profile.links))
