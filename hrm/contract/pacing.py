"""A link made of a memcpy and a clock: each transfer takes latency + bytes / bandwidth.

It stands in for PCIe on machines without an accelerator. The executor's emulated backend runs its
transfers through it and `hrm.profiling.link` measures it, so both see the same link.
"""

import ctypes
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final, final

BACK_TO_BACK_S: Final = 200e-6  # a gap this short is the issuing thread's, not the link's
CATCH_UP_S: Final = 5e-3  # how far behind its schedule the link may be and still catch up
EMULATED_LATENCY_S: Final = 20e-6  # of a transfer, where no machine says otherwise
LONGEST_SLEEP_S: Final = 0.1  # after which who waits looks whether there is a reason to go on
_PR_SET_TIMERSLACK: Final = 29  # of Linux


class CalledOffError(Exception):
    """What was waited for is not wanted any more."""


class _OfThread(threading.local):
    """What each thread is told apart."""

    ready_s: float | None = None

    def __init__(self) -> None:
        # Linux ends a thread's sleeps up to 50 us late unless told otherwise: nobody has to spin until they would end.
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


@final
class Waits:
    """Sleeps of other threads, to be called off by the one that hears Ctrl-C, and when what they do could have begun.

    A transfer over an emulated link of a few bytes a second may last for days. A device begins one as soon as all that
    it waits for is done, whenever a thread of the host's wakes up.
    """

    def __init__(self) -> None:
        self._called_off = threading.Event()
        self._thread = _OfThread()

    @property
    def ready_s(self) -> float | None:
        """When what the calling thread is at could have begun, on perf_counter; None if nobody has told."""
        return self._thread.ready_s

    def begin(self, ready_s: float) -> None:
        """Tell when what the calling thread begins now could have begun, had it been awake."""
        self._thread.ready_s = ready_s

    def sleep(self, seconds: float) -> None:
        """Sleep; CalledOffError if that is called off meanwhile, or was and not resumed."""
        end_s = time.perf_counter() + seconds
        while True:
            self.look()
            if seconds <= LONGEST_SLEEP_S:
                time.sleep(max(seconds, 0.0))
                return
            time.sleep(LONGEST_SLEEP_S)
            seconds = end_s - time.perf_counter()

    def look(self) -> None:
        """Raise CalledOffError if what threads wait for is called off, for those that wait for other things."""
        if self._called_off.is_set():
            raise CalledOffError

    def call_off(self) -> None:
        """End all sleeps under way, and those to come until `resume`."""
        self._called_off.set()

    def resume(self) -> None:
        """Let sleeps be sleeps again."""
        self._called_off.clear()


@final
class PacedCopy:
    """One direction of an emulated link; used by one thread at a time.

    Ends lie on an absolute schedule: a transfer starts when it is ready and the one before was due
    to end, not when that was noticed, so that wake-ups that come late do not add up.
    """

    def __init__(
        self,
        *,
        latency_s: float,
        bandwidth_bytes_per_s: float,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Emulate `latency_s` a transfer and then `bandwidth_bytes_per_s`."""
        assert latency_s >= 0
        assert bandwidth_bytes_per_s > 0
        self.latency_s = latency_s
        self.bandwidth_bytes_per_s = bandwidth_bytes_per_s
        self._clock, self._sleep = clock, sleep
        self._free_s = float("-inf")

    def seconds(self, num_bytes: float) -> float:
        """How long a transfer of that size takes."""
        return self.latency_s + num_bytes / self.bandwidth_bytes_per_s

    def run(self, copy: Callable[[], object], num_bytes: float, *, ready_s: float | None = None) -> float:
        """Call `copy`, then wait until the link would have moved `num_bytes`.

        `ready_s` is when the transfer could have started, on `clock`: queued transfers then follow
        one another without the gaps of the thread that issues them. Without it, it is now. A copy
        that is slower than the link takes as long as it takes. Returns when the transfer was due
        to end, or did end if that was later.
        """
        now_s = self._clock()
        if ready_s is None:
            ready_s = now_s if now_s - self._free_s > BACK_TO_BACK_S else self._free_s
        start_s = max(self._free_s, min(ready_s, now_s))
        end_s = start_s + self.seconds(num_bytes)
        copy()
        now_s = self._wait_until(end_s)
        self._free_s = max(end_s, now_s - CATCH_UP_S)
        return max(end_s, self._free_s)

    def _wait_until(self, end_s: float) -> float:
        while (now_s := self._clock()) < end_s:
            self._sleep(end_s - now_s)
        return now_s
