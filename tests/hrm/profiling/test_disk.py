"""Reading a disk: what is read, what is written for it, and that nothing of it stays."""

import errno
import os
from pathlib import Path

import pytest

from hrm.hardware import Source
from hrm.profiling import disk
from hrm.profiling.disk import BLOCK_BYTES, DiskError, large_files, measure_disk
from hrm.units import MIB


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Few blocks and samples; writing has all the time that it needs."""
    monkeypatch.setattr(disk, "BLOCKS_A_CALL", 2)
    monkeypatch.setattr(disk, "WRITING_SHARE", 1000)
    monkeypatch.setattr("hrm.profiling.timing.MAX_SAMPLES", 3)


def fill(path, num_bytes):
    path.write_bytes(os.urandom(MIB) * (num_bytes // MIB))


def open_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def measure(folder, **changes):
    return measure_disk(folder, **({"budget_s": 1.0, "quick": True, "num_bytes": 16 * MIB} | changes))


def test_a_file_is_written_read_and_gone(tmp_path):
    found = measure(tmp_path)
    figure = found.read_bytes_per_s.planned
    assert figure.source is Source.MEASURED
    assert figure.samples >= 3
    assert "4 reads at once of a file written before, 16.8 MB" in figure.note
    assert found.path == str(tmp_path)
    assert found.capacity_bytes.value > 0
    assert list(tmp_path.iterdir()) == []


def test_full_mode_compares_numbers_of_reads(tmp_path):
    found = measure(tmp_path, quick=False)
    best, planned = found.read_bytes_per_s.ceiling, found.read_bytes_per_s.planned
    assert best is not None
    assert best.value >= planned.value
    assert planned.note.startswith("4 reads at once")


def test_large_files_are_read_where_they_lie(tmp_path, monkeypatch):
    fill(tmp_path / "a.safetensors", 12 * MIB)
    fill(tmp_path / "b.safetensors", 8 * MIB)
    fill(tmp_path / "config.json", MIB)
    monkeypatch.setattr(disk, "_nameless_file", None)  # nothing is written
    note = measure(tmp_path).read_bytes_per_s.planned.note
    assert "2 files that lie there, 21.0 MB" in note


def test_only_whole_files_of_enough_bytes_count(tmp_path):
    fill(tmp_path / "small", MIB)
    fill(tmp_path / "one", 8 * MIB)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(64 * MIB)
    (tmp_path / "folder").mkdir()
    assert large_files(tmp_path, 16 * MIB) == []
    assert large_files(tmp_path, 8 * MIB) == [str(tmp_path / "one")]
    assert large_files(tmp_path, 8 * MIB + 1) == []


def test_every_block_of_every_file_is_read(tmp_path, monkeypatch):
    fill(tmp_path / "a", 2 * BLOCK_BYTES + MIB)
    fill(tmp_path / "b", BLOCK_BYTES)
    offsets, read = set(), os.preadv

    def preadv(handle, buffers, offset):
        offsets.add((Path(f"/proc/self/fd/{handle}").readlink().name, offset))
        return read(handle, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    measure(tmp_path, num_bytes=3 * BLOCK_BYTES)
    assert offsets == {("a", 0), ("a", BLOCK_BYTES), ("b", 0)}


def test_a_file_system_without_direct_reads_is_read_through_its_cache(tmp_path, monkeypatch):
    opened = os.open

    def refuse(path, flags, *rest, **more):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no direct reads here")
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    assert "page cache dropped before each read" in measure(tmp_path).read_bytes_per_s.planned.note


def test_memory_is_not_passed_off_as_a_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "file_system", lambda _: "tmpfs")
    assert "tmpfs is memory, not a disk" in measure(tmp_path).read_bytes_per_s.planned.note


def test_a_slow_disk_gets_a_shorter_file(tmp_path):
    with disk._nameless_file(tmp_path, 64 * MIB, seconds=0.0) as handle:
        assert os.fstat(handle).st_size == BLOCK_BYTES
        assert list(tmp_path.iterdir()) == []


def test_no_more_than_a_share_of_what_is_free_is_written(tmp_path, monkeypatch):
    usage = disk.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=8 * BLOCK_BYTES))
    assert "8.39 MB in blocks" in measure(tmp_path, num_bytes=64 * MIB).read_bytes_per_s.planned.note
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage._replace(free=BLOCK_BYTES))
    with pytest.raises(DiskError, match="too little space"):
        measure(tmp_path)


@pytest.mark.parametrize("blocks", [0, 2])
def test_a_disk_that_fills_up(tmp_path, monkeypatch, blocks):
    """With some blocks written, those are read; with none it says why. Nothing stays."""
    written, write = [], disk.write_all

    def full(handle, data):
        if len(written) == blocks:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(data)
        write(handle, data)

    monkeypatch.setattr(disk, "write_all", full)
    if blocks:
        assert "8.39 MB in blocks" in measure(tmp_path).read_bytes_per_s.planned.note
    else:
        with pytest.raises(DiskError, match="No space left on device"):
            measure(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["write_all", "time_each"])
def test_interrupted_it_leaves_nothing(tmp_path, monkeypatch, stage):
    handles = open_files()

    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(disk, stage, stop)
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert open_files() == handles


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DiskError, match="No such file"):
        measure(tmp_path / "nowhere")
