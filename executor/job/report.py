"""What a run did, as it is written to run.json, and the trace beside it."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Final, NamedTuple

from executor import native
from executor.backends import AbstractBackend
from executor.engine import PhaseResult, add_totals
from executor.generate import AbstractGenerator, BatchResult
from hrm.buffers import Purpose
from hrm.memory import LevelPlan, MemoryPlan
from hrm.numeric import Spread
from hrm.policy import ScheduleName
from hrm.policy_file import PolicyFile
from hrm.run_record import (
    AcceleratorRecord,
    BatchRecord,
    KindTotal,
    LaneRecord,
    LevelRecord,
    ModelRecord,
    PhaseRecord,
    RankRecord,
    RunRecord,
    TotalsRecord,
    TraceRecord,
    WorkloadRecord,
)
from hrm.tasks import Lane, Phase

MAX_BATCHES: Final = 1000  # listed one by one in run.json; of further ones so many kinds
MAX_STEPS: Final = 10_000  # whose median is told


@dataclass(slots=True)
class PhaseTotals:
    """One phase over all batches."""

    seconds: float = 0.0
    by_kind: dict[str, KindTotal] = field(default_factory=dict[str, KindTotal])
    busy_s: dict[Lane, float] = field(default_factory=dict[Lane, float])
    moved_bytes: dict[Lane, int] = field(default_factory=dict[Lane, int])
    step_s: list[float] = field(default_factory=list[float])

    def add(self, result: PhaseResult, num_steps: int) -> None:
        """Count one batch's phase, which had so many steps."""
        self.seconds += result.seconds
        add_totals(self.by_kind, result.by_kind)
        for lane, busy_s in result.busy_s.items():
            self.busy_s[lane] = self.busy_s.get(lane, 0.0) + busy_s
        for lane, num_bytes in result.moved_bytes.items():
            self.moved_bytes[lane] = self.moved_bytes.get(lane, 0) + num_bytes
        self.step_s += result.step_s[: min(num_steps, MAX_STEPS - len(self.step_s))]

    @property
    def record(self) -> PhaseRecord:
        """What run.json holds of the phase."""
        return PhaseRecord(
            seconds=self.seconds,
            step_s=Spread.of(self.step_s),
            kinds=self.by_kind,
            lanes={
                lane.value: LaneRecord(
                    busy_s=busy_s, busy_share=_ratio(busy_s, self.seconds), num_bytes=self.moved_bytes.get(lane, 0)
                )
                for lane, busy_s in self.busy_s.items()
            },
        )


