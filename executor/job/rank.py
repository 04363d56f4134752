"""What ranks of a job tell one another of it, and `python -m executor.job.rank`: one of them other than 0."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import msgspec

from executor.checkpoint import Checkpoint
from executor.errors import RunError
from executor.generate import AbstractGenerator, BatchResult
from executor.group.cores import keep_to_own
from executor.group.processes import ProcessGroup
from executor.group.stages import ProcessStages
from executor.job.machine import AcceleratorOptions, files_of_ranks, prepare
from executor.job.model_part import ModelPart
from executor.job.report import Totals, rank_record
from executor.job.weights import ModelWeights
from executor.ranks.messages import told
from executor.ranks.worker import end_with_parent, serve
from executor.trace_budget import MAX_SPANS
from executor.under_way import Peers
from executor.weight_pages import StoredWeights
from hrm.acts import act_named
from hrm.policy import Parallelism
from hrm.policy_file import PolicyFile
from hrm.run_record import RankRecord
from hrm.strict import decode_strictly
from hrm.tasks import Lane, Phase, TaskId
from hrm.trace import Span
from hrm.units import is_whole_number


@dataclass(frozen=True, slots=True, kw_only=True)
class RankJob:
    """All that another rank needs to know of a job; `eos_token_ids` are those that the tokenizer names too.

    Without a `model`, weights are random numbers in the shape that the policy is for, of that `seed`. Of a model with
    more layers than that shape, the first are run. At most so many spans are kept.
    """

    model: Path | None
    model_name: str = ""
    seed: int = 0
    policy_file: PolicyFile
    accelerator: AcceleratorOptions
    eos_token_ids: tuple[int, ...]
    max_spans: int = MAX_SPANS

    def encode(self) -> bytes:
        """As a message."""
        return msgspec.json.encode(replace(self, model=self.model and self.model.absolute()), enc_hook=str)

    @staticmethod
    def decode(message: bytes) -> "RankJob":
        """Of a message."""
        plain: dict[str, Any] = msgspec.json.decode(message)
        policy_file = decode_strictly(plain.pop("policy_file"), PolicyFile, "the policy of rank 0")
        return RankJob(
            model=plain["model"] and Path(plain["model"]),
            model_name=plain["model_name"],
            seed=plain["seed"],
            policy_file=policy_file,
            accelerator=AcceleratorOptions(**plain["accelerator"]),
            eos_token_ids=tuple(plain["eos_token_ids"]),
            max_spans=plain["max_spans"],
        )

    @contextmanager
    def opened(self) -> Iterator[ModelWeights]:
        """The model, whose files are open within the context."""
        if self.model is None:
            yield ModelWeights.random(self.policy_file.model, self.seed)
            return
        with Checkpoint.open(self.model, self.model_name) as checkpoint:
            yield ModelWeights.of_checkpoint(checkpoint).cut(self.policy_file.model.num_layers)


def shares_of_cores(files: Sequence[PolicyFile]) -> list[int]:
    """What each rank gets of the cores: stages of a pipeline in proportion to their layers, as they are planned."""
    return [one.model.num_layers for one in files]


def is_pipeline(job: RankJob) -> bool:
    """Whether its ranks are stages."""
    return job.policy_file.policy.parallelism is Parallelism.PIPELINE


class PlainSpan(msgspec.Struct, frozen=True, array_like=True):
    """A span whose act goes by its names; its place is layer, index and step."""

    phase: Phase
    name: str
    lane: Lane
    place: tuple[int, int, int]
    start_s: float
    end_s: float
    batch: int
    num_bytes: int

    @staticmethod
    def of(span: Span, first_layer: int = 0) -> "PlainSpan":
        """Of a span, whose layers count from the first that its rank has."""
        act, layer, index, step = span.id
        place = first_layer + layer, index, step
        return PlainSpan(span.phase, act.name, span.lane, place, span.start_s, span.end_s, span.batch, span.num_bytes)

    def later(self, seconds: float) -> Span:
        """The span, so many seconds later."""
        task = TaskId(act_named(self.phase, self.name, self.lane), *self.place)
        return Span(task, self.start_s + seconds, self.end_s + seconds, self.batch, self.num_bytes)


class RankReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank did since it last told: the record, and the spans of its trace, in seconds since `origin_s`."""

    record: RankRecord
    origin_s: float
    spans: list[PlainSpan]

    @staticmethod
    def of(record: RankRecord, generator: AbstractGenerator, spans: Sequence[Span]) -> "RankReport":
        """The report of a generator's rank."""
        first, origin_s = generator.arch.first_layer, generator.engine.origin_s
        return RankReport(record=record, origin_s=origin_s, spans=[PlainSpan.of(span, first) for span in spans])

    def encode(self) -> bytes:
        """As a message."""
        return msgspec.json.encode(self)

    @staticmethod
    def decode(message: bytes) -> "RankReport":
        """Of a message."""
        return msgspec.json.decode(message, type=RankReport)

    def spans_since(self, origin_s: float) -> list[Span]:
        """The spans, in seconds since another moment of the machine's clock."""
        return [span.later(self.origin_s - origin_s) for span in self.spans]


