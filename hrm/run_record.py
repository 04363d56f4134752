"""What a run did, as its run.json holds it: the executor writes it, and `hrm validate` reads it."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Final, cast

from hrm.acts import NAMES
from hrm.decoding import read_json
from hrm.errors import PolicyError, ProfileError, TraceError
from hrm.numeric import Spread
from hrm.policy import ScheduleName
from hrm.policy_file import PolicyFile, check_policy_file
from hrm.strict import decode_strictly
from hrm.tasks import Act, Lane, Phase

RUN_SCHEMA: Final = 1
LARGEST: Final = 10**15  # of what a run measures: seconds, bytes, tokens


@dataclass(slots=True)
class KindTotal:
    """All tasks of one kind together; lanes count them up in it."""

    count: int = 0
    seconds: float = 0.0
    num_bytes: int = 0

    def add(self, more: "KindTotal") -> None:
        """Count others too."""
        self.count += more.count
        self.seconds += more.seconds
        self.num_bytes += more.num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneRecord:
    """One lane in one phase of a run; runs of before bytes were counted by lane have 0."""

    busy_s: float
    busy_share: float = 0.0
    num_bytes: int = 0

    @property
    def bytes_per_s(self) -> float:
        """What it moved a second while it was at work."""
        return self.num_bytes / self.busy_s if self.busy_s else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseRecord:
    """One phase of a run over all its batches; kinds of task go by their names."""

    seconds: float
    step_s: Spread = field(default_factory=Spread)
    kinds: dict[str, KindTotal]
    lanes: dict[str, LaneRecord]

    def kind(self, act: Act) -> KindTotal:
        """All tasks of a kind, of which there may be none."""
        return self.kinds.get(act.name, KindTotal())

    def lane(self, lane: Lane) -> LaneRecord:
        """A lane, which may have done nothing."""
        return self.lanes.get(lane.value, LaneRecord(busy_s=0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class TotalsRecord:
    """What a run generated and how long it took."""

    requests: int
    rejected_requests: int = 0
    failed_requests: int = 0
    batches: int = 0
    prompt_tokens: int
    generated_tokens: int
    load_s: float = 0.0
    prefill_s: float
    decode_s: float
    tokens_per_s: float
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRecord:
    """One batch of a run, or `count` of them that were alike, whose seconds are added up."""

    requests: int
    count: int = 1
    micro_batch_sizes: tuple[int, ...] = ()
    chunks: int = 0
    decode_steps: int
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadRecord:
    """The lengths that the job really had; `asked_gen_len` is the mean of what was asked for."""

    prompt_len: float
    max_prompt_len: int
    gen_len: float
    max_gen_len: int
    asked_gen_len: float = 0.0
    num_requests: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceleratorRecord:
    """What the run ran on; `h2d_bytes_per_s` is the pace of an emulated link.

    `pageable` are purposes of the host's memory that cross the link but were not pinned, and
    `library_bytes` what libraries hold of the GPU's memory beside what is planned.
    """

    name: str
    emulated: bool = False
    description: str
    cpu_kernels: str = ""
    h2d_bytes_per_s: float | None = None
    d2h_bytes_per_s: float | None = None
    pageable: tuple[str, ...] = ()
    library_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """What was run, and where its weights came from: a folder, or a name if they are random or from the Hub."""

    name: str
    folder: str
    family: str
    parameters: int
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelRecord:
    """Planned and peak bytes of one memory level, in all and by purpose."""

    capacity_bytes: int
    planned_bytes: dict[str, int] = field(default_factory=dict[str, int])
    peak_bytes: dict[str, int] = field(default_factory=dict[str, int])
    planned_total_bytes: int
    peak_total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankRecord:
    """What one of the other ranks did in a run on several GPUs, beside rank 0.

    `routed_tokens` are those of a pipeline's stage, whose layers rank 0 has not, and `h2d_bytes_per_s` the pace of its
    own emulated link.
    """

    rank: int
    load_s: float = 0.0
    h2d_bytes_per_s: float | None = None
    d2h_bytes_per_s: float | None = None
    phases: dict[str, PhaseRecord]
    memory: dict[str, LevelRecord]
    routed_tokens: list[list[int]] = field(default_factory=list[list[int]])


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRecord:
    """How many spans are in the trace beside run.json, and how many there was no room for."""

    spans: int
    spans_left_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """All of a run.json; what runs of earlier versions may lack has a default.

    `policy_file` is what was run but for its order, which is `schedule`. If that is not quite what
    was given, `notice` says why. `sampling_defaults` are what requests got that did not say, those of
    OpenAI's API left out. `routed_tokens[i][e]` counts what layer i sent to expert e. On several GPUs
    `ranks` are the others than rank 0, whose phases and memory stand for all.
    """

    schema: int = RUN_SCHEMA
    outcome: str
    message: str | None = None
    notice: str | None = None
    started: str = ""
    ended: str = ""
    accelerator: AcceleratorRecord
    schedule: str
    model: ModelRecord | None = None
    sampling_defaults: dict[str, float] = field(default_factory=dict[str, float])
    totals: TotalsRecord
    workload: WorkloadRecord
    phases: dict[str, PhaseRecord]
    memory: dict[str, LevelRecord]
    ranks: list[RankRecord] = field(default_factory=list[RankRecord])
    batches: list[BatchRecord]
    routed_tokens: list[list[int]] = field(default_factory=list[list[int]])
    trace: TraceRecord | None = None
    versions: dict[str, str] = field(default_factory=dict[str, str])
    policy_file: PolicyFile

    def phase(self, phase: Phase) -> PhaseRecord:
        """One phase, which may not have been run."""
        return self.phases.get(phase.value, PhaseRecord(seconds=0.0, kinds={}, lanes={}))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """What one worker of a fleet did: `run` is what a run.json of its own would hold.

    That is None if it ended before its first batch did. The counts are of what arrived.
    """

    worker: int
    node: str
    policy: str
    outcome: str
    requests: int = 0
    generated_tokens: int = 0
    run: RunRecord | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetRecord:
    """All of the run.json of a job that many workers ran; `seconds` are from the first request sent to the last answer.

    Workers that took another's place have numbers of their own. `given_up` are requests that no worker could answer.
    """

    schema: int = RUN_SCHEMA
    outcome: str
    message: str | None = None
    started: str = ""
    ended: str = ""
    seconds: float
    requests: int
    failed_requests: int = 0
    generated_tokens: int
    tokens_per_s: float
    given_up: list[str] = field(default_factory=list[str])
    workers: list[WorkerRecord]
    versions: dict[str, str] = field(default_factory=dict[str, str])


def read_run(folder: Path, worker: int | None = None) -> RunRecord:
    """Read a run directory's run.json, of a fleet's what one worker did; TraceError if it cannot be used."""
    record = read_record(folder)
    path = folder / "run.json"
    if isinstance(record, RunRecord):
        if worker is not None:
            raise TraceError("--worker", worker, f"is of a fleet's run, which {path} does not tell of", "leave it out")
        return record
    found = [str(one.worker) for one in record.workers if one.run is not None]
    if worker is None:
        raise TraceError(
            f"{path}: workers", f"<{len(found)}>", "are many, and one run is wanted", "use hrm validate, with --worker"
        )
    run = next((one.run for one in record.workers if one.worker == worker), None)
    if run is None:
        rule = f"must be a worker of which {path} has a run: {', '.join(found)}"
        raise TraceError("--worker", worker, rule, "choose one of them")
    return run


def read_record(folder: Path) -> RunRecord | FleetRecord:
    """Read the run.json of a run, or of a fleet's; TraceError if there is none or it cannot be used."""
    path = folder / "run.json"
    plain = read_json(path, "a run.json that executor run wrote", TraceError, remedy="give the --output-dir of a run")
    kind = FleetRecord if isinstance(plain, dict) and "workers" in plain else RunRecord
    try:
        record = decode_strictly(plain, kind, str(path), other_keys=True)
        runs = {"": record} if isinstance(record, RunRecord) else _runs_of(record)
        for where, run in runs.items():
            check_policy_file(run.policy_file, f"{path}: {where}policy_file")
    except (ProfileError, PolicyError) as error:
        raise TraceError(error.where, error.value, error.rule, "run the job again") from error
    if record.schema != RUN_SCHEMA:
        raise TraceError(f"{path}: schema", record.schema, f"must be {RUN_SCHEMA}", "run the job again")
    for prefix, run in runs.items():
        for where, value, rule in _impossible(run):
            raise TraceError(f"{path}: {prefix}{where}", value, rule, "run the job again")
    if not any(run.totals.generated_tokens for run in runs.values()):
        raise TraceError(
            f"{path}: totals.generated_tokens",
            0,
            "must be more than 0: nothing was run",
            "look into outputs.jsonl for the reason",
        )
    return record


