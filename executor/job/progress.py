"""How far a job is and how long it will take; read by live displays in another thread."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, final

from executor.batching import Batch
from executor.generate import BatchResult, Generator, NullGenerator
from executor.job.survey import Lengths
from hrm.tasks import Lane, Phase

_PRIOR: Final = 0.05  # of a phase: as long as this, a prediction weighs as much as what is measured


@dataclass(frozen=True, slots=True)
class PhaseProgress:
    """One phase over the whole job: predicted seconds, the share of it that is done, and in what.

    The share is of prompt tokens in prefill, and in decode of the tokens that were asked for, those
    that a request left out by ending early included.
    """

    predicted_s: float
    share: float
    measured_s: float

    @property
    def left_s(self) -> float:
        """Seconds still to come: the prediction, corrected by what was measured so far."""
        prior_s = _PRIOR * self.predicted_s
        done_s = self.predicted_s * self.share
        slower = (self.measured_s + prior_s) / (done_s + prior_s) if self.predicted_s else 1.0
        return self.predicted_s * (1 - self.share) * slower


@final
@dataclass(slots=True)
class JobProgress:
    """How far a job is. `tell` is called with a line that the user should see at once.

    `ended_requests` are those of finished batches and rejected ones, `earlier_requests` those that
    earlier runs answered. `wanted` and `predicted_s` are of what is left of the job when it starts.
    """

    stage: str = "reading"
    total_requests: int = 0
    earlier_requests: int = 0
    ended_requests: int = 0
    wanted: Lengths = field(default_factory=Lengths)
    predicted_s: dict[Phase, float] = field(default_factory=dict[Phase, float])
    generator: Generator | NullGenerator | None = field(default=None, repr=False)
    tell: Callable[[str], object] = field(default=lambda _: None, repr=False)
    _past: Lengths = field(default_factory=Lengths, repr=False)
    _past_s: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(Phase, 0.0))
    _past_generated: int = 0
    _batch: Lengths = field(default_factory=Lengths, repr=False)

    def begin_batch(self, batch: Batch) -> None:
        """Count a batch as under way."""
        lengths = Lengths()
        for micro_batch in batch.micro_batches:
            for placed in micro_batch.placed:
                lengths.add(placed.request)
        self._batch = lengths

    def end_batch(self, result: BatchResult) -> None:
        """Count the batch under way as finished."""
        batch, self._batch = self._batch, Lengths()
        if self.generator is not None:
            self.generator.live.clear()
        for completion in result.completions:
            self._past_generated += len(completion.tokens)
        self.ended_requests += len(result.completions)
        self._past.prompt_tokens += batch.prompt_tokens
        self._past.new_tokens += batch.new_tokens
        self._past_s[Phase.PREFILL] += result.prefill.seconds
        self._past_s[Phase.DECODE] += result.decode.seconds if result.decode else 0.0

    @property
    def done_requests(self) -> int:
        """Requests that have ended, each as it ends, those of earlier runs included."""
        ended = self.generator.live.num_ended if self.generator else 0
        return self.earlier_requests + self.ended_requests + ended

    @property
    def generated_tokens(self) -> int:
        """Tokens generated so far."""
        return self._past_generated + (self.generator.live.num_generated if self.generator else 0)

    @property
    def phase(self) -> Phase | None:
        """The phase that the present batch is in; None between batches."""
        return self.generator.live.phase if self.generator else None

    @property
    def share_of_batch(self) -> float:
        """From 0 to 1: how much of its present phase the present batch has done."""
        live = self.generator.live if self.generator else None
        phase = live.phase if live else None
        return live.share_done(phase) if live and phase is not None else 0.0

    def of_phase(self, phase: Phase) -> PhaseProgress:
        """A phase over the whole job."""
        past_s, live = self._past_s[phase], self.generator.live if self.generator else None
        share = live.share_done(phase) if live else 0.0
        if phase is Phase.PREFILL:
            past, now, all_ = (x.prompt_tokens for x in (self._past, self._batch, self.wanted))
        else:
            past, now, all_ = (x.new_tokens for x in (self._past, self._batch, self.wanted))
        now_s = live.seconds_in(phase) if live else 0.0
        done = min((past + now * share) / all_, 1.0) if all_ else 1.0
        return PhaseProgress(self.predicted_s.get(phase, 0.0), done, past_s + now_s)

    @property
    def share_done(self) -> float:
        """From 0 to 1, earlier runs included: both phases count by their predicted seconds."""
        phases = [self.of_phase(phase) for phase in Phase]
        predicted_s = sum(phase.predicted_s for phase in phases)
        done_s = sum(phase.predicted_s * phase.share for phase in phases)
        share = done_s / predicted_s if predicted_s else 0.0
        earlier = self.earlier_requests / max(self.total_requests, 1)
        return earlier + (1 - earlier) * share

    @property
    def left_s(self) -> float | None:
        """Seconds until all is done; None before the first batch, or if nothing was predicted."""
        if not self.predicted_s or self.generator is None:
            return None
        return sum(self.of_phase(phase).left_s for phase in Phase)

    @property
    def busy_s(self) -> dict[Lane, float]:
        """Seconds each lane has been at work since the job began, tasks under way included."""
        return self.generator.engine.busy_now_s if self.generator else {}
