"""The other ranks as rank 0 has them: processes that it starts, watches, and leaves none of behind."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from tempfile import TemporaryFile
from time import monotonic
from typing import IO, Final, Self, final

from torch.distributed.distributed_c10d import Store

from executor.group.store import LOOP, join_store
from executor.ranks.signs import PULSE_S, Farewell, Pulse, RankFailedError, farewell_of, pulse_of

_LOOK_S: Final = 0.05
_OTHERS_S: Final = 1.0  # after one rank has ended: for the others to say why they do
_PARTING_S: Final = 5.0  # for workers to end by themselves
SILENCE_S: Final = 15.0  # without a sign of life, after which a process is taken to hang
_KEPT: Final = "use --resume; what was finished before is kept"


@final
class Process:
    """One rank, a process that runs `command` with the environment of a rank; its session is its own.

    So Ctrl-C reaches rank 0 alone. What it prints is kept, and its standard input is a pipe that ends with rank 0.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self._printed: IO[bytes] = TemporaryFile()  # noqa: SIM115 - closed by `end`
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=self._printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pid = self._process.pid

    @property
    def code(self) -> int | None:
        """The exit code, negative for a signal's number; None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """End it, if it is still there."""
        with suppress(ProcessLookupError):
            self._process.kill()

    def end(self, end_s: float) -> None:
        """Give it until then to end by itself, kill it, and leave nothing of it."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(end_s - monotonic(), 0.0))
        self.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._printed.close()

    @property
    def farewell(self) -> Farewell:
        """Why it has ended, as far as that can be seen from outside."""
        code = self._process.returncode
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self._printed.seek(0)
        last = self._printed.read()[-2000:].decode(errors="replace").strip().splitlines()[-1:]
        memory = ", as the system does when memory runs out" if code == -signal.SIGKILL else ""
        return Farewell(
            where="its process",
            value=f"<{'; '.join([how, *last])}>",
            rule=f"must run as long as the others{memory}",
            remedy=_KEPT,
            chart="",
        )


