"""Optuna's journal in a file, safe against what ends processes, fills disks and damages lines.

Optuna's own file backend stops for good at a line cut short, and waits for half a minute, silently,
for the lock of a process that is no more. Here the lock is the kernel's, which ends with its
process; what could not be written whole is taken back; a damaged line is passed over.
"""

import fcntl
import json
import os
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

from optuna.storages.journal import BaseJournalBackend

from hrm.decoding import Malformed, decode_json
from hrm.errors import PolicyError
from hrm.files import open_regular

LOCK_S: Final = 10.0  # others write for milliseconds
_START: Final = b'{"op_code"'
_WHAT: Final = "a journal that Optuna opens, or no file yet"
_OTHER: Final = "give another --storage"


class StudyFile(BaseJournalBackend):
    """The journal at `path`, which is begun if there is none.

    Raises PolicyError if there is something else, or the file cannot be read, written or locked.
    """

    def __init__(self, path: str) -> None:
        self._path = Path(path)
        self._ends = [0]  # of each good line that was read, in bytes
        with suppress(FileExistsError), told(path):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        with self._open() as file:
            start = file.read(len(_START))
        if not _START.startswith(start):
            raise PolicyError("--storage", path, f"must be {_WHAT}: this one holds something else", _OTHER)

    def read_logs(self, log_number_from: int) -> Generator[dict[str, Any], None, None]:
        """The good lines from that number on; damaged ones are not counted."""
        number = min(log_number_from, len(self._ends) - 1)
        with self._open() as file:
            end = self._ends[number]
            file.seek(end)
            for raw in file:
                if not raw.endswith(b"\n"):  # another process is writing it, or did not end
                    return
                end += len(raw)
                log = _decoded(raw)
                if log is None:
                    continue
                number += 1
                if number == len(self._ends):
                    self._ends.append(end)
                if number > log_number_from:
                    yield log

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write lines; they are on the disk, or nothing of them is, when this returns or raises."""
        lines = [json.dumps(log, separators=(",", ":")).encode() + b"\n" for log in logs]
        with told(str(self._path)), self._path.open("r+b", buffering=0) as file, self._locked(file):
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # whoever wrote it ended within the line
                    lines.insert(0, b"\n")
            try:
                _write(file, b"".join(lines))
            except BaseException:
                with suppress(OSError):
                    file.truncate(size)
                raise

    def _open(self) -> BinaryIO:
        return open_regular(self._path, _WHAT, PolicyError, where=f"--storage {self._path}")

    @contextmanager
    def _locked(self, file: Any) -> Generator[None]:
        end_s = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > end_s:
                    raise PolicyError(
                        "--storage",
                        str(self._path),
                        f"must not be locked by another process, which it was for {LOCK_S:.0f} s",
                        "end that process or give another --storage",
                    ) from error
                time.sleep(0.005)
        yield  # the lock ends with the file


@contextmanager
def told(storage: str | None) -> Generator[None]:
    """Within it, whatever Optuna or a database raises becomes a PolicyError that names the storage.

    A study that is not kept has nothing of the user's in it: errors are then ours, and pass.
    """
    try:
        yield
    except (PolicyError, FileExistsError):
        raise
    except Exception as error:
        if storage is None:
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise PolicyError(
            "--storage",
            storage,
            f"must be a file or a database that Optuna opens ({said})",
            "make room or correct the path; what it holds may be damaged if neither helps: then"
            " give another path such as trials.log, or a URL such as sqlite:///trials.db",
        ) from error


def _write(file: Any, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
    os.fsync(file.fileno())


def _decoded(raw: bytes) -> dict[str, Any] | None:
    """A line of the journal; None if it is damaged."""
    try:
        log = decode_json(raw)
    except Malformed:
        return None
    return log if isinstance(log, dict) and "op_code" in log else None  # pyright: ignore[reportUnknownVariableType]