@dataclass(slots=True)
class Totals:
    """Everything counted over a run, exactly, whatever is left out of the trace."""

    requests: int = 0
    rejected: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    max_prompt_tokens: int = 0
    generated_tokens: int = 0
    max_generated_tokens: int = 0
    asked_tokens: int = 0
    phases: dict[Phase, PhaseTotals] = field(default_factory=lambda: {phase: PhaseTotals() for phase in Phase})
    batches: list[BatchRecord] = field(default_factory=list[BatchRecord])
    further: list[BatchRecord] = field(default_factory=list[BatchRecord])
    num_batches: int = 0
    routed_tokens: list[list[int]] = field(default_factory=list[list[int]])
    spans_left_out: int = 0

    def add(self, result: BatchResult) -> None:
        """Count a batch, also one that was cut short: then what had ended by then."""
        for part in (result.prefill, result.decode):
            if part is not None:
                self.spans_left_out += part.spans_left_out
        answered = [completion for completion in result.completions if completion.error is None]
        self.failed += len(result.completions) - len(answered)
        if not answered:  # nothing to show for its time but the trace
            return
        under_way = len(result.micro_batch_sizes)
        generated = [len(completion.tokens) for completion in answered]
        prompts = [len(completion.request.prompt) for completion in answered]
        self.requests += len(answered)
        self.prompt_tokens += sum(prompts)
        self.max_prompt_tokens = max(self.max_prompt_tokens, *prompts)
        self.generated_tokens += sum(generated)
        self.max_generated_tokens = max(self.max_generated_tokens, *generated)
        self.asked_tokens += sum(c.request.params.max_tokens for c in answered)
        self.num_batches += under_way
        self._add_routed(result.routed_tokens)
        decode_steps = max(generated) - 1
        # Those under way together take as long as if each were like the others.
        for sizes in result.micro_batch_sizes:
            self._add_batch(
                BatchRecord(
                    requests=len(answered) if under_way == 1 else sum(sizes),
                    micro_batch_sizes=sizes,
                    chunks=result.num_chunks // under_way,
                    decode_steps=decode_steps,
                    prefill_s=result.prefill.seconds / under_way,
                    decode_s=(result.decode.seconds if result.decode else 0.0) / under_way,
                )
            )
        self.phases[Phase.PREFILL].add(result.prefill, 1)
        if result.decode is not None:
            self.phases[Phase.DECODE].add(result.decode, decode_steps)

    def _add_batch(self, batch: BatchRecord) -> None:
        """List a batch, or count it with the one most alike when there are many."""
        if len(self.batches) < MAX_BATCHES:
            self.batches.append(batch)
            return

        def distance(index: int) -> tuple[int, int]:
            other = self.further[index]
            return abs(other.requests - batch.requests), abs(other.decode_steps - batch.decode_steps)

        nearest = min(range(len(self.further)), key=distance, default=None)
        if nearest is None or (distance(nearest) != (0, 0) and len(self.further) < MAX_BATCHES):
            self.further.append(batch)
            return
        one = self.further[nearest]
        self.further[nearest] = replace(
            one, count=one.count + 1, prefill_s=one.prefill_s + batch.prefill_s, decode_s=one.decode_s + batch.decode_s
        )

    def _add_routed(self, counts: Sequence[Sequence[int]]) -> None:
        if not self.routed_tokens:
            self.routed_tokens = [[0] * len(layer) for layer in counts]
        for total, layer in zip(self.routed_tokens, counts, strict=True):
            for expert, count in enumerate(layer):
                total[expert] += count

    @property
    def seconds(self) -> float:
        """Prefill and decode."""
        return sum(phase.seconds for phase in self.phases.values())

    def tokens_per_s(self) -> float:
        """Tokens generated over prefill and decode."""
        return _ratio(self.generated_tokens, self.seconds)

    def record(self, load_s: float) -> TotalsRecord:
        """Counts, seconds and rates."""
        prefill_s, decode_s = (self.phases[phase].seconds for phase in Phase)
        decoded = self.generated_tokens - self.requests  # prefill gives each its first
        return TotalsRecord(
            requests=self.requests,
            rejected_requests=self.rejected,
            failed_requests=self.failed,
            batches=self.num_batches,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            load_s=load_s,
            prefill_s=prefill_s,
            decode_s=decode_s,
            tokens_per_s=self.tokens_per_s(),
            prefill_tokens_per_s=_ratio(self.prompt_tokens, prefill_s),
            decode_tokens_per_s=_ratio(decoded, decode_s),
        )

    @property
    def workload(self) -> WorkloadRecord:
        """The lengths that the job really had."""
        return WorkloadRecord(
            prompt_len=_ratio(self.prompt_tokens, self.requests),
            max_prompt_len=self.max_prompt_tokens,
            gen_len=_ratio(self.generated_tokens, self.requests),
            max_gen_len=self.max_generated_tokens,
            asked_gen_len=_ratio(self.asked_tokens, self.requests),
            num_requests=self.requests,
        )


def memory_record(plan: MemoryPlan, peak_bytes: Mapping[str, Mapping[Purpose, int]]) -> dict[str, LevelRecord]:
    """Capacity, planned and peak bytes of each level."""

    def of_level(level: LevelPlan, peak: Mapping[Purpose, int]) -> LevelRecord:
        return LevelRecord(
            capacity_bytes=level.capacity_bytes,
            planned_bytes={purpose.value: size for purpose, size in level.purposes.items()},
            peak_bytes={purpose.value: size for purpose, size in peak.items()},
            planned_total_bytes=level.planned_bytes,
            peak_total_bytes=sum(peak.values()),
        )

    return {level.name: of_level(level, peak_bytes.get(level.name, {})) for level in (plan.gpu, plan.cpu)}


