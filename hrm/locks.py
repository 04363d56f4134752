"""Files that one process at a time works on."""

import fcntl
import os
from contextlib import suppress
from io import FileIO
from pathlib import Path

from hrm.files import open_plain, replaceable


def open_locked(path: Path) -> FileIO:
    """A plain file opened to read and write, and locked against every other process that does so.

    It is unbuffered, is made if it is missing, and what it holds stays. The lock ends with the file
    or with the process, however that ends. Raises BlockingIOError if the file is locked, whose
    `strerror` names the other process if it can be told, and OSError if it cannot be opened, or is
    a link or no plain file.
    """
    while True:
        replaceable(path)
        file = FileIO(open_plain(path, os.O_RDWR), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, file):
                return file
        except BlockingIOError as error:
            holder = _lock_holder(os.fstat(file.fileno()))
            file.close()
            who = "another process" if holder is None else f"process {holder}"
            raise BlockingIOError(error.errno, f"in use by {who}") from error
        except BaseException:
            file.close()
            raise
        file.close()  # who held the lock has removed the file meanwhile: there is a new one


def _is_at(path: Path, file: FileIO) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _lock_holder(status: os.stat_result) -> int | None:
    """The process that holds a lock on a file, as Linux tells; None if it does not."""
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with suppress(OSError):
        for line in Path("/proc/locks").read_text(encoding="ascii").splitlines():
            words = line.split()
            if device in words and "FLOCK" in words and (number := words[4]).isdecimal():
                return int(number) or None
    return None
