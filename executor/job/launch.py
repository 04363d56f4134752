"""How a job's generator comes about: in this process alone, or as that of rank 0, with the others beside it."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from executor.backends import computes
from executor.errors import RunError
from executor.generate import AbstractGenerator, Prepared
from executor.group.cores import own_cores, started_by_torchrun
from executor.group.processes import timeout_s
from executor.handlers import EndOfText, never_stops
from executor.job.machine import AcceleratorOptions, accelerator_for, files_of_ranks, longest_task_s, prepare
from executor.job.model import OpenModel
from executor.job.model_part import ModelPart
from executor.job.rank import RankJob, RankReport, for_rank, is_pipeline, shares_of_cores
from executor.loading import Loading
from executor.model import Architecture
from executor.ranks.generator import RankedGenerator, Ranks
from executor.ranks.messages import telling
from executor.under_way import Peers
from hrm.policy_file import PolicyFile

WORKER: Final = "executor.job.rank"
_SLOWER: Final = 10  # than predicted: a task that takes so long still comes to its end

Reports = Callable[[], list[RankReport]]  # what each of the other ranks has done since it was last asked


@dataclass(frozen=True, slots=True)
class Launch:
    """What a generator is made from, and of how many ranks it is the first, which share out these cores.

    `own` is what this process has of the `whole`, and the `job` what other ranks are told. Stages of a pipeline wait
    for one another as long as it takes, but not when none of them has begun or ended a task for `patience_s`.
    """

    job: RankJob
    whole: Architecture
    own: ModelPart
    stops: EndOfText | None
    prepared: Prepared
    ranks: int
    cpus: set[int]
    patience_s: float | None = None

    @contextmanager
    def loaded(self, loading: Loading) -> Iterator[tuple[AbstractGenerator, Reports]]:
        """The generator with its weights loaded; other ranks live within the context."""
        stops = self.stops or never_stops
        load = partial(self.own.generator, self.prepared, loading, max_spans=self.job.max_spans)
        if self.ranks == 1:
            yield load(stops=stops), list
            return
        with Ranks(self.ranks, self.job.encode(), module=WORKER, cpus=self.cpus) as ranks:
            with ranks.named():
                if is_pipeline(self.job):
                    own = load(stops=stops, peers=Peers(stages=ranks.stages()))
                else:
                    own = load(stops=telling(ranks.group, stops), peers=Peers(ranks.group))
            ranks.ready(own, self.patience_s)
            yield RankedGenerator(ranks, own, self.whole), lambda: [RankReport.decode(one) for one in ranks.reports()]


@contextmanager
def launching(
    job: RankJob, whole: Architecture, own: ModelPart, *, gpus: int | None = None, stops: EndOfText | None = None
) -> Iterator[Launch]:
    """All that can be known before anything large is touched, on rank 0's share of the cores.

    Raises PolicyError if the policy does not fit, and RunError if the accelerator cannot be had or if there are not as
    many `gpus`, or ranks of torchrun, as the policy was solved for.
    """
    files, options, file = files_of_ranks(job.policy_file), job.accelerator, own.policy_file
    size, numbers = len(files), job.policy_file.policy.gpus
    _check_number(size, gpus)
    if size == 1 or not computes(options.name):
        yield Launch(job, whole, own, stops, prepare(for_rank(options, 0, size, numbers), file, file.policy), 1, set())
        return
    options = replace(options, name=accelerator_for(options.name, file.profile))
    job = replace(job, accelerator=options)
    with own_cores(0, shares_of_cores(files)) as cpus:
        prepared = prepare(for_rank(options, 0, size, numbers), file, file.policy, others=files[1:])
        patience_s = _patience_s(options, files) if is_pipeline(job) else None
        yield Launch(job, whole, own, stops, prepared, size, cpus, patience_s)


def launching_model(
    options: AcceleratorOptions, model: OpenModel, gpus: int | None = None
) -> AbstractContextManager[Launch]:
    """The same of a checkpoint and the policy that it was opened with."""
    job = RankJob(
        model=model.checkpoint.folder,
        model_name=model.arch.spec.name,
        policy_file=replace(model.policy_file, policy=model.policy),
        accelerator=options,
        eos_token_ids=model.arch.eos_token_ids,
    )
    return launching(job, model.arch, model.own, gpus=gpus, stops=model.stops)


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
