"""Whole jobs on workers of an embedded Ray, held against the same job in one process."""

import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest

from executor.demo import MODEL_DIR, PROMPTS
from executor.job.machine import AcceleratorOptions
from executor.ray import Engine, members
from executor.ray import worker as worker_module
from executor.ray.cluster import OBJECT_STORE_BYTES
from hrm.machines import compose
from hrm.model_spec import load_model
from hrm.policy_file import policy_file_of, save_policy_file
from hrm.run_record import FleetRecord, read_record, read_run
from hrm.search import Space, search
from hrm.validate import validate_fleet
from hrm.workload import Workload
from tests.executor.runtime.jobs import exit_code, outputs, refused, run_words, tokens_of

pytest.importorskip("ray")
COUNT = 24


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The demo's first prompts, a policy of small batches, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("job")
    lines = folder / "prompts.jsonl"
    lines.write_text("".join(PROMPTS.read_text(encoding="utf-8").splitlines(keepends=True)[:COUNT]), encoding="utf-8")
    workload = Workload(name="demo", prompt_len=40, max_prompt_len=160, gen_len=32, num_requests=2)
    spec, machine = load_model(str(MODEL_DIR)), compose("1xT4")
    space = Space(spec, machine, workload)
    save_policy_file(folder / "policy.json", policy_file_of(search(space).require(), spec, machine, workload))
    assert exit_code(words(folder, "alone")) == 0
    return folder


def words(folder, name, *more, quiet=True):
    return run_words(
        MODEL_DIR,
        folder / "policy.json",
        folder / "prompts.jsonl",
        folder / name,
        "--accelerator",
        "cpu",
        *(["--quiet"] if quiet else []),
        *more,
    )


def tokens(directory):
    return {name: tokens_of(item) for name, item in outputs(directory).items()}


def begun(arguments):
    """The command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "executor", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def engines_below(process):
    """Processes of workers that hold an engine."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [one for one in below if one.name().startswith("ray::Worker")]


def until(condition, *, at_most_s=120.0):
    end_s = time.monotonic() + at_most_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def address():
    """A Ray cluster of one node, which the tests of this module share; it starts no process before it is needed."""
    from ray.cluster_utils import Cluster

    node = {
        "num_cpus": 2,
        "num_gpus": 1,
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": False,
        "_system_config": {"enable_worker_prestart": False, "prestart_worker_first_driver": False},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")  # or it starts 32 for one file
        cluster = Cluster(initialize_head=True, head_node_args=node)
        yield cluster.address
        cluster.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # Ray Data interrupts its threads
def test_the_pipeline_of_ray_data_in_the_docs_gives_the_answers_of_a_job(job, address, tmp_path):
    import ray
    from pyarrow import parquet

    (code,) = re.findall(
        r"```python\n(import ray\n.*?)```", Path("docs/jobs.md").read_text(encoding="utf-8"), re.DOTALL
    )
    lines = [json.loads(line) for line in (job / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:6]]
    rows = [{"custom_id": line["custom_id"], **line["body"]} for line in lines]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "requests.parquet")
    for name, path in {
        "requests.parquet": tmp_path / "requests.parquet",
        "path/to/checkpoint": MODEL_DIR,
        "policy.json": job / "policy.json",
        "answers/": tmp_path / "answers",
    }.items():
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', repr(str(path)))
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            exec(code.replace("concurrency=2", "concurrency=1"), {})
    finally:
        ray.shutdown()
    made = parquet.read_table(tmp_path / "answers").to_pylist()
    alone = tokens(job / "alone")
    assert {row["custom_id"]: row["token_ids"] for row in made} == {
        row["custom_id"]: alone[row["custom_id"]] for row in rows
    }
    assert all(row["text"] and not row["error"] for row in made)


def kill_at_random(output, rng):
    """Once there is an answer, kill one of the workers below this process."""
    until(lambda: output.is_file() and output.stat().st_size)
    rng.choice(engines_below(psutil.Process())).kill()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3])
def test_workers_that_are_killed_at_random_and_by_a_request_cost_no_other_answer(
    job, address, capsys, monkeypatch, seed
):
    rng = random.Random(seed)
    alone = tokens(job / "alone")
    deadly = rng.choice(list(alone))

    def run_or_die(worker, requests):
        if any(request.name == deadly for request in requests):
            os.kill(os.getpid(), signal.SIGKILL)
        worker_module.Worker._run(worker, requests)

    monkeypatch.setattr(members, "Worker", type("Worker", (worker_module.Worker,), {"_run": run_or_die}))
    killer = threading.Thread(target=kill_at_random, args=(job / "killed" / "outputs.jsonl", rng))
    killer.start()
    code = exit_code(words(job, "killed", "--ray", address, "--workers", "2", quiet=False))
    killer.join()
    captured = capsys.readouterr()
    assert code == 0, captured.err
    made = outputs(job / "killed")  # which refuses a name that comes twice
    error = made.pop(deadly)["error"]["message"]
    assert error.startswith("left out: 2 engines died with it, the last one of it alone")
    assert {name: tokens_of(item) for name, item in made.items()} == {k: v for k, v in alone.items() if k != deadly}
    assert f"{COUNT - 1} answered, 1 failed, left out: {deadly}" in captured.out
    ready = re.findall(r"worker (\d) on \S+ runs policy.json \(for ", captured.err)
    check_records(job / "killed", deadly, set(map(int, ready)))


