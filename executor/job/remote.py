"""Files of requests that lie elsewhere, by their URLs: what pyarrow has a file system for."""

from io import BufferedReader
from typing import Any, BinaryIO, Final, cast

from executor.errors import JobError
from executor.guard import in_a_line
from hrm.units import MIB

INSTALL: Final = "pip install 'moe-hrm[parquet]'"
_PIECE_BYTES: Final = 4 * MIB  # that are fetched at once


def open_url(url: str) -> BinaryIO:
    """The file of a URL such as s3://bucket/name, opened for reading piece by piece; JobError if it cannot be."""
    where = f"--input: {url}"
    try:
        from pyarrow.fs import FileType
    except ImportError as error:
        raise JobError(where, "<pyarrow is not installed>", "needs the package pyarrow", INSTALL) from error
    try:
        file_system, path = file_system_of(url)
    except (OSError, ValueError) as error:
        rule = "must be a URL that pyarrow.fs reads: s3, gs, abfs, hdfs or file"
        raise JobError(where, f"<{in_a_line(error)}>", rule, "correct it, or name a file here") from error
    try:
        kind = file_system.get_file_info(path).type
        if kind is FileType.File:
            return cast("BinaryIO", BufferedReader(file_system.open_input_file(path), _PIECE_BYTES))
        found = {FileType.NotFound: "no such file", FileType.Directory: "a folder"}.get(kind, "no plain file")
    except (OSError, ValueError) as error:
        found = in_a_line(error)
    remedy = "check bucket, name, region and credentials"
    raise JobError(where, f"<{found}>", "must be a readable file of requests", remedy)


def file_system_of(url: str) -> tuple[Any, str]:
    """The file system of pyarrow for a URL, and the path in it; OSError or ValueError if there is none."""
    from pyarrow.fs import FileSystem

    return FileSystem.from_uri(url)
