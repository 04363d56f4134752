"""The whole of `executor run`, from lines to a run directory, and everything that can be wrong."""

import errno
import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from executor.cli import main
from executor.handlers import DecodeHandlers
from executor.job import JobOptions, JobProgress, run_job
from executor.job.identity import JOB_JSON
from executor.job.outputs import LOCK, OUTPUTS, RunDirectory
from executor.job.run import NOT_COMPUTED
from hrm.model_spec import BUILT_IN_MODELS
from hrm.policy_file import load_policy_file, save_policy_file
from hrm.run_record import read_run
from hrm.tasks import Phase
from hrm.trace import read_chrome_trace
from hrm.validate import predict_ranks
from tests.contracts.tasks import act
from tests.executor.runtime.jobs import PROFILE, PROMPTS, exit_code, line, refused, run_words, tokens_of
from tests.executor.runtime.support import GPU, make_policy
from tests.executor.tiny_models import transformers_greedy


def test_job_writes_openai_lines_run_json_and_a_trace(run, folder, tmp_path):
    captured, done = run([line(f"r{i}", prompt) for i, prompt in enumerate(PROMPTS)])
    for index, prompt in enumerate(PROMPTS):
        item = done[f"r{index}"]
        assert tokens_of(item) == transformers_greedy(folder, prompt, 5)
        body = item["response"]["body"]
        assert item["response"]["status_code"] == 200
        assert body["object"] == "text_completion"
        assert body["choices"][0]["finish_reason"] in {"stop", "length"}
        assert body["usage"]["prompt_tokens"] == len(prompt)
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    assert content["outcome"] == "completed"
    assert content["accelerator"]["emulated"] is True
    assert content["accelerator"]["h2d_bytes_per_s"] == 1e9
    assert content["accelerator"]["d2h_bytes_per_s"] == 1e9
    assert "emulated" in captured.out
    assert content["totals"]["requests"] == 10
    assert content["totals"]["prompt_tokens"] == sum(map(len, PROMPTS))
    assert content["totals"]["batches"] == 3
    assert content["workload"]["max_prompt_len"] == max(map(len, PROMPTS))
    for level in ("gpu", "cpu"):
        memory = content["memory"][level]
        assert memory["peak_total_bytes"] <= memory["planned_total_bytes"]
        assert memory["planned_total_bytes"] <= memory["capacity_bytes"]
    trace = read_chrome_trace(tmp_path / "run" / "trace.json")
    for phase in Phase:
        kinds = content["phases"][phase.value]["kinds"]
        measured = trace.of_phase(phase).seconds_by_kind()
        assert set(measured) == kinds.keys()
        for kind, seconds in measured.items():
            assert kinds[kind]["seconds"] == pytest.approx(seconds, rel=1e-3, abs=1e-4)
        assert content["phases"][phase.value]["lanes"]["H2D"]["busy_share"] <= 1


def test_every_batch_is_counted_when_there_are_too_many_to_list(run, monkeypatch, tmp_path):
    """So that what was measured of all is laid beside a prediction of all."""
    lines = [line(f"r{i}", PROMPTS[0], ignore_eos=True) for i in range(23)]
    arguments = ["--accelerator", "null", "--quiet"]
    run(lines, *arguments, output="listed")
    monkeypatch.setattr("executor.job.report.MAX_BATCHES", 2)
    run(lines, *arguments, output="counted")
    listed, counted = (read_run(tmp_path / name) for name in ("listed", "counted"))
    assert [(batch.requests, batch.count) for batch in listed.batches] == [(4, 1)] * 5 + [(3, 1)]
    assert [(batch.requests, batch.count) for batch in counted.batches] == [(4, 1), (4, 1), (4, 3), (3, 1)]
    assert sum(batch.prefill_s for batch in counted.batches) == pytest.approx(counted.totals.prefill_s)
    assert predict_ranks(counted)[0].phase_s == pytest.approx(predict_ranks(listed)[0].phase_s)


