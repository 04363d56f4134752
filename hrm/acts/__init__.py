"""The kinds of task that there are, one file for each phase and one for the pages of weights of both.

An act is added as a value of `Act` in the tuple of its phase, and issued by an order of `hrm.schedules`. What it waits
for, which lane it is busy in, and what that adds to the closed form and to the simulation follow from it.
"""

from typing import Final, NamedTuple

from hrm.acts import decode, prefill
from hrm.acts.load import Counts, Load
from hrm.tasks import Act, Lane, Phase

__all__ = [
    "ACTS",
    "NAMES",
    "WEIGHT_ACTS",
    "Counts",
    "Load",
    "WeightActs",
    "act_named",
    "add_act",
    "decode",
    "prefill",
    "waits_for_ranks",
]

ACTS: Final[dict[Phase, tuple[Act, ...]]] = {Phase.PREFILL: prefill.ALL, Phase.DECODE: decode.ALL}
# What each kind of task is called in files and legends: acts that differ by phase or lane only share one letter.
NAMES: Final = {act.name: act.letter for act in (*decode.ALL, *prefill.ALL)}


class WeightActs(NamedTuple):
    """The acts of a phase by which weights move: of pages in order, and of parts of experts."""

    pages: tuple[Act, ...]
    load_part: Act
    part_experts: Act


WEIGHT_ACTS: Final = {
    Phase.PREFILL: WeightActs(prefill.PAGES, prefill.LOAD_PART, prefill.PART_EXPERTS),
    Phase.DECODE: WeightActs(decode.PAGES, decode.LOAD_PART, decode.PART_EXPERTS),
}
_RECEIVE: Final = frozenset({prefill.EMBED, decode.EMBED})  # from another stage, in a pipeline


def waits_for_ranks(act: Act, *, in_pipeline: bool) -> bool:
    """Whether ranks wait for one another in its tasks: in sums, in the choice of tokens, in what a stage receives."""
    return act.reduces or act.ends_step or (in_pipeline and act in _RECEIVE)


def add_act(act: Act) -> None:
    """Make a kind of task of one's own known, which orders may then issue; to run it, it needs a handler."""
    ACTS[act.phase] = (*ACTS[act.phase], act)
    NAMES[act.name] = act.letter


def act_named(phase: Phase, name: str, lane: Lane) -> Act:
    """The act that files call so; attention goes by one name in either lane. KeyError if there is none."""
    for act in ACTS[phase]:
        if act.name == name and act.lane is lane:
            return act
    raise KeyError(name)
