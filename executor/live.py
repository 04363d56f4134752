"""How far the batch under way is; for live displays, which look from a thread of their own."""

from typing import final

from executor.engine import Engine, PhaseResult
from executor.handlers import BatchState
from hrm.acts import decode, prefill
from hrm.schedules import Pipeline
from hrm.tasks import Phase


@final
class LiveBatch:
    """The batch under way; everything is 0 between batches.

    `phase` is the one that it is in, None between batches.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.clear()

    def clear(self) -> None:
        """Have no batch under way any more."""
        self.phase: Phase | None = None
        self._state: BatchState | None = None
        self._prefilled: PhaseResult | None = None
        self._num_tasks = dict.fromkeys(Phase, 0)

    def begin(self, prefill: Pipeline, decode: Pipeline, state: BatchState | None = None) -> None:
        """Have a batch under way; without `state`, it is known by the tasks that have ended."""
        self.clear()
        self._num_tasks = {
            Phase.PREFILL: prefill.num_layers * prefill.num_micro_batches,
            Phase.DECODE: decode.num_steps * decode.num_micro_batches,
        }
        self._state = state

    def enter(self, phase: Phase, prefilled: PhaseResult | None = None) -> None:
        """Have it in a phase; `prefilled` is what the one before did."""
        self._prefilled = prefilled
        self.phase = phase

    def share_done(self, phase: Phase, fixed_share: float) -> float:
        """From 0 to 1: how much of a phase is done; see BatchState.decoded_share."""
        if phase is Phase.PREFILL and self._prefilled is not None:
            return 1.0
        state = self._state
        if phase is Phase.DECODE and state is not None:
            return state.decoded_share(fixed_share)
        if phase is not self.phase or not self._num_tasks[phase]:
            return 0.0
        act = prefill.PREFILL_LAYER if phase is Phase.PREFILL else decode.SAMPLE
        return min(self._engine.count(act) / self._num_tasks[phase], 1.0)

    def seconds_in(self, phase: Phase) -> float:
        """Seconds that were spent in a phase until now."""
        prefilled = self._prefilled
        if phase is Phase.PREFILL and prefilled is not None:
            return prefilled.seconds
        return self._engine.seconds if phase is self.phase else 0.0

    @property
    def num_ended(self) -> int:
        """Requests that have ended."""
        state = self._state
        return 0 if state is None else sum(map(len, state.sequences)) - state.num_active

    @property
    def num_generated(self) -> int:
        """Tokens generated."""
        return 0 if self._state is None else self._state.num_generated