@pytest.mark.parametrize("accelerator", ["cpu", "emulated", "null"])
@pytest.mark.parametrize("schedule", ["flexgen", "deepspeed"])
def test_accelerators_and_schedules(run, accelerator, schedule, tmp_path):
    _, done = run(
        [line(f"r{i}", prompt) for i, prompt in enumerate(PROMPTS)],
        "--accelerator",
        accelerator,
        "--schedule",
        schedule,
        "--quiet",
    )
    assert len(done) == 10
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    assert content["schedule"] == schedule
    assert content["accelerator"]["name"] == accelerator
    nothing = accelerator == "null"
    for answer in done.values():
        assert (answer["response"] is None) == (answer["error"] is not None) == nothing
    if nothing:
        assert answer["error"]["message"] == NOT_COMPUTED


def test_standard_input_is_no_input_that_can_be_read_again(folder, policy_path, tmp_path, capsys):
    assert exit_code(run_words(folder, policy_path, Path("-"), tmp_path / "run")) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --input is '-': must be a file or a URL, which --resume can read again; write the ")


def test_machine_of_one_level_keeps_everything_in_it(run, policy_path, tmp_path, folder):
    content = load_policy_file(policy_path)
    spec = content.model
    profile = replace(PROFILE, accelerator="cpu", levels=PROFILE.levels[1:], links=())
    policy = make_policy(
        spec.num_layers,
        batch_size=4,
        micro_batch_size=2,
        resident=spec.num_experts,
        attention=GPU,
        gpu_kv_micro_batches=2,
    )
    budgets = {"gpu": 10**8, "cpu": 10**8}
    changed = replace(content, profile=profile, policy=policy, memory_budget_bytes=budgets)
    save_policy_file(policy_path, changed)
    _, done = run([line(f"r{i}", prompt) for i, prompt in enumerate(PROMPTS)])
    for index, prompt in enumerate(PROMPTS):
        assert tokens_of(done[f"r{index}"]) == transformers_greedy(folder, prompt, 5)
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert written["accelerator"]["name"] == "cpu"
    assert written["memory"].keys() == {"cpu"}
    memory = written["memory"]["cpu"]
    assert memory["peak_total_bytes"] <= memory["planned_total_bytes"] <= 10**8
    assert "LOAD_PAGE" not in written["phases"]["decode"]["kinds"]


BAD_LINES = {
    "no json": (b"{nope", "line-2", "must be a JSON object"),
    "not utf-8": (b'{"custom_id": "\xff"}', "line-2", "must be a JSON object"),
    "half a surrogate pair": (b'{"custom_id": "\\ud800"}', "line-2", "surrogates"),
    "endless integer": (b"1" * 5000, "line-2", "must be a JSON object"),
    "endless nesting": (b"[" * 100_000, "line-2", "must be a JSON object"),
    "not an object": (b"[1]", "line-2", "must be an object"),
    "no custom_id": ({"method": "POST"}, "line-2", "custom_id"),
    "same custom_id": (line("good", [3]), "line-2", "must not occur twice"),
    "unknown field": ({**line("bad", [3]), "prompt": 1}, "bad", "no field of a batch line"),
    "wrong method": ({**line("bad", [3]), "method": "GET"}, "bad", "must be POST"),
    "wrong url": ({**line("bad", [3]), "url": "/v1/embeddings"}, "bad", "/v1/completions"),
    "chat without template": (
        {**line("bad", [3]), "url": "/v1/chat/completions", "body": {"messages": []}},
        "bad",
        "chat template",
    ),
    "no body": ({"custom_id": "bad"}, "bad", "body is <missing>"),
    "no prompt": ({"custom_id": "bad", "body": {}}, "bad", "body: prompt"),
    "text without tokenizer": (line("bad", "hello"), "bad", "tokenizer"),
    "prompt of another kind": (line("bad", [1.5]), "bad", "token ids"),
    "empty prompt": (line("bad", []), "bad", "at least one token"),
    "token out of range": (line("bad", [97]), "bad", "0 to 96"),
    "negative token": (line("bad", [-1]), "bad", "0 to 96"),
    "prompt too long": (line("bad", [3] * 97), "bad", "at most the 96 tokens"),
    "generation too long": (line("bad", [3], max_tokens=270), "bad", "cache of 256"),
    "no tokens wanted": (line("bad", [3], max_tokens=0), "bad", "max_tokens"),
    "temperature": (line("bad", [3], temperature=-1), "bad", "temperature"),
    "temperature of text": (line("bad", [3], temperature="hot"), "bad", "temperature"),
    "top_p": (line("bad", [3], top_p=2), "bad", "top_p"),
    "stop of another kind": (line("bad", [3], stop=3), "bad", "stop"),
    "unknown body field": (line("bad", [3], beams=4), "bad", "beams"),
    "several choices": (line("bad", [3], n=2), "bad", "body: n"),
}


