"""Experts that stream in parts: loaded to one of a few slots, computed, and overwritten by those after the next.

A micro-batch or chunk computes all parts of a layer right after what comes before the experts, so that what they are
computed from never leaves the lane. The next one loads them again.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from hrm.acts.load import Load, of_each_part
from hrm.acts.pages import pages_up_to
from hrm.contract.rings import EXPERT_SLOTS
from hrm.numeric import Number
from hrm.tasks import Act, Buffer, BufferPart, Lane, Phase, TaskId, Touch

if TYPE_CHECKING:
    from hrm.schedules.pipeline import Pipeline

PARTS = Buffer("slots for parts of experts", EXPERT_SLOTS)


def _slot(p: "Pipeline", x: TaskId) -> BufferPart:
    return PARTS.turn(p.part_number(x.step, x.layer, x.index))


def part_acts(
    phase: Phase, *, hidden: Callable[["Pipeline", TaskId], BufferPart], seconds: Callable[[Load, Number], Number]
) -> tuple[Act, Act]:
    """LOAD_PART and PART_EXPERTS of a phase; `hidden` is where a micro-batch or chunk has them after the layer."""

    def experts(p: "Pipeline", x: TaskId) -> Touch:
        whole = x._replace(index=x.index // p.parts[x.layer])
        # After the last part come norms of the layer, which are among its other weights.
        return ((_slot(p, x), *pages_up_to(p, x, p.num_pages)), (hidden(p, whole),))

    load = Act(
        letter="M",
        name="LOAD_PART",
        words="a part of a layer's experts to the GPU",
        phase=phase,
        lane=Lane.H2D,
        touches=lambda p, x: ((), (_slot(p, x),)),
        count=of_each_part,
        moves=lambda x: x.part_experts * x.costs.expert_bytes,
        seconds=lambda x, num_bytes: x.costs.load_weights(num_bytes),
        of_parts=True,
    )
    compute = Act(
        letter="G",
        name="PART_EXPERTS",
        words="a part of a layer's experts, computed on the GPU",
        phase=phase,
        lane=Lane.GPU,
        touches=experts,
        count=of_each_part,
        seconds=seconds,
        of_parts=True,
        chained=True,
    )
    return load, compute
