"""Files of users: odd ones are refused by name, and whatever fails, none is half written."""

import errno
import fcntl
import os
import resource
import stat
import subprocess
import sys

import pytest

from hrm.errors import HrmError, PolicyError, ProfileError
from hrm.files import check_writable, create_anew, open_append, read_regular, write_whole, writing
from hrm.locks import open_locked


def test_a_plain_file_is_read_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"12345")
    (tmp_path / "link.json").symlink_to(path)
    assert read_regular(path, "a file", max_bytes=5) == b"12345"
    assert read_regular(tmp_path / "link.json", "a file") == b"12345"


@pytest.mark.parametrize("size", [6, 10 * 10**9])
def test_a_file_of_more_than_the_limit_is_refused_unread(tmp_path, size):
    path = tmp_path / "a.json"
    path.touch()
    os.truncate(path, size)
    with pytest.raises(ProfileError, match=r"a\.json is <.*B>: must be a profile of at most 5 B"):
        read_regular(path, "a profile", ProfileError, max_bytes=5)


def test_a_file_that_does_not_tell_its_size_is_bounded_too():
    assert b"Linux" in read_regular("/proc/version", "a file")
    with pytest.raises(HrmError, match="must be a file of at most 5 B"):
        read_regular("/proc/version", "a file", max_bytes=5)


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a device", "a socket"])
def test_what_is_no_plain_file_is_refused_by_name_and_not_waited_for(tmp_path, kind):
    path = tmp_path / "x"
    match kind:
        case "a pipe":
            os.mkfifo(path)
        case "a folder":
            path.mkdir()
        case "a device":
            path.symlink_to("/dev/zero")
        case _:
            os.mknod(path, stat.S_IFSOCK | 0o600)
    with pytest.raises(PolicyError, match=f"x is <{kind}>: must be a policy file; name a file"):
        read_regular(path, "a policy file", PolicyError)


@pytest.mark.parametrize(
    ("name", "said"), [("none", "No such file or directory"), ("n" * 300, "File name too long"), ("\0", "null")]
)
def test_a_file_that_cannot_be_opened_says_why(tmp_path, name, said):
    with pytest.raises(HrmError, match=f"{said}.*must be a file; look again"):
        read_regular(tmp_path / name, "a file", remedy="look again")


