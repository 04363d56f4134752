"""What kinds of work that share the host's memory take from one another when they run at once.

Every worker runs alone, in the asked-for groups and again, round after round, so that a share is
that of two rates measured within a second or so. Threads that happen to share a core keep less,
and which do is drawn anew with every round's threads: shares are means, as over a long run.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Final

from hrm.hardware import Contention, Figure, Rate
from hrm.profiling.timing import Call, measured

MAX_ROUNDS: Final = 9
WINDOW_S: Final = 0.05  # shorter windows say little of threads that take turns

Enter = Callable[[], object]
Group = tuple[str, ...]
Rates = dict[str, float]  # calls a second of each worker


@dataclass(frozen=True, slots=True)
class Worker:
    """What one lane does over and over; `enter` is called once in its thread.

    `host_bytes` is what a call reads and writes of the host's memory.
    """

    call: Call
    enter: Enter
    host_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """What each kind of work keeps, and the bytes a second of all at once.

    `together_bytes_per_s` is that of the largest group.
    """

    kept: tuple[Contention, ...]
    together_bytes_per_s: Figure


def every_pair_and_all(names: Sequence[str]) -> list[Group]:
    """Groups of two, and one of all of them if they are more."""
    pairs = list(combinations(names, 2))
    return [*pairs, tuple(names)] if len(names) > 2 else pairs


def measure_contention(workers: Mapping[str, Worker], groups: Sequence[Group], *, budget_s: float) -> SharedMemory:
    """What each worker keeps of its rate alone in each of the groups that it is in."""
    used = sorted({name for group in groups for name in group}, key=list(workers).index)
    turns: list[Group] = [*((name,) for name in used), *groups]
    rounds = max(1, min(MAX_ROUNDS, int(budget_s / (len(turns) * WINDOW_S))))
    window_s = budget_s / (len(turns) * rounds)
    taken: list[dict[Group, Rates]] = [
        {group: run_together({name: workers[name] for name in group}, window_s) for group in turns}
        for _ in range(rounds)
    ]
    return shared_memory(workers, groups, taken)


def shared_memory(
    workers: Mapping[str, Worker], groups: Sequence[Group], rounds: Sequence[Mapping[Group, Rates]]
) -> SharedMemory:
    """Shares and sums of the rates of every round, each worker alone among them."""
    kept: list[Contention] = []
    for group in groups:
        for name in group:
            shares = [rates[group][name] / rates[name,][name] for rates in rounds]
            beside = tuple(other for other in group if other != name)
            figure = measured(fmean(shares), shares)
            kept.append(Contention(work=name, beside=beside, kept=figure))
    largest = max(groups, key=len)
    totals = [sum(rates[largest][name] * workers[name].host_bytes for name in largest) for rates in rounds]
    note = f"{', '.join(largest)} at once, each byte read or written counted"
    return SharedMemory(tuple(kept), measured(fmean(totals), totals, note))


def shared_roof(together: Figure, read: Rate) -> Rate | None:
    """The roof of all users of a memory, if they reached one.

    They did if together they got at least what can be read: below that something else held them
    back (cores, links), and the sum says nothing about the memory.
    """
    return Rate(achieved=together) if together.value >= read.planned.value else None


def run_together(workers: Mapping[str, Worker], seconds: float) -> Rates:
    """Calls a second of each worker while all of them run for `seconds`.

    Raises what a worker raises. All threads have ended when this returns or raises, also if it is
    interrupted.
    """
    rates: Rates = {}
    errors: list[Exception] = []
    start, stop = threading.Barrier(len(workers)), threading.Event()

    def work(name: str, worker: Worker) -> None:
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
