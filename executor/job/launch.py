"""How a job's generator comes about: in this process alone, or as that of rank 0, with the others beside it."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

from executor.errors import RunError
from executor.generate import AbstractGenerator
from executor.group.cores import own_cores, started_by_torchrun
from executor.group.processes import timeout_s
from executor.job.machine import AcceleratorOptions, Prepared, accelerator_for, files_of_ranks, longest_task_s, prepare
from executor.job.model import OpenModel
from executor.job.rank import RankJob, RankReport, for_rank
from executor.loading import Loading
from executor.ranks.generator import RankedGenerator, Ranks
from executor.ranks.messages import telling
from hrm.policy import Parallelism
from hrm.policy_file import PolicyFile

WORKER: Final = "executor.job.rank"
_SLOWER: Final = 10  # than predicted: a task that takes so long still comes to its end

Finish = Callable[[], list[RankReport]]  # tells the other ranks that there is no more, and what each has done


@dataclass(frozen=True, slots=True)
class Launch:
    """What a generator is made from, and of how many ranks it is the first, which share out these cores.

    Stages of a pipeline wait for one another as long as it takes, but not when none of them has begun or ended a task
    for `patience_s`.
    """

    model: OpenModel
    prepared: Prepared
    ranks: int
    accelerator: AcceleratorOptions
    cpus: set[int]
    patience_s: float | None = None

    @contextmanager
    def loaded(self, loading: Loading) -> Iterator[tuple[AbstractGenerator, Finish]]:
        """The generator with its weights loaded; other ranks live within the context."""
        if self.ranks == 1:
            yield self.model.own.generator(self.prepared, loading, stops=self.model.stops), list
            return
        model = self.model
        job = RankJob(
            model=model.checkpoint.folder,
            model_name=model.arch.spec.name,
            policy_file=replace(model.policy_file, policy=model.policy),
            accelerator=self.accelerator,
            eos_token_ids=model.arch.eos_token_ids,
        )
        with Ranks(self.ranks, job.encode(), module=WORKER, cpus=self.cpus) as ranks:
            with ranks.named():
                if model.policy.parallelism is Parallelism.PIPELINE:
                    own = model.own.generator(self.prepared, loading, stops=model.stops, stages=ranks.stages())
                else:
                    group = ranks.group
                    stops = telling(group, model.stops)
                    own = model.own.generator(self.prepared, loading, stops=stops, group=group)
            ranks.ready(own, self.patience_s)
            yield RankedGenerator(ranks, own, model.arch), lambda: [RankReport.decode(one) for one in ranks.finish()]


@contextmanager
def launching(options: AcceleratorOptions, model: OpenModel, gpus: int | None) -> Iterator[Launch]:
    """All that can be known before anything large is touched, on rank 0's share of the cores.

    Raises PolicyError if the policy does not fit, and RunError if the accelerator cannot be had or if there are not as
    many `gpus`, or ranks of torchrun, as the policy was solved for.
    """
    files = files_of_ranks(replace(model.policy_file, policy=model.policy))
    size, numbers = len(files), model.policy.gpus
    _check_number(size, gpus)
    own = model.own.policy_file
    if size == 1 or options.name == "null":
        yield Launch(model, prepare(for_rank(options, 0, size, numbers), own, own.policy), 1, options, set())
        return
    options = replace(options, name=accelerator_for(options.name, own.profile))
    with own_cores(0, size) as cpus:
        prepared = prepare(for_rank(options, 0, size, numbers), own, own.policy, others=files[1:])
        patience_s = _patience_s(options, files) if model.policy.parallelism is Parallelism.PIPELINE else None
        yield Launch(model, prepared, size, options, cpus, patience_s)


def _patience_s(options: AcceleratorOptions, files: Sequence[PolicyFile]) -> float:
    """As long as a rank waits in a collective, and many times as long as any task of a stage should take."""
    return timeout_s() + _SLOWER * max(longest_task_s(options, one) for one in files)


def _check_number(count: int, gpus: int | None) -> None:
    """Raise RunError if there are to be other than `count` ranks."""
    given = {"--gpus": gpus, "torchrun: --nproc-per-node": _processes_of_torchrun()}
    for where, number in given.items():
        if number not in (None, count):
            raise RunError(
                where,
                number,
                f"must be {count}, which the policy was solved for",
                "correct it, or solve the policy again with hrm search --gpus",
            )


def _processes_of_torchrun() -> int | None:
    return int(os.environ["WORLD_SIZE"]) if started_by_torchrun() else None
