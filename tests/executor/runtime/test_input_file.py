"""Files that are no JSON lines are told as such, whatever they are."""

import bz2
import gzip
import io
import json
import lzma
import zipfile

import pytest

from executor.errors import JobError
from executor.job import input_file
from executor.job.input_file import check_input
from executor.job.requests import lines_of

LINE = json.dumps({"custom_id": "a", "body": {"prompt": "hé"}})
LINES = f"{LINE}\n\n{LINE}\n"


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("prompts.jsonl", LINES)
    return file.getvalue()


def parquet() -> bytes:
    return b"PAR1" + bytes(20) + b"PAR1"


OTHERS = {
    "gzip": (gzip.compress(LINES.encode()), "gzip", "gunzip"),
    "zip": (zipped(), "zip", "unzip"),
    "bzip2": (bz2.compress(LINES.encode()), "bzip2", "bunzip2"),
    "xz": (lzma.compress(LINES.encode()), "xz", "unxz"),
    "parquet": (parquet(), "must be parquet that can be read", "write it again"),
    "utf-16": (LINES.encode("utf-16"), "UTF-16", "iconv -f UTF-16"),
    "utf-16 without a mark": (LINES.encode("utf-16-le"), "UTF-16", "iconv"),
    "utf-16 the other way": (LINES.encode("utf-16-be"), "UTF-16", "iconv"),
    "utf-32": (LINES.encode("utf-32"), "UTF-32", "iconv -f UTF-32"),
    "array": (f"[{LINE}, {LINE}]".encode(), "a JSON array", "jq -c '.[]'"),
    "array over lines": (json.dumps([json.loads(LINE)], indent=1).encode(), "a JSON array", "jq"),
    "array behind a mark": (b"\xef\xbb\xbf [" + LINE.encode() + b"]", "a JSON array", "jq"),
    "empty array": (b"[]", "a JSON array", "jq"),
    "object over lines": (json.dumps(json.loads(LINE), indent=1).encode(), "several lines", "jq"),
    "nothing": (b"", "no lines", "check what wrote it"),
    "blank lines": (b"\n  \r\n\t\n", "no lines", "check what wrote it"),
}


@pytest.mark.parametrize(("content", "found", "remedy"), OTHERS.values(), ids=OTHERS)
def test_other_forms_are_named(content, found, remedy, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(JobError) as caught:
        check_input(path)
    for part in ("--input", "prompts.jsonl", found, remedy):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        LINES.encode(),
        b"\xef\xbb\xbf" + LINES.encode(),
        LINES.replace("\n", "\r\n").encode(),
        b"[1]\n" + LINE.encode(),
        LINE.encode() + b"\n{nope",
    ],
)
def test_lines_pass_and_bad_ones_are_left_to_the_reader(content, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    check_input(path)


@pytest.mark.parametrize("length", [99, 100, 101, 250, 1000])
def test_lines_too_long_are_rejected_alone_in_little_room(length, tmp_path, monkeypatch):
    monkeypatch.setattr(input_file, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr("executor.job.requests.MAX_LINE_BYTES", 100)
    long = json.dumps({"custom_id": "b"}).ljust(length - 1) + "\n"
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"{LINE}\n{long}{json.dumps({'custom_id': 'c'})}\n")
    found = list(lines_of(path))
    assert [line.number for line in found] == [1, 2, 3]
    assert [line.name for line in found] == ["a", "b" if length <= 100 else "", "c"]
    if length > 100:
        assert "over 100 B" in str(found[1].error)
