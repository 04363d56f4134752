"""Files of users: what is no plain file is refused by name, and nothing is waited for."""

import os
import stat

import pytest

from hrm.errors import HrmError, PolicyError, ProfileError
from hrm.files import read_regular


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
    ("name", "said"),
    [("none", "No such file or directory"), ("n" * 300, "File name too long"), ("\0", "null")],
)
def test_a_file_that_cannot_be_opened_says_why(tmp_path, name, said):
    with pytest.raises(HrmError, match=f"{said}.*must be a file; look again"):
        read_regular(tmp_path / name, "a file", remedy="look again")
