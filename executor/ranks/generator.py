"""Rank 0: a generator that has the other ranks run every batch with its own."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Final, Self, final

from executor.batching import Batch, Sink
from executor.engine import TaskFailedError
from executor.errors import RunError
from executor.generate import AbstractGenerator, BatchResult, Planned
from executor.group import Group, LostRankError
from executor.group.cores import started_by_torchrun
from executor.group.processes import ProcessGroup
from executor.group.stages import ProcessStages, Stages
from executor.group.store import LOOP, join_store, open_store
from executor.model import Architecture
from executor.ranks.messages import REPORT, RankBatch
from executor.ranks.signs import Pulse, RankFailedError
from executor.ranks.workers import SILENCE_S, Workers, command_of
from hrm.buffers import Purpose
from hrm.policy import ScheduleName

_UNWINDING_S: Final = 10.0  # from the failure of another rank until this one has come to its end


@final
class Ranks:
    """All ranks of a job, as rank 0 has them; a context manager.

    The others are started as `module`, on the cores `cpus`, and told of the `job`; torchrun has started its own. If
    one of them fails while a batch is under way, and this one cannot come to its end within seconds, the process ends
    with exit code 1, having said why.
    """

    def __init__(
        self,
        size: int,
        job: bytes,
        *,
        module: str,
        cpus: set[int] | None = None,
        timeout_s: float | None = None,
        silence_s: float = SILENCE_S,
    ) -> None:
        self._size, self._job, self._module, self._cpus = size, job, module, cpus
        self._timeout_s, self._silence_s = timeout_s, silence_s
        self._idle = threading.Event()
        self._idle.set()
        self._stack = ExitStack()
        self._group: ProcessGroup | None = None
        self.workers: Workers

    @property
    def group(self) -> Group:
        """The group, within the context."""
        assert self._group is not None
        return self._group

    def stages(self) -> Stages:
        """The ranks as stages of a pipeline, which each of them asks for."""
        assert self._group is not None
        return ProcessStages(self._group)

    def __enter__(self) -> Self:
        """Start the others, meet them, and tell them of the job."""
        with ExitStack() as stack:
            if started_by_torchrun():
                command, host, port = (), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
                store = join_store(host, port)
            else:
                command, host = command_of(self._module), LOOP
                store, port = open_store()
            self.workers = Workers(
                self._size, port, self._failed, command=command, host=host, silence_s=self._silence_s
            )
            with self._on_all_cores():
                stack.enter_context(self.workers)
            with self.named():
                self._group = ProcessGroup(store, 0, self._size, look=self.workers.look, timeout=self._timeout_s)
                self._group.broadcast(self._job)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        """Tell the others that there is no more to run, or kill them after an error; none is left in any case."""
        if kind is None:
            with suppress(RunError):  # all that they have done was told
                self.group.broadcast(b"")
        self._stack.__exit__(kind, error, None)
        del traceback

    def reports(self) -> list[bytes]:
        """What each of the others reports of all since it was last asked, in their order; none is at a batch then."""
        with self.named():
            self.group.broadcast(REPORT)
            return self.group.collect(b"")[1:]

    def ready(self, generator: AbstractGenerator, patience_s: float | None = None) -> None:
        """Return when all have loaded their weights; RunError if not all stage them alike.

        If there is a `patience_s`, ranks that stand still for so long have failed, as `Stillness` tells them.
        """
        if patience_s is not None:
            self.workers.watch_tasks(lambda: Pulse.of(0, generator), patience_s)
        with self.named():
            own = str(generator.policy.staging).encode()
            if set(self.group.collect(own)) != {own}:
                raise RunError(
                    "pinned memory",
                    "<enough for some ranks only>",
                    "must be enough for all or none",
                    "raise the limit of locked memory (ulimit -l)",
                )

    @contextmanager
    def named(self) -> Iterator[None]:
        """Within it, the loss of a rank comes out as RankFailedError, which names it."""
        try:
            yield
        except RunError as error:
            cause = error.error if isinstance(error, TaskFailedError) else error
            if not isinstance(cause, LostRankError):
                raise
            failed = self.workers.failure(2.0) or self.workers.late(rank_0_waits=True)
            if isinstance(error, TaskFailedError):
                failed.chart = failed.chart or error.chart
            raise failed from error

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within it a batch is under way; see `named` too."""
        self._idle.clear()
        try:
            with self.named():
                yield
        finally:
            self._idle.set()

    @contextmanager
    def _on_all_cores(self) -> Iterator[None]:
        """Within it, processes are started that divide all cores by themselves."""
        own = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self._cpus or own)
        try:
            yield
        finally:
            os.sched_setaffinity(0, own)

    def _failed(self, failure: RankFailedError) -> None:
        """In the watcher's thread: let go of what waits for the rank, or else of the whole process."""
        if self._group is not None:
            self._group.give_up("another rank has ended")
        if not self._idle.wait(_UNWINDING_S):
            sys.stderr.write(f"error: {failure}\n")
            sys.stderr.flush()
            os._exit(1)


@final
class RankedGenerator(AbstractGenerator):
    """Rank 0's own generator, with the other ranks running each batch beside it.

    It takes requests of the whole model, whose architecture is `whole`.
    """

    def __init__(self, ranks: Ranks, own: AbstractGenerator, whole: Architecture) -> None:
        super().__init__(own.backend, whole, Planned(own.policy, own.plan), 0)
        self._ranks, self._own = ranks, own
        self.engine, self.live, self.load_s = own.engine, own.live, own.load_s  # those that run
        self.notice, self.pageable, self.num_stages = own.notice, own.pageable, own.num_stages

    @property
    def peak_bytes(self) -> dict[str, dict[Purpose, int]]:
        """Those of rank 0."""
        return self._own.peak_bytes

    def warm_up(self) -> None:
        """Warm up with all ranks, each of which does so before its first batch."""
        with self._ranks.at_work():
            self._own.warm_up()
        self.load_s = self._own.load_s

    def generate(
        self, batch: Batch, *, index: int = 0, sink: Sink | None = None, schedule: ScheduleName | None = None
    ) -> BatchResult:
        """Have all ranks run the batch; RankFailedError, which names the rank, if another fails."""
        self.warm_up()
        with self._ranks.at_work():
            self._ranks.group.broadcast(RankBatch(batch=batch, index=index, schedule=schedule).encode())
            return self._own.generate(batch, index=index, sink=sink, schedule=schedule)

    def rescue(self) -> BatchResult | None:
        """What rank 0 has of the batch."""
        return self._own.rescue()