@pytest.mark.parametrize(("bad", "name", "word"), BAD_LINES.values(), ids=BAD_LINES)
def test_bad_line_is_reported_and_the_rest_runs(run, tmp_path, bad, name, word):
    captured, done = run([line("good", PROMPTS[0]), bad, line("also good", PROMPTS[1])])
    assert "1 rejected (why is in outputs.jsonl)" in captured.out
    assert done.keys() == {"good", name, "also good"}
    assert done[name]["response"] is None
    assert word in done[name]["error"]["message"]
    assert done[name]["error"]["code"] == "invalid_request"
    assert tokens_of(done["good"])
    assert tokens_of(done["also good"])
    totals = json.loads((tmp_path / "run" / "run.json").read_text())["totals"]
    assert (totals["requests"], totals["rejected_requests"]) == (2, 1)


def test_directory_with_outputs_is_refused_and_resumed(run):
    first, rest = [line("a", PROMPTS[0])], [line("b", PROMPTS[1])]
    _, before = run(first)
    captured, _ = run(first + rest, code=2)
    refused(captured, "--output-dir", OUTPUTS, "--resume")
    _, after = run(first + rest, "--resume")
    assert after.keys() == {"a", "b"}
    assert after["a"] == before["a"]


def test_resume_takes_off_a_line_cut_short(run, tmp_path):
    _, before = run([line("a", PROMPTS[0])])
    with (tmp_path / "run" / OUTPUTS).open("a", encoding="utf-8") as file:
        file.write('{"custom_id": "b", "resp')
    _, after = run([line("a", PROMPTS[0]), line("b", PROMPTS[1])], "--resume")
    assert after.keys() == {"a", "b"}
    assert after["a"] == before["a"]


def test_directory_in_use_is_refused(run, tmp_path):
    with RunDirectory(tmp_path / "run", resume=False):
        captured, _ = run([line("a", PROMPTS[0])], code=2)
    refused(captured, "--output-dir", "in use")
    assert (tmp_path / "run" / LOCK).exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--accelerator", "tpu"], ["--accelerator", "tpu"]),
        (["--accelerator", "cuda:0"], ["CUDA"]),
        (["--accelerator", "cpu:3"], ["--accelerator", "cpu:3"]),
        (["--gpu-memory", "100kB"], ["level gpu", "100 kB", "--gpu-memory"]),
        (["--gpu-memory", "much"], ["--gpu-memory", "much", "16GB"]),
        (["--link-bandwidth", "fast"], ["--link-bandwidth", "fast"]),
        (["--link-bandwidth", "1GB/s", "--accelerator", "cpu"], ["--link-bandwidth", "leave it out"]),
        (["--accelerator", "emulatd"], ["--accelerator is 'emulatd'", "did you mean emulated?"]),
        (["--link-bandwidth", "2"], ["--link-bandwidth", "needs a unit; did you mean 2GB/s?"]),
        (["--gpu-memory", "5"], ["--gpu-memory", "needs a unit; did you mean 5GB?"]),
    ],
)
def test_bad_option_is_refused_before_anything_is_written(run, tmp_path, options, words):
    captured, _ = run([line("a", PROMPTS[0])], *options, code=2)
    refused(captured, *words)
    assert not (tmp_path / "run" / OUTPUTS).exists()


