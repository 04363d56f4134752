"""Tasks for tests of what runs or simulates any graph: of acts that are there, or of ones made up for a lane."""

from functools import cache

from hrm.acts import ACTS, NAMES
from hrm.tasks import Act, Lane, Phase, Task, TaskId

EVERY_ACT = tuple(act for acts in ACTS.values() for act in acts)


@cache
def act(name: str, lane: Lane | None = None, phase: Phase = Phase.DECODE) -> Act:
    """The act of that name, of that phase if there is one; a lane that it never has makes another act."""
    for known in (*ACTS[phase], *EVERY_ACT):
        if known.name == name and lane in {None, known.lane}:
            return known
    assert lane is not None
    return Act(letter=NAMES[name], name=name, words=name, phase=phase, lane=lane, ends_step=name == "SAMPLE")


def a_task(
    name: str,
    layer: int = 0,
    index: int = 0,
    step: int = 0,
    *,
    lane: Lane | None = None,
    after: tuple[TaskId, ...] = (),
) -> Task:
    """A task that touches nothing."""
    return Task(TaskId(act(name, lane), layer, index, step), after)
