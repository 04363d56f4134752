"""A run that was cut short, however it was, goes on as if it had not been; another job does not."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from executor.handlers import DecodeHandlers
from executor.job.identity import JOB_JSON
from executor.job.outputs import OUTPUTS
from hrm.policy_file import load_policy_file, save_policy_file
from tests.contracts.tasks import act
from tests.executor.runtime.jobs import PROMPTS, exit_code, line, outputs, refused, run_words
from tests.executor.tiny_models import save_tiny

LINES = [line(f"r{i}", prompt, max_tokens=2 + i % 5, temperature=i % 2) for i, prompt in enumerate(PROMPTS)]


def answers(done) -> dict:
    """All that does not depend on when and where a request was run."""
    return {name: (item["response"]["request_id"], item["response"]["body"]["choices"]) for name, item in done.items()}


def resumed(folder, policy_path, tmp_path) -> list[str]:
    """The command line that goes on with what the `run` fixture ran last."""
    return run_words(folder, policy_path, tmp_path / "prompts.jsonl", tmp_path / "run", "--resume")


def files_in(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_rejected_lines_are_tried_again_when_put_right(run):
    _, before = run([LINES[0], line("b", [97]), b"{", line("c", [3], n=3), LINES[1]])
    assert {n for n, item in before.items() if item["error"]} == {"b", "line-3", "c"}
    _, after = run([LINES[0], line("b", [3]), line("d", [4]), line("c", []), LINES[1]], "--resume")
    assert after.keys() == {"r0", "b", "d", "c", "r1"}
    assert {n for n, item in after.items() if item["error"]} == {"c"}
    assert {n: after[n] for n in ("r0", "r1")} == {n: before[n] for n in ("r0", "r1")}


def test_lines_still_rejected_do_not_use_up_the_requests(run):
    bad = [line(f"bad{i}", []) for i in range(4)]
    for count in (2, 4, 6):
        _, done = run([*bad, *LINES[:6]], "--resume", "--max-requests", "2")
        assert sum(item["error"] is None for item in done.values()) == count
    assert len(done) == 10


def test_names_of_broken_lines_are_nobody_elses(run):
    lines = [
        LINES[0],
        b'{"custom_id": "broken',
        line("line-2", [3]),
        line("broken-line-5", [4]),
        line("r0", [5]),
        line("line-5", [6]),
    ]
    _, done = run(lines)
    assert {n for n, item in done.items() if item["error"] is None} == {"r0", "line-2", "broken-line-5", "line-5"}
    messages = {n: item["error"]["message"] for n, item in done.items() if item["error"]}
    assert messages.keys() == {"broken-line-2", "broken-broken-line-5"}
    assert "line 2" in messages["broken-line-2"]
    assert "twice" in messages["broken-broken-line-5"]
    _, again = run(lines, "--resume")
    assert again == done


def other_weights(folder, tmp_path, policy_path):
    del folder, policy_path
    return ["--model", str(save_tiny("wide heads", tmp_path / "other", seed=1))]


def other_template(folder, tmp_path, policy_path):
    del policy_path
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    return ["--model", str(copy)]


def further_template(folder, tmp_path, policy_path):
    del policy_path
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "default.jinja").write_text("{{ messages }}")
    return ["--model", str(copy)]


def other_end_of_text(folder, tmp_path, policy_path):
    del policy_path
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "generation_config.json").write_text('{"eos_token_id": 9}')
    return ["--model", str(copy)]


def other_dtype(folder, tmp_path, policy_path):
    del folder, tmp_path
    content = load_policy_file(policy_path)
    policy = replace(content.policy, dtype="bfloat16", weight_format="", kv_format="")
    save_policy_file(policy_path, replace(content, policy=policy))
    return []


def other_kv_format(folder, tmp_path, policy_path):
    del folder, tmp_path
    content = load_policy_file(policy_path)
    save_policy_file(policy_path, replace(content, policy=replace(content.policy, kv_format="int8")))
    return []


OTHERS = {
    "weights": (other_weights, ["--model: weights"]),
    "template": (other_template, ["--model: tokenizer or chat template"]),
    "further template": (further_template, ["--model: tokenizer or chat template"]),
    "end of text": (other_end_of_text, ["--model: config"]),
    "dtype": (other_dtype, ["--policy: dtype", "bfloat16", "float32"]),
    "kv_format": (other_kv_format, ["--policy: kv_format", "int8", "float32"]),
    "seed": (lambda *_: ["--seed", "7"], ["--seed", "7", "0"]),
    "nothing computed": (lambda *_: ["--accelerator", "null"], ["--accelerator"]),
}


@pytest.mark.parametrize(("change", "words"), OTHERS.values(), ids=OTHERS)
def test_another_job_is_refused_by_name(run, folder, tmp_path, policy_path, capsys, change, words):
    run(LINES[:2])
    before = files_in(tmp_path / "run")
    arguments = resumed(folder, policy_path, tmp_path)
    option, *value = change(folder, tmp_path, policy_path) or [""]
    if option in arguments:
        at = arguments.index(option)
        del arguments[at : at + 2]
    assert exit_code([*arguments, *filter(None, [option]), *value]) == 2
    refused(capsys.readouterr(), str(tmp_path / "run"), *words)
    assert files_in(tmp_path / "run") == before


CHANGED = {
    "prompt": (lambda lines: [line("r0", [3, 4]), *lines[1:]], ["line 1", "'r0'", "changed"]),
    "temperature": (
        lambda lines: [lines[0], {**lines[1], "body": {**lines[1]["body"], "temperature": 0.5}}],
        ["line 2", "'r1'", "changed"],
    ),
    "answered line gone": (lambda lines: [*lines[:1], line("new", [3])], ["'r1'", "missing"]),
    "another file": (lambda _: [line("new", [3])], ["'r0'", "missing"]),
}


@pytest.mark.parametrize(("change", "words"), CHANGED.values(), ids=CHANGED)
def test_changed_input_is_refused_by_name(run, tmp_path, change, words):
    run([*LINES[:2], line("bad", [])])
    before = files_in(tmp_path / "run")
    captured, _ = run(change(LINES[:2]), "--resume", code=2)
    refused(captured, "--input", *words)
    assert files_in(tmp_path / "run") == before


def test_input_may_grow_and_be_written_otherwise(run):
    _, before = run(LINES[:2])
    otherwise = [
        json.dumps(dict(reversed(item.items())), indent=None, separators=(" , ", " : ")).encode() for item in LINES[:2]
    ]
    _, after = run([b"", LINES[2], *reversed(otherwise)], "--resume")
    assert after.keys() == {"r0", "r1", "r2"}
    assert {name: after[name] for name in before} == before


def test_directory_of_an_earlier_version_goes_on_and_says_what_is_not_checked(run, tmp_path):
    _, before = run(LINES[:2])
    (tmp_path / "run" / JOB_JSON).unlink()
    for item in before.values():
        item["response"]["request_id"] = f"req_{item['custom_id']}"
    text = "".join(json.dumps(item) + "\n" for item in before.values())
    (tmp_path / "run" / OUTPUTS).write_text(text)
    captured, after = run(LINES[:3], "--resume", "--quiet")
    assert "unchecked" in captured.err
    assert after.keys() == {"r0", "r1", "r2"}
    assert {name: after[name] for name in before} == before
    captured, _ = run(LINES[:3], "--resume", "--quiet")
    assert "unchecked" not in captured.err


@pytest.mark.parametrize("content", ['{"seed": "' + "[" * 10_000, "[" * 10_000, "[]", "{}", '{"seed": NaN}', "\0"])
def test_broken_job_json_is_told(run, tmp_path, content):
    run(LINES[:1])
    (tmp_path / "run" / JOB_JSON).write_text(content)
    captured, _ = run(LINES[:2], "--resume", code=2)
    refused(captured, JOB_JSON, "--output-dir")


@pytest.mark.parametrize("name", [JOB_JSON, OUTPUTS])
def test_pipe_in_place_of_what_resume_reads_is_refused(run, tmp_path, name):
    run(LINES[:1])
    (tmp_path / "run" / name).unlink()
    os.mkfifo(tmp_path / "run" / name)
    captured, _ = run(LINES[:2], "--resume", code=2)
    refused(captured, name, "a pipe")


@pytest.mark.parametrize(
    "bad",
    [
        b"[]",
        b"{}",
        b"nope",
        b'{"custom_id": 3, "response": {"request_id": "r"}}',
        b"[" * 5000,
        b'{"custom_id": "a", "response": []}',
        b'{"custom_id": "a", "response": {"request_id": []}}',
    ],
)
def test_broken_outputs_are_told_and_left_alone(run, folder, policy_path, tmp_path, capsys, bad):
    run(LINES[:1])
    path = tmp_path / "run" / OUTPUTS
    path.write_bytes(bad + b"\n" + path.read_bytes())
    before = files_in(tmp_path / "run")
    assert exit_code(resumed(folder, policy_path, tmp_path)) == 2
    refused(capsys.readouterr(), f"{OUTPUTS}: line 1", "--output-dir")
    assert files_in(tmp_path / "run") == before


def test_two_answers_to_a_request_are_refused(run, folder, policy_path, tmp_path, capsys):
    run(LINES[:2])
    path = tmp_path / "run" / OUTPUTS
    first, *_ = path.read_bytes().splitlines(keepends=True)
    name = json.loads(first)["custom_id"]
    path.write_bytes(path.read_bytes() + first)
    before = files_in(tmp_path / "run")
    assert exit_code(resumed(folder, policy_path, tmp_path)) == 2
    refused(capsys.readouterr(), f"{OUTPUTS}: line 3", name, "one answer", "remove the line")
    assert files_in(tmp_path / "run") == before
    path.write_bytes(b"".join(before[OUTPUTS].splitlines(keepends=True)[1:]))
    assert exit_code(resumed(folder, policy_path, tmp_path)) == 0


def test_nothing_left_to_be_run_loads_no_weights_and_keeps_what_was_measured(run, tmp_path, monkeypatch):
    lines = [*LINES[:2], line("bad", [])]
    _, first = run(lines)
    before = files_in(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("executor.job.model_part.Generator", None)
        captured, done = run(lines, "--resume")
    assert "nothing is left to be run: 2 requests" in captured.err
    assert "1 were rejected" in captured.err
    assert not captured.out
    assert done == first
    assert {**files_in(tmp_path / "run"), OUTPUTS: b""} == {**before, OUTPUTS: b""}
    _, done = run([*lines, LINES[2]], "--resume")
    assert done["r2"]["error"] is None


def test_what_a_killed_run_had_half_written_goes_and_nothing_else(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:  # as if the process had ended while it wrote
        patch.setattr("hrm.files.NewFile.discard", lambda _: None)
        patch.setattr("hrm.files.NewFile.commit", lambda _: None)
        run(LINES[:2])
    folder = tmp_path / "run"
    left = {path for path in folder.iterdir() if path.suffix == ".tmp"}
    assert left
    others = {folder / ".hrm-0123456789abcdef01234567.tmp", folder / ".hrm-runs.tmp", folder / "mine.tmp"}
    for path in others:  # a policy file that `hrm search` is writing there, and files of the user's own
        path.touch()
    run(LINES[:2], "--resume")
    assert {path for path in folder.iterdir() if path.suffix == ".tmp"} == others


def test_answers_do_not_depend_on_where_a_job_was_cut(run, tmp_path):
    _, whole = run(LINES)
    cuts = random.Random(5)
    for attempt in range(3):
        output = f"cut-{attempt}"
        done: dict = {}
        while len(done) < len(LINES):
            if done and cuts.random() < 0.5:  # what a crash leaves of a line
                with (tmp_path / output / OUTPUTS).open("ab") as file:
                    file.write(b'{"id": "batch_req_r9", "custom')
            most = str(cuts.randint(1, 5))
            _, done = run(LINES, "--resume", "--max-requests", most, "--quiet", output=output)
        assert answers(done) == answers(whole)


def test_answers_are_written_as_requests_end(run, tmp_path, monkeypatch):
    by_act = DecodeHandlers.by_act
    seen = {}

    def made(own):
        handlers = by_act(own)
        sample = handlers[act("SAMPLE")]

        def watched(task) -> int:
            moved = sample(task)
            if task.id.index == 1 and task.id.step not in seen:
                ended = sum(item["body"]["max_tokens"] <= task.id.step + 2 for item in lines)
                deadline_s = time.monotonic() + 30
                while len(outputs(tmp_path / "run")) < ended and time.monotonic() < deadline_s:
                    time.sleep(0.01)
                seen[task.id.step] = len(outputs(tmp_path / "run"))
            return moved

        return {**handlers, act("SAMPLE"): watched}

    monkeypatch.setattr(DecodeHandlers, "by_act", made)
    lines = [line(f"r{i}", PROMPTS[i], max_tokens=2 + i, ignore_eos=True) for i in range(4)]
    run(lines)
    assert seen == {0: 1, 1: 2, 2: 3, 3: 4}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_end_a_run_in_order(run, tmp_path, monkeypatch, number, code):
    before = signal.getsignal(number)
    by_act = DecodeHandlers.by_act

    def made(own):
        os.kill(os.getpid(), number)
        return by_act(own)

    monkeypatch.setattr(DecodeHandlers, "by_act", made)
    captured, _ = run(LINES, "--quiet", code=code)
    assert "interrupted" in captured.err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["outcome"] == "interrupted"
    assert signal.getsignal(number) is before


def test_hangup_is_ignored_under_nohup(run, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    by_act = DecodeHandlers.by_act

    def made(own):
        os.kill(os.getpid(), signal.SIGHUP)
        return by_act(own)

    monkeypatch.setattr(DecodeHandlers, "by_act", made)
    try:
        _, done = run(LINES[:2], "--quiet")
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert len(done) == 2


@pytest.mark.slow
def test_killed_run_keeps_what_had_ended_and_comes_to_the_same(run, folder, policy_path, tmp_path):
    lines = [line(f"r{i}", PROMPTS[i % 10], max_tokens=2 + i % 4 * 10) for i in range(12)]
    _, whole = run(lines, output="whole")
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "killed"
    arguments = run_words(folder, policy_path, prompts, output, "--quiet", "--link-bandwidth", "2MB/s")
    process = subprocess.Popen([sys.executable, "-m", "executor", *arguments])
    path = tmp_path / "killed" / OUTPUTS
    deadline_s = time.monotonic() + 60
    while not (path.exists() and path.read_bytes()) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = [json.loads(raw) for raw in path.read_bytes().splitlines(keepends=True) if raw[-1:] == b"\n"]
    assert 0 < len(kept) < 12
    _, done = run(lines, "--resume", output="killed")
    assert answers(done) == answers(whole)
    assert {item["custom_id"]: item for item in kept}.items() <= done.items()