@final
class Workers:
    """The ranks from 1 on; a context manager that ends them.

    They are started here by `command`, or have been started by others if there is none. They end with this process,
    however it ends. If one ends before its time or hangs, those started here are killed, so that nothing waits for
    them any more, and `failed` is called, in a thread.
    """

    def __init__(
        self,
        size: int,
        port: int,
        failed: Callable[[RankFailedError], object],
        *,
        command: Sequence[str] = (),
        host: str = LOOP,
        silence_s: float = SILENCE_S,
    ) -> None:
        self._size, self._host, self._port, self._command = size, host, port, command
        self._failed, self._silence_s = failed, silence_s
        self._ending = threading.Event()
        self._settled = threading.Event()
        self._failure: RankFailedError | None = None
        self._pulses: dict[int, tuple[Pulse, float]] = {}
        self._stillness: Stillness | None = None
        self.processes: dict[int, Process] = {}
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)

    def __enter__(self) -> Self:
        """Start and watch them."""
        try:
            for rank in range(1, self._size) if self._command else ():
                self.processes[rank] = Process(self._command, environment_of(rank, self._size, self._port))
            self._watcher.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let them end after all went well, or else kill them."""
        self._ending.set()
        self._watcher.join()
        if kind is not None:
            self.kill()
        end_s = monotonic() + _PARTING_S
        for process in self.processes.values():
            process.end(end_s)

    def kill(self) -> None:
        """End those that were started here and are still there."""
        for process in self.processes.values():
            process.kill()

    def failure(self, wait_s: float) -> RankFailedError | None:
        """Why one ended before its time, once that is known; None if none has within so long."""
        self._settled.wait(wait_s)
        return self._failure

    def watch_tasks(self, own: Callable[[], Pulse], patience_s: float) -> None:
        """From now on, have all end too if no rank begins or ends a task for so long; `own` is the sign of rank 0."""
        self._stillness = Stillness(own, patience_s)

    def look(self) -> None:
        """Raise why one ended before its time, if one has."""
        if self._failure is not None:
            raise self._failure

    def late(self, *, rank_0_waits: bool) -> RankFailedError:
        """Which rank did not come to where the others waited for it, and what it was at, as far as is known."""
        ended = {rank for rank, process in self.processes.items() if process.code is not None}
        there = {rank: one for rank, one in self._pulses.items() if rank not in ended}
        late = {rank: one for rank, one in there.items() if not one[0].waits} or (there if rank_0_waits else {})
        if not late:
            return RankFailedError(0, _came_late((), "<not at its end>"))
        rank = min(late)
        pulse, seen_s = late[rank]
        silent_s = monotonic() - seen_s
        if silent_s < 2 * PULSE_S + _OTHERS_S:
            return RankFailedError(rank, _came_late(pulse.tasks, "<not at its end>"))
        return RankFailedError(rank, _came_late(pulse.tasks, f"<without a sign of life for {silent_s:.0f} s>"))

    def _watch(self) -> None:
        store = join_store(self._host, self._port)
        ended = self._first_ended(store)
        if not ended:
            return
        end_s = monotonic() + _OTHERS_S
        while monotonic() < end_s and len(ended) < self._size - 1 and all(one.lost for one in ended.values()):
            self._ending.wait(_LOOK_S)
            ended |= self._ended(store)
        rank = min(ended, key=lambda rank: (ended[rank].lost, rank))
        self._failure = self.late(rank_0_waits=False) if ended[rank].lost else RankFailedError(rank, ended[rank])
        self.kill()
        self._settled.set()
        self._failed(self._failure)

    def _first_ended(self, store: Store) -> dict[int, Farewell]:
        """The ranks that have ended or hang, once there is one; none if all are to end."""
        while not self._ending.wait(_LOOK_S):
            ended = self._ended(store) or self._silent(store) or self._standing_still()
            if ended:
                return ended
        return {}

    def _ended(self, store: Store) -> dict[int, Farewell]:
        """Why ranks have ended that have."""
        found: dict[int, Farewell] = {}
        for rank in range(1, self._size):
            process = self.processes.get(rank)
            has_ended = process is not None and process.code is not None
            said = farewell_of(store, rank)
            if said is not None:
                found[rank] = said
            elif has_ended:
                assert process is not None
                found[rank] = process.farewell
        return found

    def _silent(self, store: Store) -> dict[int, Farewell]:
        """Ranks that have given no sign of life for too long after their first."""
        now_s = monotonic()
        for rank in range(1, self._size):
            pulse = pulse_of(store, rank)
            if pulse is not None and (rank not in self._pulses or self._pulses[rank][0] != pulse):
                self._pulses[rank] = pulse, now_s
        return {
            rank: _came_late(pulse.tasks, f"<without a sign of life for {self._silence_s:g} s>")
            for rank, (pulse, seen_s) in self._pulses.items()
            if now_s - seen_s > self._silence_s
        }

    def _standing_still(self) -> dict[int, Farewell]:
        """The rank that all others wait for, if they have done so for too long."""
        if self._stillness is None:
            return {}
        return self._stillness.hung({rank: pulse for rank, (pulse, _) in self._pulses.items()})


@final
class Stillness:
    """Whether ranks stand still: none of them has begun or ended a task for so long, and one is at work.

    That is not one whose CPU computes at least half of the time, however long its task takes.
    """

    def __init__(self, own: Callable[[], Pulse], patience_s: float) -> None:
        self._own, self._patience_s = own, patience_s
        self._since_s, self._first = monotonic(), dict[int, Pulse]()

    def hung(self, others: dict[int, Pulse]) -> dict[int, Farewell]:
        """The first rank at work once all have stood still for too long, with what it is at."""
        now_s, pulses = monotonic(), {0: self._own(), **others}
        if {rank: one.tasks for rank, one in pulses.items()} != {rank: one.tasks for rank, one in self._first.items()}:
            self._since_s, self._first = now_s, pulses
        still_s = now_s - self._since_s
        if still_s <= self._patience_s:
            return {}
        for rank, pulse in sorted(pulses.items()):
            if pulse.works and pulse.cpu_s - self._first[rank].cpu_s < still_s / 2:
                return {rank: _came_late(pulse.works, f"<not at its end after {still_s:.0f} s>")}
        return {}


def _came_late(tasks: Sequence[str], value: str) -> Farewell:
    """What to tell of a rank that the others have waited for in vain, and of the tasks that it was last seen at."""
    return Farewell(
        where=", ".join(tasks) or "its process",
        value=value,
        rule="must come to where the other ranks wait",
        remedy=_KEPT,
        chart="",
    )


def environment_of(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells its processes too."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": LOOP,
        "MASTER_PORT": str(port),
    }


def command_of(module: str) -> tuple[str, ...]:
    """The command of a rank: a module of Python's."""
    # That the module is imported before it is run, by the package that it is in, is nothing to be warned of.
    return (sys.executable, "-W", "ignore::RuntimeWarning:runpy", "-m", module)
