"""A device without a card: streams that run on threads, late, and only as far as marks allow.

What is handed to a stream is done some time later, in order, by the stream's own thread; a stream
that waits for a mark stops until it is reached. So whatever relies on an order that no edge states
goes wrong here as it would on a card, only more often.
"""

import threading
import time
from collections.abc import Callable
from itertools import count
from queue import SimpleQueue
from random import Random

from executor.backends.streams import AbstractMark, AbstractStream

RARELY = 0.1


class DeviceError(RuntimeError):
    """What the fake's marks raise after a failure, all of them: as CUDA's errors, it sticks."""


class CountedTime:
    """A clock for the host and its device that counts how often it is read, by any thread.

    Whoever reads it later is told a later second, so it tells the order of things and nothing of how busy the machine
    that runs the tests is.
    """

    def __init__(self) -> None:
        self._readings = count(1)

    def __call__(self) -> float:
        return float(next(self._readings))

    def pass_(self, readings: int) -> None:
        """Let that many seconds go by."""
        for _ in range(readings):
            self()


class FakeMark(AbstractMark):
    def __init__(self, device: "FakeDevice") -> None:
        self.device = device
        self.reached = threading.Event()
        self.at_s = 0.0

    def reach(self) -> None:
        self.at_s = self.device.clock()
        self.reached.set()

    def synchronise(self) -> None:
        assert self.reached.wait(30), "a mark that is never reached"
        if self.device.error is not None:
            raise DeviceError("device error") from self.device.error

    def seconds_since(self, earlier: "FakeMark") -> float:
        assert self.reached.is_set()
        assert earlier.reached.is_set()
        return self.at_s - earlier.at_s


class FakeStream(AbstractStream):
    def __init__(self, device: "FakeDevice", seed: int) -> None:
        self.device = device
        self.waited: list[FakeMark] = []
        self._random = Random(seed)
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fake-stream", daemon=True)
        self._thread.start()

    def enter(self) -> None:
        self.device.current.stream = self

    def queue(self, work: Callable[[], None]) -> None:
        self._work.put(work)

    def mark(self) -> FakeMark:
        mark = FakeMark(self.device)
        self._work.put(mark.reach)
        return mark

    def wait(self, mark: FakeMark) -> None:
        self.waited.append(mark)

        def until_reached() -> None:
            assert mark.reached.wait(30), "a mark that is never reached"

        self._work.put(until_reached)

    def close(self) -> None:
        self._work.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            self.device.be_late(self._random)
            try:
                work()
            except Exception as error:  # noqa: BLE001 - what a card would report later
                self.device.error = self.device.error or error


class FakeDevice:
    """Streams that share an error; each piece of work begins up to `late_s` / RARELY late."""

    def __init__(self, late_s: float = 0.0, clock: Callable[[], float] = time.perf_counter) -> None:
        self.late_s, self.clock = late_s, clock
        self.error: Exception | None = None
        self.current = threading.local()
        self.streams: list[FakeStream] = []

    def be_late(self, random: Random) -> None:
        """Seldom, but then for long: so each stream is at times ahead of the others."""
        if self.late_s and random.random() < RARELY:
            time.sleep(random.random() * self.late_s / RARELY)

    def stream(self) -> FakeStream:
        self.streams.append(FakeStream(self, len(self.streams)))
        return self.streams[-1]

    def queue(self, work: Callable[[], None]) -> None:
        """Hand work to the calling thread's stream; without one it is done at once."""
        stream = getattr(self.current, "stream", None)
        if stream is None:
            work()
        else:
            stream.queue(work)

    def close(self) -> None:
        for stream in self.streams:
            stream.close()
