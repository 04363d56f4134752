"""How far a job is and how long it will take; read by live displays in another thread."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final, final

from executor.batching import Batch, Completion
from executor.generate import AbstractGenerator, BatchResult
from executor.job.survey import RequestLengths
from executor.loading import Loading
from hrm.errors import HrmError
from hrm.estimate import estimate
from hrm.policy import Policy
from hrm.policy_file import PolicyFile
from hrm.tasks import Lane, Phase

_PRIOR: Final = 0.05  # of a phase: as long as this, a prediction weighs as much as what is measured
_FEW: Final = 0.01  # of a batch's requests that still go on, to tell what they all take


@dataclass(frozen=True, slots=True)
class PhaseProgress:
    """One phase over the whole job: predicted seconds, the share of it that is done, and in what.

    The share is of prompt tokens in prefill, and in decode of the time of the steps that are still
    to come if no request ends early. Before anything is measured the phase is expected to take
    `expected` times as long as predicted.
    """

    predicted_s: float
    share: float
    measured_s: float
    expected: float = 1.0

    @property
    def slower(self) -> float:
        """How many times as long as predicted it takes, by all that was measured so far."""
        if not self.predicted_s:
            return self.expected
        prior_s = _PRIOR * self.predicted_s
        measured_s = self.measured_s + self.expected * prior_s
        return measured_s / (self.predicted_s * self.share + prior_s)

    @property
    def left_s(self) -> float:
        """Seconds still to come: the prediction, corrected by what was measured so far."""
        return self.predicted_s * (1 - self.share) * self.slower


@dataclass(frozen=True, slots=True)
class Forecast:
    """Predicted seconds of both phases of a job, and what of a decode step's is for weights.

    That `fixed_share` does not depend on how many requests still go on.
    """

    seconds: dict[Phase, float]
    fixed_share: float

    @staticmethod
    def of(wanted: RequestLengths, policy: Policy, policy_file: PolicyFile) -> "Forecast | None":
        """For what is to be run under a policy; None if it cannot be predicted."""
        if not wanted.requests:
            return None
        spec, profile = policy_file.model, policy_file.profile
        try:
            workload = wanted.workload()
            whole = replace(workload, mean_gen_len=None)
            few = replace(workload, mean_gen_len=1 + _FEW * (workload.gen_len - 1))
            asked, all_active, few_active = (estimate(spec, policy, profile, one) for one in (workload, whole, few))
        except HrmError:  # a display does without
            return None
        seconds = {Phase.PREFILL: asked.prefill.seconds, Phase.DECODE: asked.decode.seconds}
        step_s = all_active.decode.seconds
        return Forecast(seconds, min(few_active.decode.seconds / step_s, 1.0) if step_s else 1.0)


@final
@dataclass(slots=True)
class JobProgress:
    """How far a job is. `tell` is called with a line that the user should see at once.

    `ended_requests` are those of finished batches and rejected ones, `earlier_requests` those that
    earlier runs answered. `wanted` and `forecast` are of what is left of the job when it starts.
    `loading` is of its weights, fetched and then loaded, before there is a generator. Where requests are run
    `elsewhere` there is none.
    """

    stage: str = "reading"
    total_requests: int = 0
    earlier_requests: int = 0
    ended_requests: int = 0
    wanted: RequestLengths = field(default_factory=RequestLengths)
    forecast: Forecast | None = None
    generator: AbstractGenerator | None = field(default=None, repr=False)
    elsewhere: bool = False
    loading: Loading = field(default_factory=Loading)
    tell: Callable[[str], object] = field(default=lambda _: None, repr=False)
    _past: RequestLengths = field(default_factory=RequestLengths, repr=False)
    _past_s: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(Phase, 0.0))
    _past_generated: int = 0
    _batch: RequestLengths = field(default_factory=RequestLengths, repr=False)

    def fetched(self, done_bytes: int, total_bytes: int) -> None:
        """So much of a model is here; then comes the job itself."""
        self.stage = "fetching" if done_bytes < total_bytes else "reading"
        self.loading.set(done_bytes, total_bytes if done_bytes < total_bytes else 0)

    def begin_batch(self, batch: Batch) -> None:
        """Count a batch as under way."""
        lengths = RequestLengths()
        for micro_batch in batch.micro_batches:
            for placed in micro_batch.placed:
                lengths.add(placed.request)
        self._batch = lengths

    def end_batch(self, result: BatchResult) -> None:
        """Count the batch under way as finished."""
        batch, self._batch = self._batch, RequestLengths()
        if self.generator is not None:
            self.generator.live.clear()
        for completion in result.completions:
            self._past_generated += len(completion.tokens)
        self.ended_requests += len(result.completions)
        self._past.prompt_tokens += batch.prompt_tokens
        self._past.new_tokens += batch.new_tokens
        self._past_s[Phase.PREFILL] += result.prefill.seconds
        self._past_s[Phase.DECODE] += result.decode.seconds if result.decode else 0.0

    def end_elsewhere(self, completion: Completion) -> None:
        """Count a request that has ended elsewhere."""
        self.ended_requests += 1
        self._past_generated += len(completion.tokens)
        self._past.add(completion.request)

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
        return live.share_done(phase, self._fixed_share) if live and phase is not None else 0.0

    @property
    def _fixed_share(self) -> float:
        return self.forecast.fixed_share if self.forecast else 1.0

    def of_phase(self, phase: Phase) -> PhaseProgress:
        """A phase over the whole job."""
        past_s, live = self._past_s[phase], self.generator.live if self.generator else None
        share = live.share_done(phase, self._fixed_share) if live else 0.0
        if phase is Phase.PREFILL:
            past, now, all_ = (x.prompt_tokens for x in (self._past, self._batch, self.wanted))
        else:
            past, now, all_ = (x.new_tokens for x in (self._past, self._batch, self.wanted))
        now_s = live.seconds_in(phase) if live else 0.0
        done = min((past + now * share) / all_, 1.0) if all_ else 1.0
        predicted_s = self.forecast.seconds[phase] if self.forecast else 0.0
        return PhaseProgress(predicted_s, done, past_s + now_s)

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
        if self.forecast is None or self.generator is None:
            return None
        prefill, decode = self.of_phase(Phase.PREFILL), self.of_phase(Phase.DECODE)
        # A machine that is slower than predicted in the one will be so in the other, until known.
        return prefill.left_s + replace(decode, expected=prefill.slower).left_s

    def left_s_elsewhere(self, elapsed_s: float) -> float | None:
        """Seconds until all is done elsewhere, where that has taken so long by now; None before the first answer."""
        done = self.of_phase(Phase.DECODE).share
        return elapsed_s * (1 - done) / done if done else None

    @property
    def busy_s(self) -> dict[Lane, float]:
        """Seconds each lane has been at work since the job began, tasks under way included."""
        return self.generator.engine.busy_now_s if self.generator else {}
