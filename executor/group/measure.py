"""What tasks of ranks of this machine take, and sums between them, for profiles of it."""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from executor.errors import RunError
from executor.group.store import open_store

_RANK: Final = "executor.ranks.measured"  # which knows lanes, too
_AT_MOST_S: Final = 60.0


def sums_between(ranks: int, sizes: Sequence[int]) -> Mapping[int, Sequence[float]]:
    """Seconds of sums of so many bytes between so many ranks, a process each, which share out the cores.

    They are taken as runs take them: among the tasks of a rank's lanes. Raises RunError if one of them fails.
    """
    _store, port = open_store()  # is closed when nobody has it
    told = _told("sums between ranks", [[port, rank, ranks, *sizes] for rank in range(ranks)])
    return {int(size): seconds for size, seconds in told.items()}


def seconds_a_task(ranks: int) -> Sequence[float]:
    """Seconds of the processor that running a task takes at least, in some runs of one of so many ranks.

    Raises RunError if it fails.
    """
    return _told("tasks of a rank", [[0, 0, ranks]])


def _told(what: str, commands: Iterable[Sequence[int]]) -> Any:
    """What the first of some processes tells."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for numbers in commands:
            command = [sys.executable, "-m", _RANK, *map(str, numbers)]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        told, failed = processes[0].communicate(timeout=_AT_MOST_S)
        if processes[0].returncode:
            raise RunError(what, f"<{failed.decode(errors='replace')[-200:]}>", "failed", "try again")
        return json.loads(told)
    except subprocess.TimeoutExpired as error:
        raise RunError(what, f"<none in {_AT_MOST_S:g} s>", "must end", "try again") from error
    finally:
        for process in processes:
            process.kill()
            process.communicate()
