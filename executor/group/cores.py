"""Cores shared out among ranks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from executor.group.base import share_of
from hrm.profiling import environment

_STARTED_BY_TORCHRUN: Final = "TORCHELASTIC_RUN_ID"


def started_by_torchrun() -> bool:
    """Whether torchrun has started this process, as one of its ranks."""
    return _STARTED_BY_TORCHRUN in os.environ


def is_another_rank() -> bool:
    """Whether torchrun has started this process as another rank than 0."""
    return started_by_torchrun() and os.environ["RANK"] != "0"


@contextmanager
def own_cores(rank: int, size: int) -> Iterator[set[int]]:
    """Within it, this thread and those that it starts keep to the rank's share; gives those of all ranks."""
    cpus, threads = os.sched_getaffinity(0), torch.get_num_threads()
    # What torchrun sets where the user says nothing is one thread.
    most = environment.usable_cores() if started_by_torchrun() else min(environment.usable_cores(), threads)
    ordered, share = sorted(cpus), share_of(rank, size, len(cpus))
    try:
        os.sched_setaffinity(0, [ordered[index] for index in share] or [ordered[rank % len(ordered)]])
        torch.set_num_threads(max(1, most // size))
        yield cpus
    finally:
        os.sched_setaffinity(0, cpus)
        torch.set_num_threads(threads)
