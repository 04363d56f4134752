"""An act of one's own, added from outside as CONTRIBUTING says: a look at hidden states after every layer."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Final

import pytest

from hrm.acts import ACTS, NAMES, add_act, decode
from hrm.policy import ScheduleName
from hrm.schedules import SCHEDULES, Pipeline, Schedule, StepWork, add_schedule
from hrm.schedules.bounds import Terms
from hrm.tasks import Act, Lane, Phase, TaskId

CHECK_S: Final = 3e-4
CHECK_BYTES: Final = 8  # of a token
CHECK: Final = Act(
    letter="G",
    name="CHECK_HIDDEN",
    words="a sum over hidden states, to the host",
    phase=Phase.DECODE,
    lane=Lane.D2H,
    touches=lambda p, x: (((decode.HIDDEN, x.index, x.step * (p.num_layers + 1) + x.layer + 1, 0),), ()),
    count=lambda c: c.layers * c.pieces,
    moves=lambda x: CHECK_BYTES * x.tokens,
    seconds=lambda _, __: CHECK_S,
)


@contextmanager
def checked(
    monkeypatch: pytest.MonkeyPatch, order: Callable[[Pipeline], Iterator[TaskId]], terms: Callable[[StepWork], Terms]
) -> Generator[ScheduleName]:
    """The act and a schedule `checked` that issues it, both known meanwhile."""

    def with_checks(p: Pipeline) -> Iterator[TaskId]:
        for task in order(p):
            yield task
            if task.act is decode.POST_ATTENTION:
                yield task._replace(act=CHECK)

    monkeypatch.setitem(ACTS, Phase.DECODE, decode.ALL)
    monkeypatch.setitem(NAMES, CHECK.name, CHECK.letter)
    add_act(CHECK)
    name = add_schedule("checked", Schedule(with_checks, terms))
    try:
        yield name
    finally:
        del SCHEDULES[name]