def check_records(folder, deadly, ready):
    """What the run.json and the trace of the fleet tell, and what `hrm validate` makes of them."""
    record = read_record(folder)
    assert isinstance(record, FleetRecord)
    assert record.given_up == [deadly]
    assert (record.requests, record.failed_requests) == (COUNT - 1, 1)
    assert {one.worker for one in record.workers} == ready
    assert sum(one.outcome == "died" for one in record.workers) in (2, 3)  # one may be killed while it loads
    assert sum(one.requests for one in record.workers) == record.requests
    assert sum(one.generated_tokens for one in record.workers) == record.generated_tokens
    told = {one.worker: one.run for one in record.workers if one.run is not None}
    validation = validate_fleet(record)
    assert validation.workers.keys() == told.keys()
    for number, run in told.items():
        assert run == read_run(folder, number)
        assert run.totals.requests <= next(one.requests for one in record.workers if one.worker == number)
        assert validation.workers[number].tokens_per_s.predicted > 0
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] // 1000 for event in events if event["ph"] == "X"} == told.keys()


@pytest.mark.slow
def test_an_interrupted_run_leaves_no_process_and_goes_on(job):
    process = begun(words(job, "cut", "--ray", "--workers", "1"))
    output = job / "cut" / "outputs.jsonl"
    wait_for(lambda: output.is_file() and output.stat().st_size, process)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    _, alive = psutil.wait_procs(below, timeout=20)
    assert not alive
    early = tokens(job / "cut")
    assert exit_code(words(job, "cut", "--resume")) == 0  # either way of running goes on with the other's
    assert tokens(job / "cut") == tokens(job / "alone")
    assert early.items() <= tokens(job / "cut").items()


def test_an_engine_answers_batches_of_a_data_set(job):
    engine = Engine(MODEL_DIR, job / "policy.json", accelerator=AcceleratorOptions(name="cpu"))
    lines = [json.loads(line) for line in (job / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[:5]]
    columns = ("prompt", "max_tokens", "temperature")
    given = {key: np.array([line["body"][key] for line in lines], dtype=object) for key in columns}
    given["prompt"][3] = None
    made = engine(given)
    engine.close()
    alone = tokens(job / "alone")
    for index, line in enumerate(lines):
        if index != 3:
            assert made["token_ids"][index] == alone[line["custom_id"]]
            assert made["error"][index] == ""
    assert "prompt" in made["error"][3]
    assert list(made["prompt"]) == list(given["prompt"])


def test_rows_that_cannot_be_run_say_why_and_no_rows_are_answered_by_none(job):
    engine = Engine(MODEL_DIR, job / "policy.json", accelerator=AcceleratorOptions(name="cpu"))
    bodies = ['{"prompt": "In the beginning", "max_tokens": 2}', '{"prompt": ', '{"max_tokens": 2, "max_tokens": 3}']
    made = engine({"body": np.array(bodies, dtype=object)})
    nothing = engine({"body": np.array([], dtype=object)})
    engine.close()
    assert [len(tokens) for tokens in made["token_ids"]] == [2, 0, 0]
    assert made["error"][0] == ""
    assert all(error.startswith("body is <") and "JSON object" in error for error in made["error"][1:])
    assert list(nothing) == list(made)
    assert not nothing["text"].size


def test_mistakes_are_told_in_one_line(job, capsys, monkeypatch):
    assert exit_code(words(job, "mistake", "--ray", "127.0.0.1:1")) == 2
    refused(capsys.readouterr(), "--ray is '127.0.0.1:1'", "address of a Ray cluster")
    assert exit_code(words(job, "alone", "--ray")) == 2
    refused(capsys.readouterr(), "--output-dir", "already holds outputs.jsonl")
    assert exit_code(words(job, "mistake", "--workers", "3")) == 2
    refused(capsys.readouterr(), "--workers is 3: goes with --ray only")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert exit_code(words(job, "mistake", "--ray")) == 2
    refused(capsys.readouterr(), "--ray is <not installed>", "moe-hrm[ray]")


def test_a_worker_tells_what_ends_and_what_breaks_it(monkeypatch):
    worker = worker_module.Worker()
    done = threading.Event()

    class Broken:
        def run(self, requests, sink, ended):
            done.set()
            raise ValueError("out of luck")

    monkeypatch.setattr(worker, "_engine", Broken(), raising=False)
    worker.begin([])
    assert done.wait(20)
    ended = worker.look(20.0)
    assert ended.is_last
    assert ended.error == "ValueError: out of luck"
