"""Sums over the ranks of tensor parallel, twice in each layer and once at the end; the same in both phases."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from hrm.acts.load import Counts, Load, of_a_rank
from hrm.numeric import Number
from hrm.tasks import Act, Lane, Phase, TaskId, Touch

if TYPE_CHECKING:
    from hrm.schedules.pipeline import Pipeline

Touches = Callable[["Pipeline", TaskId], Touch]
Seconds = Callable[[Load, Number], Number]


def _all_tokens_s(x: Load, _: Number) -> Number:
    return x.costs.all_reduce(x.tokens)


def _after_layers(c: Counts) -> Number:
    return c.pieces * (c.ranks > 1)


def sum_acts(
    phase: Phase,
    *,
    before: Touches,
    attended: Touches,
    last: Touches,
    attended_s: Seconds = _all_tokens_s,
    last_s: Seconds = _all_tokens_s,
    attended_by_ffn: bool = False,
) -> tuple[Act, Act, Act]:
    """REDUCE_HIDDEN, REDUCE_ATTENTION and REDUCE_LAST of a phase; what they touch, and take if not for all tokens."""

    def of(
        letter: str,
        name: str,
        where: str,
        touches: Touches,
        seconds: Seconds,
        *,
        count: Callable[[Counts], Number] = of_a_rank,
        by_ffn: bool = False,
    ) -> Act:
        return Act(
            letter=letter,
            name=name,
            words=f"hidden states {where}, summed up over ranks",
            phase=phase,
            lane=Lane.GPU,
            touches=touches,
            count=count,
            seconds=seconds,
            by_ffn=by_ffn,
            reduces=True,
            chained=True,
        )

    return (
        of("R", "REDUCE_HIDDEN", "before a layer", before, _all_tokens_s),
        of("Z", "REDUCE_ATTENTION", "with attention's output", attended, attended_s, by_ffn=attended_by_ffn),
        of("U", "REDUCE_LAST", "after the last layer", last, last_s, count=_after_layers),
    )
