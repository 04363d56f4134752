"""How far the batch under way is; for live displays, which look from a thread of their own."""

from collections.abc import Sequence
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
        self._states: Sequence[BatchState] = ()
        self._prefilled: PhaseResult | None = None
        self._num_tasks = dict.fromkeys(Phase, 0)
        self._tasks_before = 0  # of prefills that are over, where several follow one another

    def begin(self, prefills: Sequence[Pipeline], decode: Pipeline, states: Sequence[BatchState] = ()) -> None:
        """Have a batch under way, or in a pipeline several; without `states`, it is known by the tasks that ended."""
        self.clear()
        self._num_tasks = {
            Phase.PREFILL: sum(each.num_layers * each.num_micro_batches for each in prefills),
            Phase.DECODE: decode.num_steps * decode.num_micro_batches,
        }
        self._states = states

    def enter(self, phase: Phase, prefilled: PhaseResult | None = None) -> None:
        """Have it in a phase, or in another prefill; `prefilled` is what the one before did."""
        if self.phase is phase:
            self._tasks_before += self._engine.count(prefill.PREFILL_LAYER)
        self._prefilled = prefilled
        self.phase = phase

    def share_done(self, phase: Phase, fixed_share: float) -> float:
        """From 0 to 1: how much of a phase is done; see BatchState.decoded_share."""
        if phase is Phase.PREFILL and self._prefilled is not None:
            return 1.0
        if phase is Phase.DECODE and self._states:
            return sum(state.decoded_share(fixed_share) for state in self._states) / len(self._states)
        if phase is not self.phase or not self._num_tasks[phase]:
            return 0.0
        if phase is Phase.PREFILL:
            done = self._tasks_before + self._engine.count(prefill.PREFILL_LAYER)
        else:
            done = self._engine.count(decode.SAMPLE)
        return min(done / self._num_tasks[phase], 1.0)

    def seconds_in(self, phase: Phase) -> float:
        """Seconds that were spent in a phase until now."""
        prefilled = self._prefilled
        if phase is Phase.PREFILL and prefilled is not None:
            return prefilled.seconds
        return self._engine.seconds if phase is self.phase else 0.0

    @property
    def num_ended(self) -> int:
        """Requests that have ended."""
        return sum(sum(map(len, state.sequences)) - state.num_active for state in self._states)

    @property
    def num_generated(self) -> int:
        """Tokens generated."""
        return sum(state.num_generated for state in self._states)