def test_policy_of_another_model_is_refused(run, policy_path):
    content = load_policy_file(policy_path)
    layer = content.model.layers[0]
    wider = replace(layer, mixer=replace(content.model.attention, head_dim=64))
    save_policy_file(policy_path, replace(content, model=content.model.with_layers([wider] * content.model.num_layers)))
    captured, _ = run([line("a", PROMPTS[0])], code=2)
    refused(captured, "policy.json: model.kinds[0].mixer.head_dim is 64", "hrm search")


def test_malformed_policy_is_refused(run, policy_path):
    text = policy_path.read_text().replace('"batch_size": 4', '"batch_size": "four"')
    policy_path.write_text(text)
    captured, _ = run([line("a", PROMPTS[0])], code=2)
    refused(captured, "policy.json", "batch_size")


@pytest.mark.parametrize("missing", ["model", "input"])
def test_missing_file_is_refused(folder, policy_path, tmp_path, capsys, missing):
    (tmp_path / "prompts.jsonl").write_text(json.dumps(line("a", [3])))
    paths = {"model": folder, "input": tmp_path / "prompts.jsonl"}
    paths |= {missing: tmp_path / "nowhere"}
    with pytest.raises(SystemExit) as ended:
        main(run_words(paths["model"], policy_path, paths["input"], tmp_path / "run"))
    assert ended.value.code == 2
    refused(capsys.readouterr(), "nowhere")


def broken_after(num_batches: int, error: type[BaseException], monkeypatch) -> None:
    by_act = DecodeHandlers.by_act
    batches = []  # and what warms up before them

    def made(own):
        handlers = by_act(own)
        batches.append(1)
        if len(batches) > 1 + num_batches:

            def fail(task) -> int:
                raise error(f"injected into {task}")

            handlers |= {known: fail for known in handlers if known.name == "ATTENTION"}
        return handlers

    monkeypatch.setattr(DecodeHandlers, "by_act", made)


def test_failed_task_keeps_what_was_finished_and_prints_the_lanes(run, tmp_path, monkeypatch):
    broken_after(1, OSError, monkeypatch)
    captured, done = run([line(f"r{i}", p) for i, p in enumerate(PROMPTS)], "--quiet", code=1)
    assert 4 <= len(done) < 10
    assert "ATTENTION" in captured.err
    assert "lane CPU" in captured.err
    assert "│" in captured.err
    assert "!" in captured.err
    assert "Traceback" not in captured.err
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    assert content["outcome"] == "failed"
    assert content["totals"]["requests"] == len(done)
    assert "injected" in content["message"]
    monkeypatch.undo()
    _, after = run([line(f"r{i}", p) for i, p in enumerate(PROMPTS)], "--resume")
    assert len(after) == 10


def test_ctrl_c_keeps_what_was_finished(run, tmp_path, monkeypatch):
    import _thread

    by_act = DecodeHandlers.by_act
    batches = []  # and what warms up before them

    def made(own):
        handlers = by_act(own)
        batches.append(1)
        if len(batches) == 3:
            embed = handlers[act("EMBED")]

            def interrupt(task) -> int:
                _thread.interrupt_main()
                return embed(task)

            handlers[act("EMBED")] = interrupt
        return handlers

    monkeypatch.setattr(DecodeHandlers, "by_act", made)
    captured, done = run([line(f"r{i}", p) for i, p in enumerate(PROMPTS)], "--quiet", code=130)
    assert 4 <= len(done) < 10
    assert "interrupted" in captured.err
    content = json.loads((tmp_path / "run" / "run.json").read_text())
    assert content["outcome"] == "interrupted"
    assert content["totals"]["requests"] == len(done)


