"""Real processes as ranks: a function is called in each, and what all return comes back."""

import multiprocessing
from multiprocessing.connection import Connection

import torch

from executor.group.processes import ProcessGroup
from executor.group.store import LOOP, join_store, open_store

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["executor.group.processes"])


def in_ranks(size, function, *arguments):
    """What `function(group, *arguments)` returns in each of so many processes."""
    _store, port = open_store()
    ends = [_CONTEXT.Pipe() for _ in range(size)]
    processes = [
        _CONTEXT.Process(target=_rank, args=(port, rank, size, ends[rank][1], function, arguments), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    try:
        return [own.recv() for own, _ in ends]
    finally:
        for process in processes:
            process.join()


def _rank(port: int, rank: int, size: int, answers: Connection, function, arguments) -> None:
    torch.set_num_threads(1)
    group = ProcessGroup(join_store(LOOP, port), rank, size)
    answers.send(function(group, *arguments))
    group.close()
