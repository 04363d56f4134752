"""What running tasks takes of a rank, and sums among its tasks; `python -m executor.ranks.measured` is a rank.

On few cores a rank's lanes come between one another: alone, a sum takes a part of that only.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Final, NoReturn

import torch

from executor.backends.base import usable_cores
from executor.engine import Engine, PhaseResult
from executor.group import Group
from executor.group.cores import own_cores
from executor.group.processes import ProcessGroup
from executor.group.store import LOOP, join_store
from executor.lanes import Handler
from hrm.acts import ACTS
from hrm.contract.lane_threads import lane_threads
from hrm.contract.pacing import EMULATED_LATENCY_S, PacedCopy, Waits
from hrm.policy import ScheduleName
from hrm.schedules import Pipeline, iter_tasks
from hrm.tasks import Act, Lane, Phase, Task
from hrm.units import GB

_LAYERS, _MICRO_BATCHES, _STEPS = 4, 8, 5
_WARM_STEPS: Final = 1
_RUNS: Final = 9  # of as many steps of tasks that do next to nothing
_WIDTH, _LEAST = 64, 8  # of what tasks compute and move, beside sums and alone
_LINK_BYTES_PER_S: Final = 2 * GB


def sums_beside_lanes(group: Group, num_bytes: int) -> list[float]:
    """Seconds of each sum of so many bytes in a few steps of decode whose other tasks are as short as can be."""
    waits, numbers = Waits(), torch.zeros(num_bytes // 4)

    def reduce(_: Task) -> int:
        group.all_reduce(numbers)
        return 0

    handlers = {act: reduce if act.reduces else _handler(act.lane, waits, _WIDTH) for act in ACTS[Phase.DECODE]}
    spans = _runner(group.size, handlers, waits)().spans
    return [span.seconds for span in spans if span.id.act.reduces and span.id.step >= _WARM_STEPS]


def seconds_a_task() -> list[float]:
    """Seconds of the processor that all threads take for a task that computes or moves next to nothing, run by run."""
    waits, taken = Waits(), list[float]()
    run = _runner(1, {act: _handler(act.lane, waits, _LEAST) for act in ACTS[Phase.DECODE]}, waits)
    for _ in range(_RUNS + 1):
        start_s = time.process_time()
        result = run()
        taken.append((time.process_time() - start_s) / len(result.spans))
    return taken[1:]


def _runner(ranks: int, handlers: Mapping[Act, Handler], waits: Waits) -> Callable[[], PhaseResult]:
    """Runs a few steps of decode of one of so many ranks, with attention on the CPU and weights in pages."""
    pipeline = Pipeline(
        num_layers=_LAYERS,
        num_micro_batches=_MICRO_BATCHES,
        num_steps=_STEPS,
        kv_on_gpu=(False,) * _MICRO_BATCHES,
        streamed=(True,) * _LAYERS,
        cpu_experts=(False,) * _LAYERS,
        dense_pages=1,
        ranks=ranks,
    ).with_pages(_MICRO_BATCHES)

    def run() -> PhaseResult:
        with Engine(_enter_lane, waits=waits) as engine:
            return engine.run(iter_tasks(pipeline, ScheduleName.CGOPIPE), handlers)

    return run


def _enter_lane(lane: Lane) -> None:
    torch.set_num_threads(lane_threads("emulated", lane, usable_cores()))
    torch.set_grad_enabled(False)


def _handler(lane: Lane, waits: Waits, width: int) -> Handler:
    """A task of that lane: a product, or a transfer over an emulated link."""
    x, weight, out = (torch.zeros(width, width) for _ in range(3))
    link = PacedCopy(latency_s=EMULATED_LATENCY_S, bandwidth_bytes_per_s=_LINK_BYTES_PER_S, sleep=waits.sleep)

    def compute(_: Task) -> int:
        torch.mm(x, weight, out=out)
        return 0

    def move(_: Task) -> int:
        link.run(lambda: out.copy_(x), x.nbytes, ready_s=waits.ready_s)
        return x.nbytes

    return compute if lane.computes else move


def _rank(port: int, rank: int, size: int, sizes: list[int]) -> NoReturn:
    """Write JSON: seconds of sums of each of the sizes, or of tasks if there are none, which a rank is asked alone."""
    with own_cores(rank, [1] * size):
        if sizes:
            group = ProcessGroup(join_store(LOOP, port), rank, size)
            told: object = {num_bytes: sums_beside_lanes(group, num_bytes) for num_bytes in sizes}
        else:
            told = seconds_a_task()
    if rank == 0:
        sys.stdout.write(json.dumps(told))
        sys.stdout.flush()
    os._exit(0)  # a group that is alive when its process ends may abort it


if __name__ == "__main__":
    _port, _own, _size, *_sizes = map(int, sys.argv[1:])
    _rank(_port, _own, _size, _sizes)