def test_full_disk_is_told_and_what_is_written_stays(run, tmp_path, monkeypatch):
    synced = os.fsync

    def full(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").readlink().name == OUTPUTS:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(handle)

    monkeypatch.setattr(os, "fsync", full)
    captured, done = run([line("a", PROMPTS[0])], "--quiet", code=2)
    refused(captured, OUTPUTS, "No space left", "--resume")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["outcome"] == "failed"
    monkeypatch.undo()
    _, after = run([line("a", PROMPTS[0])], "--resume")
    assert after["a"] == done["a"]


FILES = (LOCK, OUTPUTS, JOB_JSON, "run.json", "trace.json", "trace.json.partial")
GIVEN_UP = "trace.json"  # the job goes on without it
OURS_ALONE = "trace.json.partial"  # what has that name is removed


@pytest.mark.parametrize("name", FILES)
def test_no_file_of_a_run_is_written_through_a_link(run, tmp_path, name):
    target = tmp_path / "another's"
    target.write_text('{"custom_id": "kept"}')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(target)
    captured, done = run([line("a", PROMPTS[0])], "--quiet", code=0 if name in {GIVEN_UP, OURS_ALONE} else 2)
    if name == GIVEN_UP:
        assert "a" in done
        assert "given up" in captured.err
        assert "a link to" in captured.err
    elif name != OURS_ALONE:
        refused(captured, "a link to", "not written through")
    assert target.read_text() == '{"custom_id": "kept"}'


@pytest.mark.parametrize("name", FILES)
def test_pipes_and_devices_in_a_run_are_refused_not_waited_for(run, tmp_path, name):
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / name)
    captured, done = run([line("a", PROMPTS[0])], "--quiet", code=0 if name in {GIVEN_UP, OURS_ALONE} else 2)
    if name == GIVEN_UP:
        assert "a" in done
        assert "given up" in captured.err
    elif name != OURS_ALONE:
        refused(captured, "a pipe")
    if name != OURS_ALONE:
        assert stat.S_ISFIFO((tmp_path / "run" / name).lstat().st_mode)


def test_max_requests_and_seed(run):
    lines = [line(f"r{i}", p, temperature=1, seed=i) for i, p in enumerate(PROMPTS)]
    _, some = run(lines, "--max-requests", "3")
    assert some.keys() == {"r0", "r1", "r2"}
    _, all_ = run(lines, "--schedule", "flexgen", output="other")
    for name, item in some.items():
        assert tokens_of(item) == tokens_of(all_[name])


def test_progress_counts_what_will_be_run(folder, policy_path, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(line(f"r{i}", p)) for i, p in enumerate(PROMPTS)))
    options = JobOptions(model=folder, policy=policy_path, input=path, output_dir=tmp_path / "run", max_requests=3)
    progress = JobProgress()
    run_job(options, progress)
    assert (progress.done_requests, progress.total_requests) == (3, 3)
    progress = JobProgress()
    run_job(replace(options, resume=True, max_requests=5), progress)
    assert (progress.earlier_requests, progress.done_requests, progress.total_requests) == (3, 8, 8)


def test_input_must_be_a_file_that_can_be_read_twice(folder, policy_path, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert exit_code(run_words(folder, policy_path, tmp_path / "pipe", tmp_path / "run")) == 2
    refused(capsys.readouterr(), "--input", "a pipe")


@pytest.mark.parametrize("arguments", [["run"], ["run", "--no-such-option"], ["no-such-command"]])
def test_malformed_command_line_is_told_in_one_line(arguments, capsys):
    assert exit_code(arguments) == 2
    refused(capsys.readouterr())


def test_bench_refuses_a_built_in_model_that_it_cannot_run(policy_path, monkeypatch, capsys):
    planned_only = replace(BUILT_IN_MODELS["mixtral-8x7b"], name="planned-only", family="jamba")
    monkeypatch.setitem(BUILT_IN_MODELS, planned_only.name, planned_only)
    with pytest.raises(SystemExit) as ended:
        main(["bench", "--model", planned_only.name, "--policy", str(policy_path)])
    assert ended.value.code == 2
    refused(capsys.readouterr(), "--model planned-only", "'jamba'", "mixtral, dbrx")


def test_help_loads_no_torch():
    code = "import sys, executor.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