def for_rank(options: AcceleratorOptions, rank: int, size: int, gpus: Sequence[int] = ()) -> AcceleratorOptions:
    """The accelerator of that rank: the CUDA device that is named for it, or the first and those that follow.

    A policy that uses some `gpus` of a machine has their numbers, by which the devices follow. Raises RunError if there
    are other than `size` devices named, or what is named is no number.
    """
    kind, _, named = options.name.partition(":")
    if kind != "cuda":
        return options
    numbers = gpus or range(size)
    devices = (named or str(numbers[0])).split(",")
    if len(devices) not in (1, size) or not all(map(is_whole_number, devices)):
        rule = f"must name the first device, as in cuda:0, or one for each of {size} ranks, as in cuda:0,1"
        raise RunError("--accelerator", options.name, rule, "correct it")
    own = devices[rank] if len(devices) == size else int(devices[0]) + numbers[rank] - numbers[0]
    return replace(options, name=f"cuda:{own}")


@final
class JobRank:
    """A rank other than 0: its part of the model, with the weights loaded, on its part of the machine."""

    def __init__(self, message: bytes, group: ProcessGroup) -> None:
        self._rank, job = group.rank, RankJob.decode(message)
        keep_to_own(group.rank, shares_of_cores(files_of_ranks(job.policy_file)))
        self.generator = _generator(job, group)
        self._totals, self._spans = Totals(), list[Span]()

    def add(self, result: BatchResult) -> None:
        """Count a batch."""
        self._totals.add(result)
        self._spans += [span for part in (result.prefill, result.decode) if part is not None for span in part.spans]

    def report(self) -> bytes:
        """What it has done since it last told, a RankReport."""
        record = rank_record(self._rank, self.generator, self._totals)
        report = RankReport.of(record, self.generator, self._spans)
        self._totals, self._spans = Totals(), []
        return report.encode()


def _generator(job: RankJob, group: ProcessGroup) -> AbstractGenerator:
    with job.opened() as (family, source, arch):
        whole = replace(arch, eos_token_ids=job.eos_token_ids)
        part = ModelPart.of(StoredWeights(source, family), whole, job.policy_file, group.rank)
        accelerator = for_rank(job.accelerator, group.rank, group.size, job.policy_file.policy.gpus)
        prepared = prepare(accelerator, part.policy_file, part.policy_file.policy)
        if is_pipeline(job):  # whose first stage looks for stop texts
            return part.generator(prepared, peers=Peers(stages=ProcessStages(group)), max_spans=job.max_spans)
        return part.generator(prepared, stops=told(group), peers=Peers(group), max_spans=job.max_spans)


if __name__ == "__main__":
    end_with_parent()
    serve(JobRank)
