"""A rank other than 0: runs what rank 0 tells it until there is no more."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NoReturn, Protocol

from executor.generate import AbstractGenerator, BatchResult
from executor.group.processes import ProcessGroup
from executor.group.store import join_store
from executor.ranks.messages import REPORT, RankBatch
from executor.ranks.signs import keep_telling, say_farewell


class Rank(Protocol):
    """What runs batches as rank 0 says, and tells of them in the end."""

    generator: AbstractGenerator

    def add(self, result: BatchResult, /) -> None:
        """Count a batch that was run."""
        ...

    def report(self) -> bytes:
        """What rank 0 is told of all since it was last told."""
        ...


Open = Callable[[bytes, ProcessGroup], Rank]  # given what rank 0 tells of the job, on the cores that all may use

_PR_SET_PDEATHSIG: Final = 1


def serve(open_rank: Open) -> NoReturn:
    """Be the rank that the environment names, and end the process when rank 0 has no more to run.

    Why it ends before, if it must, it says in the store where the ranks met.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    code = 0
    try:
        _serve(open_rank, rank, size, host, port)
    except BaseException as error:  # noqa: BLE001 - told by rank 0
        say_farewell(join_store(host, port), rank, error)
        code = 1
    # Lanes may wait for ranks that are gone, and gloo for its own threads.
    sys.stdout.flush()
    os._exit(code)


def _serve(open_rank: Open, rank: int, size: int, host: str, port: int) -> None:
    under_way: list[AbstractGenerator] = []
    keep_telling(join_store(host, port), rank, lambda: under_way[0] if under_way else None)
    group = ProcessGroup(join_store(host, port), rank, size)
    served = open_rank(group.broadcast(), group)
    generator = served.generator
    under_way.append(generator)
    group.collect(str(generator.policy.staging).encode())
    with generator:
        generator.warm_up()
        while message := group.broadcast():
            if message == REPORT:
                group.collect(served.report())
                continue
            one = RankBatch.decode(message)
            served.add(generator.generate(one.batch, index=one.index, schedule=one.schedule))


def end_with_parent() -> None:
    """Have this process end when the one that started it does, whose pipe is its standard input."""
    with suppress(OSError, AttributeError):  # the pipe does it too, but for a process that hangs
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()
