"""Files of users, read and written so that no name stalls the process or loses what was there.

A name may stand for anything: a pipe that nobody writes to, a device without end, a link to a file
of somebody else's, a file of many gigabytes. `read_regular` takes plain files of a bounded size and
refuses the rest by name. `write_whole` leaves a file as it was or as it should be and nothing in
between.
"""

import errno
import os
import re
import secrets
import stat
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import partial
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Final, Self, final

from hrm.errors import HrmError
from hrm.units import MIB, format_bytes

MAX_TEXT_BYTES: Final = 64 * MIB  # far more than any settings, config or policy file holds

_RANDOM_BYTES: Final = 12  # in the names of files under way
_KINDS: Final = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a disk"),
    (stat.S_ISSOCK, "a socket"),
)


def read_regular(
    path: str | Path,
    what: str,
    error_type: type[HrmError] = HrmError,
    max_bytes: int = MAX_TEXT_BYTES,
    *,
    where: str = "",
    remedy: str = "check the path",
) -> bytes:
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
            content = b"" if size > max_bytes else file.read(size + 1)
            if len(content) > size:
                content += file.read(max_bytes + 1 - len(content))
        except OSError as error:
            raise _unreadable(error, where, what, error_type, remedy) from error
    if max(size, len(content)) > max_bytes:
        raise error_type(
            where,
            f"<{format_bytes(max(size, len(content)))}>",
            f"must be {what} of at most {format_bytes(max_bytes)}",
            "check that it is the file you mean",
        )
    return content


def open_regular(
    path: str | Path,
    what: str,
    error_type: type[HrmError] = HrmError,
    *,
    where: str = "",
    remedy: str = "check the path",
) -> BinaryIO:
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
    raise error_type(where, f"<{kind}>", f"must be {what}", "name a file; what a pipe gives, write to one first")


def is_file(path: Path) -> bool:
    """Whether there is a file of that name; a name that no file can have is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or in a folder that may not be entered
        return False


def is_folder(path: Path) -> bool:
    """Whether there is a folder of that name; a name that no folder can have is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def kind_of(mode: int) -> str | None:
    """What a file is, from its `st_mode`, if it is no plain file: "a folder", "a pipe"."""
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), None)


def _unreadable(
    error: OSError | ValueError, where: str, what: str, error_type: type[HrmError], remedy: str
) -> HrmError:
    return error_type(where, f"<{_said(error)}>", f"must be {what}", remedy)


# -------------------------------------------------------------------------------------- writing


def write_whole(
    path: str | Path,
    content: bytes | str,
    error_type: type[HrmError] = HrmError,
    *,
    remedy: str = "choose another path",
) -> None:
    """Write a file so that it holds what it held before or all of `content`, text as UTF-8.

    See `writing` for what holds of it and what is refused.
    """
    with writing(path, error_type, remedy=remedy) as write:
        write(content.encode() if isinstance(content, str) else content)


@contextmanager
def writing(
    path: str | Path, error_type: type[HrmError] = HrmError, *, remedy: str = "choose another path"
) -> Generator[Callable[[bytes], object]]:
    """A function that the body calls with the pieces of a file, which takes its place at the end.

    It is on the disk then. A new file has the permissions that the umask leaves, one that is
    replaced keeps its own. A pipe or a device that is named, /dev/stdout among them, is written to
    as it is. Raises `error_type` if the file cannot be written, is a folder, a link or read-only;
    then, and after an exception of the body or Ctrl-C, what was there is untouched and nothing is
    left behind. A pipe whose reader has gone is a BrokenPipeError, as for all that is printed.
    """
    try:
        stream = _open_stream(Path(path))
        if stream is None:
            with NewFile(path) as new:
                yield new.write
                new.commit()
            return
        try:
            yield partial(write_all, stream)
        finally:
            os.close(stream)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _unwritable(error, path, error_type, remedy) from error


