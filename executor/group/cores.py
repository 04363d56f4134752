"""Cores shared out among ranks: evenly, or in proportion to what each has of a pipeline's layers."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch

from hrm.contract.cores import cores_in_proportion
from hrm.profiling import environment

_STARTED_BY_TORCHRUN: Final = "TORCHELASTIC_RUN_ID"


def started_by_torchrun() -> bool:
    """Whether torchrun has started this process, as one of its ranks."""
    return _STARTED_BY_TORCHRUN in os.environ


def is_another_rank() -> bool:
    """Whether torchrun has started this process as another rank than 0."""
    return started_by_torchrun() and os.environ["RANK"] != "0"


@contextmanager
def own_cores(rank: int, shares: Sequence[float]) -> Iterator[set[int]]:
    """Within it, this thread and those that it starts keep to the share of a rank; gives those of all ranks."""
    cpus, threads = os.sched_getaffinity(0), torch.get_num_threads()
    try:
        keep_to_own(rank, shares)
        yield cpus
    finally:
        os.sched_setaffinity(0, cpus)
        torch.set_num_threads(threads)


def keep_to_own(rank: int, shares: Sequence[float]) -> None:
    """From now on, this thread and those that it starts keep to the rank's share of the cores that it may use."""
    ordered, threads = sorted(os.sched_getaffinity(0)), torch.get_num_threads()
    # What torchrun sets where the user says nothing is one thread.
    most = environment.usable_cores() if started_by_torchrun() else min(environment.usable_cores(), threads)
    own = cores_in_proportion(shares, len(ordered))[rank]
    os.sched_setaffinity(0, [ordered[index] for index in own])
    torch.set_num_threads(max(1, most * len(own) // len(ordered)))
