"""Requests in parquet and at URLs: the same requests as JSON lines, read piece by piece, and mistakes in one line."""

import json
import sys
from decimal import Decimal
from io import BytesIO

import pyarrow as pa
import pytest
from pyarrow import fs, parquet

from executor.errors import JobError
from executor.job import parquet as reader
from executor.job import remote
from executor.job.identity import digest_of_line
from executor.job.input_file import check_input, input_named
from executor.job.requests import lines_of
from tests.executor.runtime.jobs import PROMPTS, exit_code, line, outputs, refused, run_words, write_lines

TALK = [{"role": "user", "content": "Hi", "name": None}, {"role": "assistant", "content": "Ho", "name": "Jo"}]
LINES = [line(f"r{index}", prompt) for index, prompt in enumerate(PROMPTS)]


def table(path, columns):
    parquet.write_table(pa.table(columns), path)
    return path


def as_rows(path, lines=LINES):
    """The same requests as JSON lines, a column for each field of their bodies."""
    bodies = [item["body"] for item in lines]
    columns = {key: [body[key] for body in bodies] for key in ("prompt", "max_tokens", "temperature")}
    return table(path, {"custom_id": [item["custom_id"] for item in lines], **columns})


@pytest.mark.parametrize("form", ["body is a struct", "body is a text", "columns of a body"])
def test_rows_are_the_lines_of_json_to_the_last_digest(form, tmp_path):
    bodies = [{"messages": TALK, "max_tokens": 5}, {"messages": TALK[:1], "max_tokens": None}]
    # As JSON has it: what a table must hold as null is not there.
    plain = [
        {"messages": [{k: v for k, v in one.items() if v is not None} for one in body["messages"]]}
        | ({"max_tokens": 5} if body["max_tokens"] else {})
        for body in bodies
    ]
    ids, url = ["a", "b"], "/v1/chat/completions"
    columns = {
        "body is a struct": {"custom_id": ids, "url": [url, url], "body": bodies},
        "body is a text": {"custom_id": ids, "url": [url, url], "body": [json.dumps(body) for body in plain]},
        "columns of a body": {"custom_id": ids, **{key: [body[key] for body in bodies] for key in bodies[0]}},
    }[form]
    path = table(tmp_path / "a.parquet", columns)
    check_input(path)
    found = list(lines_of(path))
    assert [one.error for one in found] == [None, None]
    expected = [{"custom_id": name, "url": url, "body": body} for name, body in zip(ids, plain, strict=True)]
    assert [one.content for one in found] == expected
    assert [digest_of_line(one.content) for one in found] == [digest_of_line(one) for one in expected]


def test_rows_without_names_are_numbered_and_bad_ones_fail_alone(tmp_path):
    path = table(tmp_path / "a.parquet", {"body": ['{"prompt": "a"}', "{", '{"prompt": "c"}']})
    found = list(lines_of(path))
    assert [(one.number, one.name) for one in found] == [(1, "row-1"), (2, ""), (3, "row-3")]
    assert "JSON object" in str(found[1].error)
    path = table(tmp_path / "b.parquet", {"custom_id": ["x", None, "x"], "prompt": ["a", "b", "c"]})
    errors = [str(one.error) for one in lines_of(path)]
    assert "custom_id is <missing>" in errors[1]
    assert "must not occur twice" in errors[2]


def test_rows_are_read_some_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "_ROWS", 4)
    path = table(tmp_path / "a.parquet", {"prompt": [f"p{index}" for index in range(30)]})
    before = pa.total_allocated_bytes()
    lines = lines_of(path)
    assert [next(lines).content["body"]["prompt"] for _ in range(6)] == [f"p{index}" for index in range(6)]
    assert pa.total_allocated_bytes() - before < 2**20
    assert len(list(lines)) == 24


def test_a_job_goes_on_with_rows_where_it_began_with_lines(folder, policy_path, tmp_path, capsys):
    def run(path, *more):
        return exit_code(run_words(folder, policy_path, path, tmp_path / "run", "--quiet", *more))

    assert run(write_lines(tmp_path, LINES), "--max-requests", "4") == 0
    early = outputs(tmp_path / "run")
    bare = [{key: item[key] for key in ("custom_id", "body")} for item in LINES]
    rows = as_rows(tmp_path / "rows.parquet")
    # A line that says `method` and `url` is another than one that leaves them out.
    assert run(rows, "--resume") == 2
    refused(capsys.readouterr(), "rows.parquet: line 1", "<changed>")
    (tmp_path / "run" / "outputs.jsonl").unlink()
    assert run(write_lines(tmp_path, bare), "--max-requests", "4", "--resume") == 0
    assert run(f"file://{rows}", "--resume") == 0
    done = outputs(tmp_path / "run")
    assert done.keys() == {item["custom_id"] for item in LINES}
    assert all(
        done[name]["response"]["body"]["choices"] == early[name]["response"]["body"]["choices"] for name in early
    )


