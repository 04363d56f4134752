"""Files of users, opened so that no name can stall or fill the process.

A name may stand for anything: a pipe that nobody writes to, a device without end, a file of many
gigabytes. `read_regular` takes plain files of a bounded size and refuses the rest by name.
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO, Final

from hrm.errors import HrmError
from hrm.units import MIB, format_bytes

MAX_TEXT_BYTES: Final = 64 * MIB  # far more than any settings, config or policy file holds

_KINDS: Final = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a disk"),
    (stat.S_ISSOCK, "a socket"),
)


def read_regular(
    path: str | Path, what: str, error_type: type[HrmError] = HrmError,
    max_bytes: int = MAX_TEXT_BYTES, *, where: str = "", remedy: str = "check the path",
) -> bytes:  # fmt: skip
    """All bytes of a plain file, or of one that links lead to; never waits for a writer.

    `what` says in errors what is wanted: "a readable policy file" gives "must be a readable policy
    file". `where` stands in them for the path, such as "--routing run.json". Raises `error_type` if
    there is no such file, it cannot be read, is a folder, pipe, socket or device, or holds more
    than `max_bytes`. What the bytes mean is up to the caller.
    """
    where = where or str(path)
    with open_regular(path, what, error_type, where=where, remedy=remedy) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            # The size that is told may be 0 (in /proc) or outdated: what is read counts.
            content = b"" if size > max_bytes else file.read(max_bytes + 1)
        except OSError as error:
            raise _unreadable(error, where, what, error_type, remedy) from error
    if max(size, len(content)) > max_bytes:
        raise error_type(
            where, f"<{format_bytes(max(size, len(content)))}>",
            f"must be {what} of at most {format_bytes(max_bytes)}",
            "check that it is the file you mean",
        )  # fmt: skip
    return content


def open_regular(
    path: str | Path, what: str, error_type: type[HrmError] = HrmError, *, where: str = "",
    remedy: str = "check the path",
) -> BinaryIO:  # fmt: skip
    """A plain file opened for reading bytes, for files that are read piece by piece.

    Raises `error_type` as `read_regular` does, sizes apart.
    """
    where = where or str(path)
    try:
        kind = kind_of(Path(path).stat().st_mode)  # asked first: to open a device may have effects
        if kind is None:
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            kind = kind_of(os.fstat(handle).st_mode)
            if kind is None:
                return os.fdopen(handle, "rb")
            os.close(handle)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise _unreadable(error, where, what, error_type, remedy) from error
    raise error_type(
        where, f"<{kind}>", f"must be {what}", "name a file; what a pipe gives, write to one first"
    )


def kind_of(mode: int) -> str | None:
    """What a file is, from its `st_mode`, if it is no plain file: "a folder", "a pipe"."""
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), None)


def _unreadable(
    error: OSError | ValueError, where: str, what: str, error_type: type[HrmError], remedy: str
) -> HrmError:
    said = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return error_type(where, f"<{said}>", f"must be {what}", remedy)
