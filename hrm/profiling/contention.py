"""What all that use the host's memory at once get of it together."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from hrm.hardware import Figure, Rate
from hrm.profiling.timing import Call, measured

MAX_ROUNDS: Final = 9
WINDOW_S: Final = 0.05  # shorter windows say little of threads that take turns

Enter = Callable[[], object]
Rates = dict[str, float]  # calls a second of each worker


@dataclass(frozen=True, slots=True)
class BusyLane:
    """What one lane does over and over; `enter` is called once in its thread.

    `host_bytes` is what a call reads and writes of the host's memory.
    """

    call: Call
    enter: Enter
    host_bytes: float = 0.0


def bytes_together(workers: Mapping[str, BusyLane], *, budget_s: float) -> Figure:
    """Bytes a second that all workers at once read and write of the host's memory.

    They run round after round: threads that happen to share a core get less, and which do is drawn
    anew with every round's threads.
    """
    rounds = max(1, min(MAX_ROUNDS, int(budget_s / WINDOW_S)))
    totals: list[float] = []
    for _ in range(rounds):
        rates = run_together(workers, budget_s / rounds)
        totals.append(sum(rates[name] * worker.host_bytes for name, worker in workers.items()))
    return measured(fmean(totals), totals, f"{', '.join(workers)} at once, each byte read or written counted")


def shared_roof(together: Figure, read: Rate) -> Rate | None:
    """The roof of all users of a memory, if they reached one.

    They did if together they got at least what can be read: below that something else held them
    back (cores, links), and the sum says nothing about the memory.
    """
    return Rate(achieved=together) if together.value >= read.planned.value else None


def run_together(workers: Mapping[str, BusyLane], seconds: float) -> Rates:
    """Calls a second of each worker while all of them run for `seconds`.

    Raises what a worker raises. All threads have ended when this returns or raises, also if it is
    interrupted.
    """
    rates: Rates = {}
    errors: list[Exception] = []
    start, stop = threading.Barrier(len(workers)), threading.Event()

    def work(name: str, worker: BusyLane) -> None:
        try:
            worker.enter()
            worker.call()
            start.wait()
            calls, start_s = 0, time.perf_counter()
            while (now_s := time.perf_counter()) < start_s + seconds or calls == 0:
                if stop.is_set():
                    return
                worker.call()
                calls += 1
            rates[name] = calls / (now_s - start_s)
        except threading.BrokenBarrierError:
            pass
        except Exception as error:  # noqa: BLE001 - raised below, in the caller's thread
            errors.append(error)
            start.abort()
            stop.set()

    threads = [threading.Thread(target=work, args=item) for item in workers.items()]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:  # Ctrl-C
        stop.set()
        start.abort()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        raise
    if errors:
        raise errors[0]
    return rates
