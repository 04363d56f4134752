"""What sums between ranks of this machine take, for profiles of it."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Final

from executor.errors import RunError
from executor.group.store import open_store

_RANK: Final = "executor.ranks.sums"  # which knows lanes, too
_AT_MOST_S: Final = 60.0


def sums_between(ranks: int, sizes: Sequence[int]) -> Mapping[int, Sequence[float]]:
    """Seconds of sums of so many bytes between so many ranks, a process each, which share out the cores.

    They are taken as runs take them: among the tasks of a rank's lanes. Raises RunError if one of them fails.
    """
    _store, port = open_store()  # is closed when nobody has it
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):
            command = [sys.executable, "-m", _RANK, *map(str, (port, rank, ranks, *sizes))]
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        told, failed = processes[0].communicate(timeout=_AT_MOST_S)
        if processes[0].returncode:
            raise RunError("sums between ranks", f"<{failed.decode(errors='replace')[-200:]}>", "failed", "try again")
        return {int(size): seconds for size, seconds in json.loads(told).items()}
    except subprocess.TimeoutExpired as error:
        raise RunError("sums between ranks", f"<none in {_AT_MOST_S:g} s>", "must end", "try again") from error
    finally:
        for process in processes:
            process.kill()
            process.communicate()
