"""What one more operator costs however small it is, on the thread that issues it."""

import threading
from typing import Any, Final

import torch
from torch.nn import functional

from hrm.profiling.timing import Call, Sampler, Timing, time_call

HIDDEN: Final = 64
ROWS: Final = 2


def operator_round(device: str = "cpu") -> tuple[Call, int]:
    """A call that runs the small operators a layer is made of, and how many there are."""
    x = torch.randn(ROWS, HIDDEN, device=device)
    weight, norm = torch.randn(HIDDEN, HIDDEN, device=device), torch.randn(HIDDEN, device=device)
    gate, up = torch.randn(ROWS, HIDDEN, device=device), torch.randn(ROWS, HIDDEN, device=device)
    out, gathered = torch.empty_like(x), torch.empty_like(x)
    rows = torch.arange(ROWS, device=device)
    norms: Any = torch.linalg

    def call() -> None:
        length = norms.vector_norm(x, dim=-1, keepdim=True)
        torch.mul(x, norm, out=out)
        out.div_(length)
        torch.mm(out, weight, out=gathered)
        torch.index_select(x, 0, rows, out=gathered)
        torch.mm(gathered, weight, out=out)
        functional.silu(gate.narrow(1, 0, HIDDEN // 2), inplace=True)
        out.mul_(up)
        gathered.index_add_(0, rows, out)
        gathered.copy_(out)

    return call, 10


def launch_latency(
    *, device: str = "cpu", budget_s: float, sampler: Sampler | None = None
) -> Timing:
    """Seconds an operator, averaged over those of a layer."""
    call, count = operator_round(device)
    with torch.inference_mode():
        timing = time_call(call, budget_s=budget_s, sampler=sampler)
    return Timing(
        timing.median_s / count, timing.p20_s / count, timing.p80_s / count, timing.samples
    )


def launch_latency_beside_another(
    *, budget_s: float, threads: tuple[int, int], device: str = "cpu"
) -> Timing:
    """The same for one thread while another issues operators too, as two busy lanes do.

    `threads` is how many of torch's threads each of the two may use.
    """
    busy, stop = threading.Event(), threading.Event()

    def other() -> None:
        torch.set_num_threads(threads[1])
        call, _ = operator_round()
        with torch.inference_mode():
            while not stop.is_set():
                call()
                busy.set()

    found: list[Timing] = []

    def measure() -> None:
        torch.set_num_threads(threads[0])
        found.append(launch_latency(budget_s=budget_s, device=device))

    beside, measuring = threading.Thread(target=other), threading.Thread(target=measure)
    beside.start()
    try:
        busy.wait()
        measuring.start()
        measuring.join()
    finally:
        stop.set()
        beside.join()
    return found[0]