def accelerator_record(backend: AbstractBackend, pageable: tuple[str, ...]) -> AcceleratorRecord:
    """What it was run on, and what crossed the link from memory that is not pinned."""
    return AcceleratorRecord(
        name=backend.name,
        emulated=backend.is_emulated,
        description=backend.description,
        cpu_kernels=native.description(),
        h2d_bytes_per_s=backend.h2d_bytes_per_s,
        d2h_bytes_per_s=backend.d2h_bytes_per_s,
        pageable=pageable,
        library_bytes=backend.library_bytes,
    )


def versions() -> dict[str, str]:
    """Versions of what the run depends on."""
    found = {"python": platform.python_version()}
    for package in ("moe-hrm", "torch", "safetensors", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def rank_record(rank: int, generator: AbstractGenerator, totals: Totals) -> RankRecord:
    """What one of the other ranks did."""
    return RankRecord(
        rank=rank,
        load_s=generator.load_s,
        h2d_bytes_per_s=generator.backend.h2d_bytes_per_s,
        d2h_bytes_per_s=generator.backend.d2h_bytes_per_s,
        phases={phase.value: totals.phases[phase].record for phase in Phase},
        memory=memory_record(generator.plan, generator.peak_bytes),
        routed_tokens=totals.routed_tokens if generator.num_stages > 1 else [],
    )


class Counted(NamedTuple):
    """What a run did in this process, and in every other rank."""

    totals: Totals
    ranks: Sequence[RankRecord] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Beginning:
    """What is known of a run before it does anything.

    `weights` is the folder that they come from, or the model's name if they are random or from the Hub, and
    `sampling_defaults` are what requests get that do not say.
    """

    weights: str
    sampling_defaults: Mapping[str, float] = field(default_factory=dict[str, float])
    started: datetime = field(default_factory=lambda: datetime.now(UTC))


class Ending(NamedTuple):
    """How a run ended, and why if not well."""

    outcome: str = "completed"
    message: str | None = None

    @staticmethod
    def of(error: BaseException | None) -> "Ending":
        """What this made of it, if anything went wrong."""
        if error is None:
            return COMPLETED
        return Ending("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", str(error) or None)


COMPLETED: Final = Ending()


def run_record(
    generator: AbstractGenerator,
    policy_file: PolicyFile,
    counted: Counted,
    beginning: Beginning,
    *,
    ending: Ending = COMPLETED,
    schedule: ScheduleName | None = None,
    num_spans: int = 0,
) -> RunRecord:
    """All that is known of a generator's run under its own schedule or another, with so many spans in its trace."""
    totals, ranks = counted
    spec, policy = generator.arch.spec, generator.policy
    return RunRecord(
        outcome=ending.outcome,
        message=ending.message,
        notice=generator.notice or None,
        started=beginning.started.isoformat(timespec="seconds"),
        ended=datetime.now(UTC).isoformat(timespec="seconds"),
        accelerator=accelerator_record(generator.backend, generator.pageable),
        schedule=(schedule or policy.schedule).value,
        model=ModelRecord(
            name=spec.name, folder=beginning.weights, family=spec.family, parameters=spec.parameters, dtype=policy.dtype
        ),
        sampling_defaults=dict(beginning.sampling_defaults),
        totals=totals.record(generator.load_s),
        workload=totals.workload,
        phases={phase.value: totals.phases[phase].record for phase in Phase},
        memory=memory_record(generator.plan, generator.peak_bytes),
        ranks=list(ranks),
        batches=totals.batches + totals.further,
        routed_tokens=totals.routed_tokens + [layer for rank in ranks for layer in rank.routed_tokens],
        trace=TraceRecord(spans=num_spans, spans_left_out=totals.spans_left_out),
        versions=versions(),
        policy_file=policy_file,
    )


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0
