"""What work on several lanes takes from one another when all run at once."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hrm.profiling.timing import Call

Enter = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Worker:
    """What one lane does over and over; `enter` is called once in its thread."""

    call: Call
    enter: Enter


def measure_contention(workers: Mapping[str, Worker], *, budget_s: float) -> dict[str, float]:
    """For each worker, its rate with all at work as a share of its rate alone."""
    share_s = budget_s / (len(workers) + 1)
    alone = {name: _rates({name: worker}, share_s)[name] for name, worker in workers.items()}
    together = _rates(workers, share_s)
    return {name: together[name] / alone[name] for name in workers}


def _rates(workers: Mapping[str, Worker], seconds: float) -> dict[str, float]:
    """Calls a second of each worker while all of them run for `seconds`."""
    rates: dict[str, float] = {}
    errors: list[Exception] = []
    start = threading.Barrier(len(workers))

    def work(name: str, worker: Worker) -> None:
        try:
            worker.enter()
            worker.call()
            start.wait()
            calls, start_s = 0, time.perf_counter()
            while (now_s := time.perf_counter()) < start_s + seconds or calls == 0:
                worker.call()
                calls += 1
            rates[name] = calls / (now_s - start_s)
        except threading.BrokenBarrierError:
            pass
        except Exception as error:  # noqa: BLE001 - raised below, in the caller's thread
            errors.append(error)
            start.abort()

    threads = [threading.Thread(target=work, args=item) for item in workers.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return rates
