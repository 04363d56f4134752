"""Ranks as threads of one process, each with its own generator: what they compute, without a process to start."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from executor.backends import make_backend
from executor.checkpoint import Checkpoint
from executor.families import family_for
from executor.generate import Generator, Planned
from executor.group import Group
from executor.group.processes import ProcessGroup
from hrm.memory import plan_memory
from hrm.parallel import part_for
from hrm.policy import Policy
from tests.executor.runtime.support import architecture, emulated, link, machine

Made = Callable[[Generator, Group], Any]


def with_ranks(folder: Path, policy: Policy, size: int, use: Made, *, is_emulated: bool = False) -> list[Any]:
    """What `use` returns of each rank's generator."""
    store, one = HashStore(), machine()
    profile = replace(one, num_gpus=size, links=(*one.links, link("gpu", "gpu", 1e10, kind="peer")))
    plan = plan_memory(architecture(folder).spec, policy, profile)

    def run(rank: int) -> Any:
        torch.set_num_threads(1)
        group = ProcessGroup(store, rank, size)
        with Checkpoint.open(folder) as checkpoint:
            family = family_for(checkpoint.config, checkpoint.config_path)
            arch = family.architecture(checkpoint.config, checkpoint.config_path)
            part = part_for(policy, arch.spec, profile)
            backend = emulated(part.profile) if is_emulated else make_backend("cpu", None)
            arch, planned = arch.of_rank(rank, part.spec), Planned(policy, plan)
            made = Generator(backend, arch, planned, family=family, source=checkpoint, group=group)
        with made:
            found = use(made, group)
        group.close()
        return found

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