def check_writable(
    path: str | Path, error_type: type[HrmError] = HrmError, *, remedy: str = "choose another path"
) -> None:
    """Refuse what `write_whole` would refuse, as far as that can be told before the work."""
    path = Path(path)
    try:
        if is_stream(path):
            return
        old = replaceable(path)
        if old is None and not stat.S_ISDIR(path.parent.stat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise _unwritable(error, path, error_type, remedy) from error


@final
class NewFile:
    """What a file will hold, under a name of its own beside it until `commit`; a context manager.

    All methods raise OSError, whose `strerror` says why in words. If the process is killed, what was
    written stays under that name; `mark` is a word in it for `remove_unfinished`.
    """

    def __init__(self, path: str | Path, mark: str = "") -> None:
        self.path = Path(path)
        self._committed = False
        old = replaceable(self.path)
        # Nobody else has this name, so that it may be removed whatever happens from here on; it is
        # short, since the target's own may be as long as names may be.
        self._temporary = self.path.with_name(f".hrm-{mark}{secrets.token_hex(_RANDOM_BYTES)}.tmp")
        self._handle = -1
        try:
            self._handle = open_plain(self._temporary, os.O_WRONLY | os.O_EXCL)
            if old is not None:
                with suppress(PermissionError):  # file systems without permissions
                    os.fchmod(self._handle, old.st_mode & 0o777)
        except BaseException:
            self.discard()
            raise

    def __enter__(self) -> Self:
        """The temporary file is there from construction on."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove it, unless it has become the file."""
        self.discard()

    def write(self, content: bytes) -> None:
        """Append to what the file will hold."""
        write_all(self._handle, content)

    def commit(self) -> None:
        """Put it in the file's place, on the disk when this returns."""
        replace_durably(self._temporary, self.path)
        self._committed = True

    def discard(self) -> None:
        """Close it, and remove it if it has not become the file."""
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)
        if not self._committed:
            self._temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path, mark: str) -> None:
    """Remove what writers of files with that mark left when they were killed.

    Only for who knows that none of them is at work in the folder. Raises OSError if it cannot be read.
    """
    name = re.compile(rf"\.hrm-{re.escape(mark)}[0-9a-f]{{{2 * _RANDOM_BYTES}}}\.tmp")
    with os.scandir(folder) as entries:
        left = [Path(entry) for entry in entries if name.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)]
    for path in left:
        path.unlink(missing_ok=True)


def replace_durably(new: Path, path: Path) -> None:
    """Give a file the name `path` beside it; content and name outlast a loss of power.

    Raises OSError if what has that name is no plain file: links, folders and devices stay.
    """
    _sync(new)
    replaceable(path)
    new.replace(path)
    with suppress(PermissionError):  # a folder need not be readable to be written to
        _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:  # file systems that cannot
            raise
    finally:
        os.close(handle)


def write_all(handle: int, content: bytes) -> None:
    """Write all of `content` to an open file, which may take it in pieces; OSError if it fails."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(handle, rest) :]


def create_anew(path: Path) -> None:
    """Make an empty file of a name that is ours alone, in place of what has that name.

    Raises OSError if it cannot be made, or a folder has the name.
    """
    path.unlink(missing_ok=True)
    os.close(open_plain(path, os.O_WRONLY | os.O_EXCL))


@contextmanager
def closing_on_error(file: FileIO) -> Generator[None]:
    """Close the file if the body raises."""
    try:
        yield
    except BaseException:
        file.close()
        raise


def open_append(path: Path) -> FileIO:
    """A plain file opened to append to, unbuffered, made if it is missing.

    Unbuffered, because what a full disk refuses must not be tried again when it is closed. Raises
    OSError if it cannot be, or is a link or no plain file.
    """
    replaceable(path)
    return FileIO(open_plain(path, os.O_WRONLY | os.O_APPEND), "ab")


def open_plain(path: Path, flags: int) -> int:
    """A handle of a plain file, made if it is missing; links are not followed.

    Raises OSError if it is of another kind.
    """
    common = os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    handle = os.open(path, flags | common, 0o666)
    try:
        _refuse_kind(os.fstat(handle).st_mode)
    except BaseException:
        os.close(handle)
        raise
    return handle


def replaceable(path: Path) -> os.stat_result | None:
    """The plain file that may be written or replaced, None if there is none yet.

    Raises OSError if it is of another kind, a link or read-only.
    """
    try:
        old = path.lstat()
    except FileNotFoundError:
        return None
    except ValueError as error:  # a name that no file can have
        raise OSError(errno.EINVAL, str(error)) from error
    if stat.S_ISLNK(old.st_mode):
        target = path.readlink()
        raise OSError(errno.ELOOP, f"a link to {target}, which is not written through")
    _refuse_kind(old.st_mode)
    if not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return old


def _refuse_kind(mode: int) -> None:
    kind = kind_of(mode)
    if kind is not None:
        raise OSError(errno.EINVAL, kind)


def is_stream(path: Path) -> bool:
    """Whether a name stands for what is written to as it is: a pipe, a device, an open file."""
    if _stream_number(path) is not None:
        return True
    try:
        mode = path.lstat().st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


def _open_stream(path: Path) -> int | None:
    """A handle of such a pipe, device or open file; None if the path is of another kind."""
    number = _stream_number(path)
    if number is not None:
        return os.dup(number)  # opened by its name, a file would be written from its start on
    if not is_stream(path):
        return None
    return os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NOCTTY | os.O_CLOEXEC)


def _stream_number(path: Path) -> int | None:
    """The number of the open file that /dev/stdout, /dev/fd/63 and the like stand for."""
    for _ in range(2):  # /dev/stdout is a link to /proc/self/fd/1
        folder = os.path.realpath(path.parent)
        if folder == f"/proc/{os.getpid()}/fd" and path.name.isdecimal():
            return int(path.name)
        if folder != "/dev" or not os.path.islink(path):  # noqa: PTH114 - never raises
            return None
        path = folder / path.readlink()
    return None


def _unwritable(error: OSError, path: str | Path, error_type: type[HrmError], remedy: str) -> HrmError:
    return error_type(str(path), f"<{_said(error)}>", "must be writable", remedy)


def _said(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
