"""What sums take as tasks of ranks that do all else that decode does; `python -m executor.ranks.sums` is a rank.

On few cores a rank's other lanes come between: alone, a sum takes a part of that only.
"""

import json
import os
import sys
from typing import Final, NoReturn

import torch

from executor.backends.base import usable_cores
from executor.engine import Engine
from executor.group import Group
from executor.group.cores import own_cores
from executor.group.processes import ProcessGroup
from executor.group.store import LOOP, join_store
from executor.lanes import Handler
from hrm.acts import decode
from hrm.contract.lane_threads import lane_threads
from hrm.contract.pacing import EMULATED_LATENCY_S, PacedCopy, Waits
from hrm.policy import ScheduleName
from hrm.schedules import Pipeline, iter_tasks
from hrm.tasks import Lane, Task
from hrm.units import GB

_LAYERS, _MICRO_BATCHES, _STEPS = 4, 8, 5
_WARM_STEPS: Final = 1
_WIDTH: Final = 64  # of what tasks compute and move: as good as nothing
_LINK_BYTES_PER_S: Final = 2 * GB


def sums_beside_lanes(group: Group, num_bytes: int) -> list[float]:
    """Seconds of each sum of so many bytes in a few steps of decode whose other tasks are as short as can be."""
    waits, numbers = Waits(), torch.zeros(num_bytes // 4)
    pipeline = Pipeline(
        num_layers=_LAYERS,
        num_micro_batches=_MICRO_BATCHES,
        num_steps=_STEPS,
        kv_on_gpu=(False,) * _MICRO_BATCHES,
        streamed=(True,) * _LAYERS,
        cpu_experts=(False,) * _LAYERS,
        dense_pages=1,
        ranks=group.size,
    ).with_pages(_MICRO_BATCHES)

    def reduce(_: Task) -> int:
        group.all_reduce(numbers)
        return 0

    handlers = {act: reduce if act.reduces else _handler(act.lane, waits) for act in decode.ALL}
    with Engine(_enter_lane, waits=waits) as engine:
        spans = engine.run(iter_tasks(pipeline, ScheduleName.CGOPIPE), handlers).spans
    return [span.seconds for span in spans if span.id.act.reduces and span.id.step >= _WARM_STEPS]


def _enter_lane(lane: Lane) -> None:
    torch.set_num_threads(lane_threads("emulated", lane, usable_cores()))
    torch.set_grad_enabled(False)


def _handler(lane: Lane, waits: Waits) -> Handler:
    """A task of that lane: a product, or a transfer over an emulated link."""
    x, weight, out = (torch.zeros(_WIDTH, _WIDTH) for _ in range(3))
    link = PacedCopy(latency_s=EMULATED_LATENCY_S, bandwidth_bytes_per_s=_LINK_BYTES_PER_S, sleep=waits.sleep)

    def compute(_: Task) -> int:
        torch.mm(x, weight, out=out)
        return 0

    def move(_: Task) -> int:
        link.run(lambda: out.copy_(x), x.nbytes, ready_s=waits.ready_s)
        return x.nbytes

    return compute if lane in {Lane.GPU, Lane.CPU} else move


def _rank(port: int, rank: int, size: int, sizes: list[int]) -> NoReturn:
    with own_cores(rank, size):
        group = ProcessGroup(join_store(LOOP, port), rank, size)
        taken = {num_bytes: sums_beside_lanes(group, num_bytes) for num_bytes in sizes}
    if rank == 0:
        sys.stdout.write(json.dumps(taken))
        sys.stdout.flush()
    os._exit(0)  # a group that is alive when its process ends may abort it


if __name__ == "__main__":
    _port, _own, _size, *_sizes = map(int, sys.argv[1:])
    _rank(_port, _own, _size, _sizes)
