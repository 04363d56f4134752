"""Real processes as ranks: a function is called in each, and what all return comes back."""

import multiprocessing
from contextlib import suppress
from multiprocessing.connection import Connection

import torch

from executor.group.processes import ProcessGroup
from executor.group.store import LOOP, join_store, open_store

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["executor.job.rank"])


def in_ranks(size, function, *arguments, timeout=60.0):
    """What `function(group, *arguments)` returns in each of so many processes; None of one that ended before."""
    _store, port = open_store()
    ends = [CONTEXT.Pipe() for _ in range(size)]
    processes = [
        CONTEXT.Process(target=_rank, args=(port, rank, size, timeout, ends[rank][1], function, arguments))
        for rank in range(size)
    ]
    for process, (_, other) in zip(processes, ends, strict=True):
        process.start()
        other.close()
    found = []
    for own, _ in ends:
        found.append(None)
        with suppress(EOFError):
            found[-1] = own.recv()
    for process in processes:  # not before all is here: tensors come out of their memory
        process.kill()
        process.join()
    return found


def _rank(port: int, rank: int, size: int, timeout: float, answers: Connection, function, arguments) -> None:
    torch.set_num_threads(1)
    group = ProcessGroup(join_store(LOOP, port), rank, size, timeout=timeout)
    answers.send(function(group, *arguments))
    answers.poll(None)
