"""Reading a disk in large blocks past the page cache, with several reads on their way at once.

Large files that lie in the folder are read as they are. Otherwise a file of random bytes is written
there first; it has no name from the moment it is made, so that nothing is left of it whatever ends
the process.
"""

import errno
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import local
from typing import Final

import numpy as np

from hrm.files import write_all
from hrm.hardware import Disk, Figure, Rate, Source
from hrm.profiling.timing import Call, Timing, summarise, time_each
from hrm.units import GIB, MIB, counted, format_bytes

BLOCK_BYTES: Final = 4 * MIB
BLOCKS_A_CALL: Final = 16
QUICK_DEPTHS: Final = (4,)
FULL_DEPTHS: Final = (1, 4, 16)
QUICK_BYTES: Final = 128 * MIB
FULL_BYTES: Final = 2 * GIB
MAX_SHARE_OF_FREE: Final = 0.25
WRITING_SHARE: Final = 0.5  # of the time
MOST_FILES: Final = 64
IN_MEMORY: Final = frozenset({"tmpfs", "ramfs"})


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Open files and the blocks of them that are read; whether past the page cache."""

    files: tuple[int, ...]
    places: tuple[tuple[int, int], ...]  # file and offset
    direct: bool


class DiskError(Exception):
    """A folder where nothing can be measured, and why."""


def measure_disk(folder: Path, *, budget_s: float, quick: bool, num_bytes: int | None = None) -> Disk:
    """Bytes a second out of the files of a folder, or of a file that is written to it first.

    Raises DiskError if the folder cannot be read or written to, or the disk is full.
    """
    usual = QUICK_BYTES if quick else FULL_BYTES
    wanted = usual if num_bytes is None else num_bytes
    start_s = time.monotonic()
    try:
        usage = shutil.disk_usage(folder)
        with ExitStack() as stack:
            own = large_files(folder, wanted)
            if own:
                blocks = stack.enter_context(_opened(own))
                what = f"{counted(len(own), 'file')} that lie there"
            else:
                limit = min(wanted, int(MAX_SHARE_OF_FREE * usage.free))
                written = stack.enter_context(_nameless_file(folder, limit, seconds=WRITING_SHARE * budget_s))
                blocks = stack.enter_context(_opened([f"/proc/self/fd/{written}"]))
                what = "a file written before"
            left_s = max(budget_s - (time.monotonic() - start_s), 0.2 * budget_s)
            depths = QUICK_DEPTHS if quick else FULL_DEPTHS
            timings = _read(blocks, depths, left_s)
    except OSError as error:
        raise DiskError(f"{folder}: {error.strerror or error}") from error
    system = file_system(folder)
    size = format_bytes(len(blocks.places) * BLOCK_BYTES)
    note = f"{what}, {size} in blocks of {format_bytes(BLOCK_BYTES)}, "
    note += "past the page cache" if blocks.direct else "page cache dropped before each read"
    if system in IN_MEMORY:
        note += f"; {system} is memory, not a disk"
    work = BLOCKS_A_CALL * BLOCK_BYTES
    figures = {
        depth: timing.rate(work, f"{counted(depth, 'read')} at once of {note}") for depth, timing in timings.items()
    }
    best = max(figures.values(), key=lambda figure: figure.value)
    return Disk(
        path=str(folder),
        capacity_bytes=Figure(
            value=float(usage.total),
            source=Source.MEASURED,
            note=f"{system or 'file system'}, {format_bytes(usage.free)} free",
        ),
        read_bytes_per_s=Rate(ceiling=best, achieved=figures.get(4) or best),
    )


def large_files(folder: Path, wanted: int) -> list[str]:
    """Files of a folder that have so many bytes together, the largest first; none if they don't.

    Only files of whole blocks count, and sparse ones do not: their holes are not read.
    """
    found: list[tuple[int, str]] = []
    for path in folder.iterdir():
        if not path.is_file() or not os.access(path, os.R_OK):
            continue
        status = path.stat()
        if status.st_size >= BLOCK_BYTES and status.st_blocks * 512 >= 0.9 * status.st_size:
            found.append((status.st_size, str(path)))
    chosen = sorted(found, reverse=True)[:MOST_FILES]
    enough = sum(size // BLOCK_BYTES * BLOCK_BYTES for size, _ in chosen) >= wanted
    return [path for _, path in chosen] if enough else []


def file_system(folder: Path) -> str:
    """The kind of file system that a folder lies on, if the kernel tells."""
    import psutil

    place, best = str(folder.resolve()), ("", "")
    for part in psutil.disk_partitions(all=True):
        top = part.mountpoint.rstrip("/")
        if (place == top or place.startswith(f"{top}/")) and len(part.mountpoint) >= len(best[0]):
            best = (part.mountpoint, part.fstype)
    return best[1]


@contextmanager
def _nameless_file(folder: Path, num_bytes: int, *, seconds: float) -> Generator[int]:
    """A file of random bytes without a name; shorter if writing it takes longer than `seconds`.

    Raises OSError if not even one block can be written.
    """
    if num_bytes < BLOCK_BYTES:
        raise OSError(errno.ENOSPC, "too little space is free for a block")
    handle, path = tempfile.mkstemp(prefix=".hrm-disk-", dir=folder)
    try:
        os.unlink(path)  # noqa: PTH108 - at once, between two calls of the system
        random = np.random.default_rng(0)
        end_s = time.monotonic() + seconds
        for block in range(num_bytes // BLOCK_BYTES):
            if block and time.monotonic() > end_s:
                break
            try:
                write_all(handle, random.bytes(BLOCK_BYTES))
            except OSError as error:
                if error.errno != errno.ENOSPC or block == 0:
                    raise
                break
        os.fsync(handle)
        yield handle
    finally:
        os.close(handle)


@contextmanager
def _opened(paths: Sequence[str]) -> Generator[_Blocks]:
    """The files open for reading past the page cache, or through it where that is refused."""
    with ExitStack() as stack:
        files: list[int] = []
        direct = True
        for path in paths:
            try:
                handle = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
                direct = direct and hasattr(os, "O_DIRECT")
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                handle, direct = os.open(path, os.O_RDONLY), False
            stack.callback(os.close, handle)
            files.append(handle)
        places = [
            (handle, offset)
            for handle in files
            for offset in range(0, os.fstat(handle).st_size - BLOCK_BYTES + 1, BLOCK_BYTES)
        ]
        if not places:
            raise OSError(errno.ENOSPC, "nothing could be written")
        yield _Blocks(tuple(files), tuple(places), direct)


def _read(blocks: _Blocks, depths: Sequence[int], budget_s: float) -> dict[int, Timing]:
    """Timings of reading `BLOCKS_A_CALL` blocks, by how many reads are on their way at once."""
    buffers, position = local(), 0

    def read(place: tuple[int, int]) -> None:
        if not hasattr(buffers, "memory"):
            buffers.memory = mmap.mmap(-1, BLOCK_BYTES)  # direct reads need whole pages
        handle, offset = place
        if not blocks.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, offset, BLOCK_BYTES, os.POSIX_FADV_DONTNEED)
        if os.preadv(handle, [buffers.memory], offset) != BLOCK_BYTES:
            raise OSError(errno.EIO, "a file became shorter while it was read")

    def call_with(pool: ThreadPoolExecutor) -> Call:
        def call() -> None:
            nonlocal position
            count = len(blocks.places)
            places = [blocks.places[(position + i) % count] for i in range(BLOCKS_A_CALL)]
            position += BLOCKS_A_CALL
            list(pool.map(read, places))

        return call

    with ExitStack() as stack:
        calls = {depth: call_with(stack.enter_context(ThreadPoolExecutor(depth))) for depth in depths}
        taken = time_each(calls, budget_s=budget_s)
    return {depth: summarise(seconds) for depth, seconds in taken.items()}
