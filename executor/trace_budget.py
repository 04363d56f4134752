"""How much of a run is kept in its trace."""

from dataclasses import replace
from typing import Final, final

from hrm.policy import ScheduleName
from hrm.schedules import SCHEDULES, Pipeline

MAX_SPANS: Final = 200_000  # kept in a trace; totals are exact whatever is left out


@final
class TraceBudget:
    """How many steps of each batch's decode are kept in the trace, so that it stays small."""

    def __init__(self, max_spans: int = MAX_SPANS) -> None:
        self._left = max_spans

    def steps(self, pipeline: Pipeline, schedule: ScheduleName, num_prefill_spans: int) -> int:
        """Steps to keep of a decode phase after so many spans of prefill."""
        self._left = max(self._left - num_prefill_spans, 0)
        # No layer has more tasks than one with all that any layer has, and a step's first and last tasks.
        streamed, cpu_experts = (any(pipeline.streamed),), (any(pipeline.cpu_experts),)
        parts = (max(pipeline.parts, default=0),)
        layer = replace(pipeline, num_layers=1, num_steps=1, streamed=streamed, cpu_experts=cpu_experts, parts=parts)
        per_step = pipeline.num_layers * sum(1 for _ in SCHEDULES[schedule].order(layer))
        steps = min(self._left // per_step, pipeline.num_steps, 64)
        self._left -= steps * per_step
        return steps

    @property
    def prefill_steps(self) -> int:
        """1 while there is room for one more prefill, else 0."""
        return int(self._left > 0)
