"""Weights on their way to the GPU, page by page; the same in both phases."""

from typing import TYPE_CHECKING

from hrm.acts.load import Load
from hrm.contract.rings import STAGING_PAGES, WEIGHT_SLOTS
from hrm.numeric import Number
from hrm.tasks import Act, Buffer, BufferPart, Lane, Phase, TaskId, Touch

if TYPE_CHECKING:
    from hrm.schedules.pipeline import Pipeline

WEIGHTS = Buffer("weight slots", WEIGHT_SLOTS)
STAGING = Buffer("staging pages", STAGING_PAGES)


def pages_up_to(p: "Pipeline", x: TaskId, count: int) -> tuple[BufferPart, ...]:
    """What a task reads that needs the first `count` pages of its layer; nothing if the layer streams none."""
    if not count or not p.streamed[x.layer]:
        return ()
    return (WEIGHTS.turn(p.load_index(x.step, x.layer), count - 1),)


def _staged(p: "Pipeline", x: TaskId) -> BufferPart:
    return STAGING.turn(p.load_index(x.step, x.layer) * p.num_pages + x.index)


def _load_touches(p: "Pipeline", x: TaskId) -> Touch:
    slot = WEIGHTS.turn(p.load_index(x.step, x.layer), x.index)
    return ((_staged(p, x),) if p.staging else (), (slot,))


def _page_bytes(x: Load) -> Number:
    return x.page_bytes


def on_its_way(acts: tuple[Act, ...], p: "Pipeline") -> tuple[Act, ...]:
    """Those of a phase's `page_acts` that a page goes through, in order."""
    return acts if p.staging else acts[-1:]


def page_acts(phase: Phase) -> tuple[Act, ...]:
    """What may be done to a page of a phase, in order: STAGE_PAGE, and at last LOAD_PAGE."""
    stage = Act(
        letter="S",
        name="STAGE_PAGE",
        words="one page of weights from pageable to pinned host memory",
        phase=phase,
        lane=Lane.STAGE,
        touches=lambda p, x: ((), (_staged(p, x),)),
        count=lambda c: c.layers * c.pages * c.staging,
        moves=_page_bytes,
        of_pages=True,
        seconds=lambda x, num_bytes: x.costs.stage(num_bytes),
        host_bytes=lambda x: 2 * x.page_bytes,  # read and written
    )
    load = Act(
        letter="W",
        name="LOAD_PAGE",
        words="one page of a layer's weights to the GPU",
        phase=phase,
        lane=Lane.H2D,
        touches=_load_touches,
        count=lambda c: c.layers * c.pages,
        moves=_page_bytes,
        of_pages=True,
        seconds=lambda x, num_bytes: x.costs.load_weights(num_bytes),
    )
    return stage, load
