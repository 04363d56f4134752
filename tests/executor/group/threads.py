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
from executor.generate import Generator, Planned, Prepared
from executor.group import Group
from executor.group.processes import ProcessGroup
from executor.group.stages import ProcessStages
from executor.under_way import Peers
from executor.weight_pages import StoredWeights
from hrm.hardware import HardwareProfile
from hrm.memory import plan_memory
from hrm.parallel import part_for, ranks_of
from hrm.policy import Parallelism, Policy
from tests.executor.runtime.support import architecture, emulated, link, machine

Made = Callable[[Generator, Group], Any]


def _of_gpus(count: int) -> HardwareProfile:
    one = machine()
    return replace(one, num_gpus=count, links=(*one.links, link("gpu", "gpu", 1e10, kind="peer")))


def with_ranks(folder: Path, policy: Policy, size: int, use: Made, *, accelerator: str = "cpu") -> list[Any]:
    """What `use` returns of each rank's generator; all have the same accelerator."""
    store, profile = HashStore(), _of_gpus(size)
    plan = plan_memory(architecture(folder).spec, policy, profile)

    def run(rank: int) -> Any:
        torch.set_num_threads(1)
        group = ProcessGroup(store, rank, size)
        with Checkpoint.open(folder) as checkpoint:
            family = family_for(checkpoint.config, checkpoint.config_path)
            arch = family.architecture(checkpoint.config, checkpoint.config_path)
            part = part_for(policy, arch.spec, profile)
            backend = emulated(part.profile) if accelerator == "emulated" else make_backend(accelerator, None)
            arch, planned = arch.of_rank(rank, part.spec), Planned(policy, plan)
            made = Generator(Prepared(backend, planned), arch, StoredWeights(checkpoint, family), peers=Peers(group))
        with made:
            found = use(made, group)
        group.close()
        return found

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def with_stages(
    folder: Path, policy: Policy, lengths: tuple[int, ...], use: Callable[[Generator], Any], **options: Any
) -> list[Any]:
    """What `use` returns of each stage's generator; the policy's layers are those of the whole model."""
    size = len(lengths)
    store, profile = HashStore(), _of_gpus(size)

    def run(stage: int) -> Any:
        torch.set_num_threads(1)
        group = ProcessGroup(store, stage, size)
        with Checkpoint.open(folder) as checkpoint:
            family = family_for(checkpoint.config, checkpoint.config_path)
            arch = family.architecture(checkpoint.config, checkpoint.config_path)
            whole = replace(policy, parallelism=Parallelism.PIPELINE, stage_lengths=lengths)
            share = ranks_of(whole, arch.spec, profile)[stage]
            spec, own = share.part.spec, share.policy
            backend = emulated(share.part.profile) if options.get("is_emulated") else make_backend("cpu", None)
            made = Generator(
                Prepared(backend, Planned(own, plan_memory(spec, own, share.part.profile))),
                arch.of_stage(spec, sum(lengths[:stage])),
                StoredWeights(checkpoint, family),
                stops=options.get("stops") if stage == 0 else None,
                peers=Peers(stages=ProcessStages(group)),
            )
        with made:
            found = use(made)
        group.close()
        return found

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
