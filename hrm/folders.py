"""Folders that are there whole or not at all."""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from hrm.errors import HrmError
from hrm.units import format_bytes


def check_new_folder(path: Path, where: str, error_type: type[HrmError] = HrmError, *, num_bytes: int = 0) -> None:
    """Refuse what `new_folder` would refuse, as far as that can be told before the work.

    That is also a disk without room for `num_bytes`. `where` is what the user calls the folder.
    """
    try:
        _check_free(path)
        parent = path.absolute().parent
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        free_bytes = shutil.disk_usage(parent).free
    except OSError as error:
        raise _unwritable(error, path, where, error_type) from error
    if free_bytes < num_bytes:
        rule = f"must be on a disk with room for {format_bytes(num_bytes)}"
        raise error_type(f"{where}: {path}", f"<{format_bytes(free_bytes)} free>", rule, "make room, or choose another")


@contextmanager
def new_folder(path: Path, where: str, error_type: type[HrmError] = HrmError) -> Generator[Path]:
    """A folder beside `path` for the body to fill, which takes its name at the end.

    An empty folder of that name is replaced. Raises `error_type` if there is a folder that is not empty, a file or a
    link, or if anything cannot be written. Then, and after an exception of the body or Ctrl-C, what was there is
    untouched and nothing is left behind.
    """
    temporary = path.absolute().with_name(f".hrm-{secrets.token_hex(12)}.tmp")
    try:
        _check_free(path)
        temporary.mkdir()
        try:
            yield temporary
            _check_free(path)
            temporary.replace(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise _unwritable(error, path, where, error_type) from error


def _check_free(path: Path) -> None:
    """Raise OSError unless there is nothing of that name, or an empty folder."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        parent = path.absolute().parent.stat()
        if not stat.S_ISDIR(parent.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
        return
    except ValueError as error:  # a name that no folder can have
        raise OSError(errno.EINVAL, str(error)) from error
    if stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, f"a link to {path.readlink()}, which is not written through")
    if not stat.S_ISDIR(mode):
        raise FileExistsError(errno.EEXIST, "a file")
    if any(path.iterdir()):
        raise FileExistsError(errno.EEXIST, "a folder that is not empty")


def _unwritable(error: OSError, path: Path, where: str, error_type: type[HrmError]) -> HrmError:
    rule = "must be new or an empty folder, in a folder that can be written to, with room on its disk"
    return error_type(f"{where}: {path}", f"<{error.strerror or error}>", rule, "choose another path, or make room")
