"""A file of requests before any of it is read: whether it is one, and where it lies."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final
from urllib.parse import urlsplit

from executor.errors import JobError
from executor.guard import in_a_line
from executor.job.parquet import MAGIC, check_parquet
from executor.job.remote import open_url
from hrm.files import open_regular
from hrm.units import MIB

MAX_LINE_BYTES: Final = 64 * MIB  # a book in a line has some
_PACKED: Final = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"PK\x03\x04": ("zip", "unzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\x00": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstandard", "unzstd"),
}
_OTHER: Final = {
    b"ARROW1": "arrow",
    b"Obj\x01": "avro",
    b"SQLite format 3": "sqlite",
    b"%PDF": "PDF",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}
_WIDE: Final = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_MARK: Final = b"\xef\xbb\xbf"  # of UTF-8, which some editors put in front
_START: Final = 4096  # bytes that are looked at


Input = Path | str  # a file, or the URL of one


def input_named(text: str) -> Input:
    """The file that a text on the command line names; JobError for standard input."""
    if text == "-":
        rule = "must be a file or a URL, which --resume can read again"
        raise JobError("--input", text, rule, "write the requests to a file first")
    return text if "://" in text else Path(text)


def path_of(path: Input) -> PurePosixPath:
    """The path of a file, of a URL without what comes before and after it."""
    return PurePosixPath(urlsplit(path).path if isinstance(path, str) else path)


def open_input(path: Input) -> BinaryIO:
    """The file opened for reading; JobError if it cannot be, or is no file, as a pipe."""
    if isinstance(path, str):
        return open_url(path)
    return open_regular(path, "a readable file of requests", JobError, where=f"--input: {path}")


def is_parquet(file: BinaryIO) -> bool:
    """Whether the file, which is at its start and stays there, holds rows in place of lines."""
    start = file.read(len(MAGIC))
    file.seek(0)
    return start == MAGIC


def lines_in(file: BinaryIO) -> Iterator[bytes]:
    """Every line of the file; of those of more than MAX_LINE_BYTES, their first bytes alone.

    These are more than MAX_LINE_BYTES, too.
    """
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line
        while len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES + 1)


def check_input(path: Input) -> None:
    """Refuse what cannot be read twice or is neither parquet nor a file of JSON lines in UTF-8 as a whole.

    That is, what is packed, empty, of another format or encoding, or one JSON value over many
    lines; JobError says which.
    """
    with open_input(path) as file, told_of_reading(path):
        if is_parquet(file):
            check_parquet(file, f"--input: {path}")
            return
        _check_form(path, file.read(_START))
        file.seek(0)
        is_empty = all(not line.strip() for line in lines_in(file))
    if is_empty:
        raise JobError(f"--input: {path}", "<no lines>", "must hold a request at least", "check what wrote it")


@contextmanager
def told_of_reading(path: Input) -> Generator[None]:
    """Within it, a disk or a network that fails is told as JobError."""
    try:
        yield
    except OSError as error:
        found = error.strerror or in_a_line(error)
        raise JobError(f"--input: {path}", f"<{found}>", "must be readable", "check the disk or the network") from error


def _check_form(path: Input, start: bytes) -> None:
    """Refuse what is no JSON lines from its first bytes on."""
    found, remedy = _other_form(start)
    if found:
        raise JobError(f"--input: {path}", f"<{found}>", "must be JSON lines in UTF-8, a request a line", remedy)


def _other_form(start: bytes) -> tuple[str, str]:
    """What the bytes begin in place of JSON lines, and what makes lines of it; empty if nothing."""
    for magic, (name, program) in _PACKED.items():
        if start.startswith(magic):
            return name, f"unpack it with {program} first"
    for magic, name in _OTHER.items():
        if start.startswith(magic):
            return name, "write it as JSON lines first"
    wide = next((name for mark, name in _WIDE.items() if start.startswith(mark)), "")
    if wide or b"\x00" in start[:4]:
        return wide or "UTF-16", f"convert it: iconv -f {wide or 'UTF-16'} -t UTF-8"
    text = start.removeprefix(_MARK).lstrip()
    first = text.split(b"\n", 1)[0].strip()
    if first == b"[" or (first.startswith(b"[") and first[1:].lstrip()[:1] in {b"{", b"]"}):
        return "a JSON array", "write its items one a line: jq -c '.[]'"
    if first == b"{":
        return "a JSON object over several lines", "write each request on one line: jq -c ."
    return "", ""
