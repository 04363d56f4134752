"""What stages of a pipeline hand on: each to the next, and the last one to the first."""

import threading
from abc import ABC, abstractmethod
from queue import Empty, SimpleQueue
from typing import Any, Final, Protocol, final

from torch import Tensor

from executor.group.processes import ProcessGroup
from hrm.contract.pacing import Waits

_LOOK_S: Final = 0.05  # between two looks whether waiting was called off


class Moving(Protocol):
    """A tensor on its way."""

    def wait(self) -> object:
        """Return when it is there, or has left."""
        ...


class Stages(ABC):
    """The stages of a pipeline as one of them sees them.

    What is sent under one tag comes in the order in which it was sent. Lanes may send and receive at once, each under
    tags of its own. LostRankError if the other stage is gone. What waits is called off with other `waits` of a run,
    for what it waits for may never come when this stage or another has failed.
    """

    stage: int
    size: int

    def __init__(self) -> None:
        self._leaving: dict[int, Moving] = {}
        self.waits = Waits()

    @property
    def is_first(self) -> bool:
        """Whether it begins with tokens."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether it ends with tokens."""
        return self.stage == self.size - 1

    @final
    def send(self, tensor: Tensor, tag: int) -> None:
        """Begin to send a contiguous tensor of the host to the next stage, which must not change until it has left."""
        self.has_left(tag)
        self._leaving[tag] = self._begin_to_send(tensor, tag)

    @property
    def leaving(self) -> list[int]:
        """The tags under which something may not have left."""
        return list(self._leaving)

    @final
    def has_left(self, tag: int) -> None:
        """Return when what was sent last under the tag has left."""
        leaving = self._leaving.pop(tag, None)
        if leaving is not None:
            leaving.wait()

    @abstractmethod
    def receive(self, tensor: Tensor, tag: int) -> Moving:
        """Begin to fill a contiguous tensor of the host with what the stage before sends."""

    @abstractmethod
    def _begin_to_send(self, tensor: Tensor, tag: int) -> Moving: ...


@final
class OneStage(Stages):
    """A pipeline of one stage, which hands on nothing."""

    stage, size = 0, 1

    def receive(self, tensor: Tensor, tag: int) -> Moving:
        """Never called."""
        raise AssertionError(tensor, tag)

    def _begin_to_send(self, tensor: Tensor, tag: int) -> Moving:
        raise AssertionError(tensor, tag)


@final
class ProcessStages(Stages):
    """Stages that are the ranks of a group of processes, in its order."""

    def __init__(self, group: ProcessGroup) -> None:
        super().__init__()
        self.stage, self.size, self._group = group.rank, group.size, group
        self._works = group.over_gloo("stages")

    def receive(self, tensor: Tensor, tag: int) -> Moving:
        """Begin to receive from the stage before."""
        return self._moving(self._works.recv, tensor, (self.stage - 1) % self.size, tag)

    def _begin_to_send(self, tensor: Tensor, tag: int) -> Moving:
        return self._moving(self._works.send, tensor, (self.stage + 1) % self.size, tag)

    def _moving(self, start: Any, tensor: Tensor, other: int, tag: int) -> Moving:
        assert tensor.is_contiguous()
        with self._group.telling():
            return _Moving(start([tensor], other, tag), tensor, self)

    def wait_for(self, work: Any) -> None:
        """Return when a work of gloo's has ended."""
        with self._group.telling():
            _PATIENCE.wait(work, self.waits)


@final
class _Moving:
    def __init__(self, work: Any, tensor: Tensor, stages: ProcessStages) -> None:
        self._work, self._tensor, self._stages = work, tensor, stages

    def wait(self) -> None:
        self._stages.wait_for(self._work)


@final
class _Patience(threading.local):
    """For each thread one more, in which gloo waits without end: it cannot be called off, nor asked how far it is."""

    def __init__(self) -> None:
        self._works, self._ends = SimpleQueue[Any](), SimpleQueue[BaseException | None]()
        self._is_there = False

    def wait(self, work: Any, waits: Waits) -> None:
        if not self._is_there:  # not with its queues: importing this module starts no thread
            threading.Thread(target=_serve, args=(self._works, self._ends), name="stages", daemon=True).start()
            self._is_there = True
        self._works.put(work)
        while True:
            try:
                error = self._ends.get(timeout=_LOOK_S)
            except Empty:
                waits.look()
                continue
            if error is not None:
                raise error
            return


def _serve(works: "SimpleQueue[Any]", ends: "SimpleQueue[BaseException | None]") -> None:
    while True:
        try:
            works.get().wait()
        except RuntimeError as error:
            ends.put(error)
        else:
            ends.put(None)


_PATIENCE: Final = _Patience()
