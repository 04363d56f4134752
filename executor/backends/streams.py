"""Queues of work on a device, for lanes that hand work over instead of doing it.

A lane with a stream returns from a task when the task is queued. What has become of it is told by
marks, which are put between tasks: work in another stream can be made to wait for a mark, and so
can a thread of the host.
"""

from abc import ABC, abstractmethod
from typing import Any


class AbstractMark(ABC):
    """A place in a stream's work, reached once all that was queued before is done."""

    @abstractmethod
    def synchronise(self) -> None:
        """Return when it is reached, other threads running meanwhile; raises a device's error."""

    @abstractmethod
    def seconds_since(self, earlier: Any) -> float:
        """Seconds from when an earlier mark was reached; both must be, on the same device."""


class AbstractStream(ABC):
    """Work that is done in the order in which it was queued."""

    @abstractmethod
    def enter(self) -> None:
        """From now on what the calling thread queues goes here."""

    @abstractmethod
    def mark(self) -> AbstractMark:
        """A mark behind all that is queued now; may be asked for from any thread."""

    @abstractmethod
    def wait(self, mark: Any) -> None:
        """Do nothing that is queued from now on before the mark, another stream's, is reached."""