# -------------------------------------------------------------------------------------- writing


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_new_file_has_ordinary_permissions_and_a_replaced_one_keeps_its_own(tmp_path):
    path, private = tmp_path / "new", tmp_path / "private"
    private.write_text("old")
    private.chmod(0o640)
    before = os.umask(0o027)
    try:
        write_whole(path, "new")
    finally:
        os.umask(before)
    write_whole(private, b"new")
    assert (path.read_text(), private.read_text()) == ("new", "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert stat.S_IMODE(private.stat().st_mode) == 0o640
    assert entries(tmp_path) == ["new", "private"]


def test_names_as_long_as_names_may_be_can_be_written(tmp_path):
    path = tmp_path / ("n" * 255)
    write_whole(path, "x")
    assert path.read_text() == "x"


@pytest.mark.parametrize("dangling", [False, True])
def test_nothing_is_written_through_a_link(tmp_path, dangling):
    target, link = tmp_path / "target", tmp_path / "link"
    link.symlink_to(target)
    if not dangling:
        target.write_text("another's")
    for refuse in (check_writable, lambda path: write_whole(path, "new")):
        with pytest.raises(HrmError, match=r"link is <a link to .*target, which is not written"):
            refuse(link)
    assert link.is_symlink()
    assert entries(tmp_path) == (["link"] if dangling else ["link", "target"])
    assert dangling or target.read_text() == "another's"


@pytest.mark.parametrize("kind", ["a folder", "a socket"])
def test_what_cannot_be_replaced_is_refused_by_name(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "a folder":
        path.mkdir()
    else:
        os.mknod(path, stat.S_IFSOCK | 0o600)
    for refuse in (check_writable, lambda path, kind: write_whole(path, "new", kind)):
        with pytest.raises(PolicyError, match=f"x is <{kind}>: must be writable; choose another"):
            refuse(path, PolicyError)


def test_a_pipe_is_written_to_and_stays(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(path, b"all of it")
    assert os.read(reader, 100) == b"all of it"
    os.close(reader)
    assert stat.S_ISFIFO(path.lstat().st_mode)
    assert entries(tmp_path) == ["pipe"]


def test_a_pipe_whose_reader_goes_is_a_broken_pipe(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        write_whole(f"/dev/fd/{writer}", b"x")
    os.close(writer)


def test_devices_are_written_to_and_stay():
    write_whole("/dev/null", b"gone")
    assert stat.S_ISCHR(os.lstat("/dev/null").st_mode)
    with pytest.raises(HrmError, match="/dev/full is <No space left on device>: must be writable"):
        write_whole("/dev/full", b"x")
    assert stat.S_ISCHR(os.lstat("/dev/full").st_mode)


def test_an_open_file_that_is_named_is_written_to_where_it_stands(tmp_path):
    path = tmp_path / "log"
    with path.open("wb", buffering=0) as file:
        file.write(b"before ")
        for name in (f"/dev/fd/{file.fileno()}", f"/proc/self/fd/{file.fileno()}"):
            check_writable(name)
            write_whole(name, b"here ")
        file.write(b"after")
    assert path.read_bytes() == b"before here here after"
    assert entries(tmp_path) == ["log"]


CALLS = ("open", "write", "fsync", "fchmod")


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("name", CALLS)
def test_whatever_fails_the_file_is_old_or_new_and_nothing_is_left(tmp_path, monkeypatch, name, old, failure):
    path, new = tmp_path / "a.json", b"new content " * 100
    original, calls = getattr(os, name), 0

    def failing(*args, **options):
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise failure
        if name == "write":  # a disk that is nearly full takes some of it
            return original(args[0], bytes(args[1])[:500])
        return original(*args, **options)

    for fails_at in range(1, 10):
        calls = 0
        path.unlink(missing_ok=True)
        if old is not None:
            path.write_bytes(old)
        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            try:
                write_whole(path, new)
                said = ""
            except (HrmError, KeyboardInterrupt) as error:
                said = f"{type(error).__name__} {error}"
        left = path.read_bytes() if path.exists() else None
        assert left in (old, new)
        assert left == new or "No space left" in said or "KeyboardInterrupt" in said
        assert entries(tmp_path) == ([] if left is None else ["a.json"])
        if calls < fails_at:
            break
    else:
        pytest.fail(f"os.{name} was called ever more often")
    assert fails_at > (name != "fchmod" or old is not None), "it must have failed at least once"


def test_a_real_limit_on_file_sizes_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(HrmError, match=r"a\.json is <File too large>: must be writable"):
            write_whole(path, b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old"
    assert entries(tmp_path) == ["a.json"]


def test_an_exception_between_the_pieces_of_a_file_leaves_the_old_one(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text("old")

    def write_some():
        with writing(path) as write:
            write(b"new")
            raise KeyError

    with pytest.raises(KeyError):
        write_some()
    assert path.read_text() == "old"
    assert entries(tmp_path) == ["trace.json"]


@pytest.mark.parametrize("target", [".", "missing/x"])
def test_places_that_cannot_be_written_are_refused_before_the_work(tmp_path, target):
    with pytest.raises(HrmError, match="must be writable"):
        check_writable(tmp_path / target)
    assert entries(tmp_path) == []


def child(script, *args):
    """A Python process that runs `script`, started."""
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def told(process) -> str:
    """The next line that a child prints."""
    assert process.stdout is not None
    return process.stdout.readline()


WRITER = """
import sys
from hrm.files import write_whole
letter, path = sys.argv[1:]
print("ready", flush=True)
while True:
    write_whole(path, letter * 200_000)
"""


def test_concurrent_writers_and_kill_9_leave_one_whole_content(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("c" * 200_000)
    writers = [child(WRITER, letter, path) for letter in "ab"]
    try:
        for writer in writers:
            assert told(writer) == "ready\n"
        for _ in range(30):
            text = path.read_text()
            assert len(text) == 200_000
            assert len(set(text)) == 1
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    text = path.read_text()
    assert (len(text), len(set(text))) == (200_000, 1)


# ---------------------------------------------------------------------------------------- locks

HOLDER = """
import sys, time
from pathlib import Path
from hrm.locks import open_locked
file = open_locked(Path(sys.argv[1]))
print("locked", flush=True)
time.sleep(60)
"""


def test_a_locked_file_is_refused_with_its_holder_and_free_after_kill_9(tmp_path):
    path = tmp_path / "x"
    path.write_text("kept")
    holder = child(HOLDER, path)
    try:
        assert told(holder) == "locked\n"
        with pytest.raises(BlockingIOError) as refused:
            open_locked(path)
        assert refused.value.strerror in {f"in use by process {holder.pid}", "in use by another process"}
    finally:
        holder.kill()
        holder.communicate()
    with open_locked(path) as file:
        assert file.read() == b"kept"


def test_who_waits_for_a_file_that_is_removed_locks_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "x"
    original, removed = fcntl.flock, []

    def flock(file, how):
        if not removed:  # its holder ends and removes it between our opening and our locking it
            path.unlink()
            removed.append(True)
        return original(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with open_locked(path) as file:
        assert os.path.samestat(path.stat(), os.fstat(file.fileno()))


@pytest.mark.parametrize("opened", [open_locked, open_append])
def test_files_of_ours_are_never_opened_through_a_link_or_as_a_pipe(tmp_path, opened):
    (tmp_path / "target").write_text("another's")
    (tmp_path / "link").symlink_to("target")
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("link", "a link to target"), ("pipe", "a pipe")):
        with pytest.raises(OSError, match=said):
            opened(tmp_path / name)
    assert (tmp_path / "target").read_text() == "another's"


def test_a_file_made_anew_takes_the_place_of_a_link_not_of_its_target(tmp_path):
    (tmp_path / "target").write_text("another's")
    (tmp_path / "link").symlink_to("target")
    create_anew(tmp_path / "link")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "another's"
