"""Handlers of acts that `hrm.acts.add_act` made known, beside those of `prefill` and `decode`."""

from collections.abc import Callable
from typing import Any, Final

from executor.lanes import Handler
from hrm.tasks import Act, Phase

# Given the PrefillHandlers or DecodeHandlers of a batch, whose memory, state and backend it works with.
MakeHandler = Callable[[Any], Handler]
HANDLERS: Final[dict[Act, MakeHandler]] = {}


def add_handler(act: Act, make: MakeHandler) -> None:
    """Say what tasks of an act of one's own do: `make` is called once a batch, with the handlers of the act's phase."""
    HANDLERS[act] = make


def added(handlers: object, phase: Phase) -> dict[Act, Handler]:
    """The handlers that were added for acts of a phase."""
    return {act: make(handlers) for act, make in HANDLERS.items() if act.phase is phase}
