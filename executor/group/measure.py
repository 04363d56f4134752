"""What sums between ranks of this machine take, for profiles of it; `python -m executor.group.measure` is a rank."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn

import torch

from executor.errors import RunError
from executor.group.cores import own_cores
from executor.group.processes import ProcessGroup
from executor.group.store import LOOP, join_store, open_store

_WARM: Final = 20
_SAMPLES: Final = 200
_AT_MOST_S: Final = 60.0


def sums_between(ranks: int, sizes: Sequence[int]) -> Mapping[int, Sequence[float]]:
    """Seconds of sums of so many bytes between so many ranks, a process each, which share out the cores.

    Raises RunError if one of them fails.
    """
    _store, port = open_store()  # is closed when nobody has it
    command = [sys.executable, "-m", __name__, str(port), str(ranks), *map(str, sizes)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            rank_command = [*command[:4], str(rank), *command[4:]]
            processes.append(subprocess.Popen(rank_command, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        told, failed = processes[0].communicate(timeout=_AT_MOST_S)
        if processes[0].returncode:
            raise RunError("sums between ranks", f"<{failed.decode(errors='replace')[-200:]}>", "failed", "try again")
        return {int(size): seconds for size, seconds in json.loads(told).items()}
    except subprocess.TimeoutExpired as error:
        raise RunError("sums between ranks", f"<none in {_AT_MOST_S:g} s>", "must end", "try again") from error
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _rank(port: int, rank: int, size: int, sizes: Sequence[int]) -> NoReturn:
    taken: dict[int, list[float]] = {}
    with own_cores(rank, size):
        group = ProcessGroup(join_store(LOOP, port), rank, size)
        for num_bytes in sizes:
            numbers, seconds = torch.zeros(num_bytes // 4), list[float]()
            for _ in range(_WARM + _SAMPLES):
                start_s = time.perf_counter()
                group.all_reduce(numbers)
                seconds.append(time.perf_counter() - start_s)
            taken[num_bytes] = seconds[_WARM:]
    if rank == 0:
        sys.stdout.write(json.dumps(taken))
        sys.stdout.flush()
    os._exit(0)  # a group that is alive when its process ends may abort it


if __name__ == "__main__":
    _port, _own, _size, *_sizes = map(int, sys.argv[1:])
    _rank(_port, _own, _size, _sizes)