WRONG = {
    "decimal": ({"prompt": ["a"], "max_tokens": [Decimal(5)]}, "column 'max_tokens'", "decimal128", "what JSON has"),
    "bytes": ({"prompt": [b"a"]}, "column 'prompt'", "<binary>", "a text, or a list of token ids"),
    "numbers as names": ({"prompt": ["a"], "custom_id": [1]}, "column 'custom_id'", "<int64>", "must be a text"),
    "one message": ({"messages": ["Hi"]}, "column 'messages'", "<string>", "a list of structs"),
    "time within": ({"body": [{"prompt": "a", "t": pa.scalar(0, pa.timestamp("s"))}]}, "column 'body'", "a struct"),
    "nothing asked": ({"text": ["a"]}, "<columns text>", "must have a column body, messages or prompt"),
    "no rows": ({"prompt": pa.array([], pa.string())}, "<no rows>", "must hold a request"),
}


@pytest.mark.parametrize("case", WRONG)
def test_tables_that_cannot_be_requests_are_refused_by_column(case, tmp_path):
    columns, *words = WRONG[case]
    path = table(tmp_path / "a.parquet", columns)
    with pytest.raises(JobError) as caught:
        check_input(path)
    assert all(word in str(caught.value) for word in ("--input", "a.parquet", *words)), caught.value


def test_broken_files_and_a_missing_package_are_told(tmp_path, monkeypatch):
    path = as_rows(tmp_path / "a.parquet")
    whole = path.read_bytes()
    for content in (whole[:-9], whole[:40] + bytes(60) + whole[100:]):
        path.write_bytes(content)
        with pytest.raises(JobError, match=r"--input: \S+a.parquet is <.*>: must be parquet that can be read"):
            list(lines_of(path))
    path.write_bytes(whole)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(JobError, match=r"needs the package pyarrow; pip install 'moe-hrm\[parquet\]'"):
        check_input(path)


@pytest.mark.parametrize("form", ["lines", "rows"])
def test_a_url_names_a_file_of_any_file_system(form, tmp_path, monkeypatch):
    bucket = tmp_path / "bucket"
    bucket.mkdir()
    path = write_lines(bucket, LINES) if form == "lines" else as_rows(bucket / "rows.parquet")
    there = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    monkeypatch.setattr(remote, "file_system_of", lambda url: (there, url.removeprefix("s3://")))
    url = input_named(f"s3://bucket/{path.name}")
    assert isinstance(url, str)
    check_input(url)
    assert [(one.number, one.name, one.content) for one in lines_of(url)] == [
        (one.number, one.name, one.content) for one in lines_of(path)
    ]
    with pytest.raises(JobError, match="<a folder>"):
        check_input("s3://bucket")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mock:///none.jsonl", ("<no such file>", "check bucket, name")),
        ("https://a.b/c.jsonl", ("must be a URL that pyarrow.fs reads", "s3")),
        ("file:///none/at/all.jsonl", ("<no such file>",)),
        ("s3://", ("s3",)),
    ],
)
def test_urls_of_nothing_are_refused(url, words):
    with pytest.raises(JobError) as caught:
        check_input(url)
    assert all(word in str(caught.value) for word in (f"--input: {url}", *words)), caught.value


def test_a_network_that_fails_and_a_missing_package_are_told(monkeypatch):
    class Failing(BytesIO):
        def readline(self, size=-1):
            raise OSError("AWS Error NETWORK_CONNECTION")

    monkeypatch.setattr("executor.job.input_file.open_url", lambda url: Failing(b'{"custom_id": "a"}\n'))
    with pytest.raises(
        JobError, match="--input: s3://b/c is <OSError: AWS Error NETWORK_CONNECTION>: must be readable"
    ):
        list(lines_of("s3://b/c"))
    monkeypatch.setitem(sys.modules, "pyarrow.fs", None)
    with pytest.raises(JobError, match="needs the package pyarrow"):
        remote.open_url("s3://b/c")