def _runs_of(fleet: FleetRecord) -> dict[str, RunRecord]:
    """The records of a fleet's workers, by where they stand."""
    return {f"workers[{index}].run.": one.run for index, one in enumerate(fleet.workers) if one.run is not None}


def _impossible(record: RunRecord) -> Iterator[tuple[str, object, str]]:
    """What no run can have measured: where it stands, its value, and what must hold."""
    try:
        ScheduleName(record.schedule)
    except ValueError:
        yield "schedule", record.schedule, f"must be one of {', '.join(ScheduleName)}"
    others = ((f"ranks[{index}].", rank.phases) for index, rank in enumerate(record.ranks))
    for prefix, phases in (("", record.phases), *others):
        for phase, of_phase in phases.items():
            for where, given, known in (
                ("phases", [phase], [x.value for x in Phase]),
                (f"phases.{phase}.kinds", of_phase.kinds, NAMES),
                (f"phases.{phase}.lanes", of_phase.lanes, [lane.value for lane in Lane]),
            ):
                for name in given:
                    if name not in known:
                        yield f"{prefix}{where}", name, f"must be of {', '.join(known)}"
    for index, batch in enumerate(record.batches):
        if batch.requests < 1:
            yield f"batches[{index}].requests", batch.requests, "must be at least 1"
        if batch.count < 1:
            yield f"batches[{index}].count", batch.count, "must be at least 1"
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
