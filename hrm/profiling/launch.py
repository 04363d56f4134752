"""What one more operator costs however small it is, on the thread that issues it."""

import threading
import time
from typing import Any, Final

import torch
from torch.nn import functional

from hrm.profiling.timing import MIN_SAMPLES, Call, Latency, Sampler, time_each

HIDDEN: Final = 64
ROWS: Final = 2
LONG_HIDDEN: Final = 256
LONG_ROWS: Final = 16
LOCK_TURNS_S: Final = 0.02  # a thread keeps the interpreter lock for 5 ms if none asks for it
STARTS: Final = 4  # of threads: how they take turns may differ from one to the next


def operator_round(device: str = "cpu", *, rows: int = ROWS, hidden: int = HIDDEN) -> tuple[Call, int]:
    """A call that runs the small operators a layer is made of, and how many there are."""
    x = torch.randn(rows, hidden, device=device)
    weight, norm = torch.randn(hidden, hidden, device=device), torch.randn(hidden, device=device)
    gate, up = torch.randn(rows, hidden, device=device), torch.randn(rows, hidden, device=device)
    out, gathered = torch.empty_like(x), torch.empty_like(x)
    tokens = torch.arange(rows, device=device)
    norms: Any = torch.linalg

    def call() -> None:
        length = norms.vector_norm(x, dim=-1, keepdim=True)
        torch.mul(x, norm, out=out)
        out.div_(length)
        torch.mm(out, weight, out=gathered)
        torch.index_select(x, 0, tokens, out=gathered)
        torch.mm(gathered, weight, out=out)
        functional.silu(gate.narrow(1, 0, hidden // 2), inplace=True)
        out.mul_(up)
        gathered.index_add_(0, tokens, out)
        gathered.copy_(out)

    return call, 10


def launch_latency(*, device: str = "cpu", budget_s: float, sampler: Sampler | None = None) -> Latency:
    """Seconds an operator, averaged over those of a layer."""
    call, count = operator_round(device)
    with torch.inference_mode():
        samples = time_each({None: call}, budget_s=budget_s, sampler=sampler)[None]
    return Latency.of([seconds / count for seconds in samples])


def launch_latency_beside_another(*, budget_s: float, threads: tuple[int, int]) -> Latency:
    """Seconds an operator while another lane's thread issues operators too, on the CPU.

    Threads hand Python's interpreter lock to one another at every operator, which costs far more
    than issuing one. It is measured with operators long enough for that to happen, as what they
    take more than without the other lane, and added to `launch_latency`. `threads` is how many of
    torch's threads each of the two may use.
    """
    alone = launch_latency(budget_s=budget_s / 4)
    lone = Latency.of(_long_operators(budget_s / 4, threads[0]))
    both = Latency.of(
        [seconds for _ in range(STARTS) for seconds in _long_operators_beside_another(budget_s / 2 / STARTS, threads)]
    )

    def with_hand_over(seconds: float) -> float:
        return alone.median_s + max(0.0, seconds - lone.median_s)

    return Latency(with_hand_over(both.median_s), with_hand_over(both.p20_s), with_hand_over(both.p80_s), both.samples)


def _long_operators_beside_another(budget_s: float, threads: tuple[int, int]) -> list[float]:
    """Seconds an operator while another thread issues operators too."""
    busy, stop = threading.Event(), threading.Event()

    def other() -> None:
        torch.set_num_threads(threads[1])
        call, _ = operator_round(rows=LONG_ROWS, hidden=LONG_HIDDEN)
        with torch.inference_mode():
            while not stop.is_set():
                call()
                busy.set()

    beside = threading.Thread(target=other)
    beside.start()
    try:
        busy.wait()
        return _long_operators(budget_s, threads[0])
    finally:
        stop.set()
        beside.join()


def _long_operators(budget_s: float, threads: int) -> list[float]:
    """Seconds an operator in a thread of its own, over samples longer than a turn of the lock."""
    found: list[float] = []
    stop = threading.Event()

    def measure() -> None:
        torch.set_num_threads(threads)
        call, count = operator_round(rows=LONG_ROWS, hidden=LONG_HIDDEN)
        with torch.inference_mode():
            call()
            samples: list[float] = []
            end_s = time.perf_counter() + budget_s
            while len(samples) < MIN_SAMPLES or time.perf_counter() < end_s:
                if stop.is_set():
                    return
                start_s, calls = time.perf_counter(), 0
                while (seconds := time.perf_counter() - start_s) < LOCK_TURNS_S:
                    call()
                    calls += 1
                samples.append(seconds / calls / count)
        found.extend(samples)

    measuring = threading.Thread(target=measure)
    measuring.start()
    try:
        measuring.join()
    finally:  # on Ctrl-C it has not ended by itself
        stop.set()
        measuring.join()
    return found
