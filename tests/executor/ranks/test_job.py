"""`executor run` with a policy for two GPUs: a process for each, on this machine's CPU."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import psutil
import pytest
import torch

from executor.job.machine import AcceleratorOptions, accelerator_for
from executor.job.rank import for_rank
from hrm.cli import main as hrm_main
from hrm.layers import ExpertDivision
from hrm.machines import compose
from hrm.model_spec import load_model
from hrm.parallel import part_of
from hrm.policy import Parallelism
from hrm.policy_file import save_policy_file
from hrm.run_record import read_run
from hrm.tasks import Phase
from hrm.units import MIB
from hrm.validate import validate
from tests.executor.runtime.jobs import PROMPTS, exit_code, line, outputs, refused, run_words, tokens_of, write_lines
from tests.executor.runtime.support import architecture, machine, make_policy, policy_file
from tests.executor.tiny_models import save_tiny, transformers_greedy

pytestmark = pytest.mark.usefixtures("forked_ranks")  # but for commands in processes of their own


def exit_code_of_hrm(words):
    try:
        hrm_main(words)
    except SystemExit as ended:
        return ended.code
    return 0


LINES = [line(f"r{number}", prompt) for number, prompt in enumerate(PROMPTS)]
LAYERS = 3


def two_gpus():
    one = machine()
    peer = replace(one.h2d, source="gpu", target="gpu", kind="peer")
    return replace(one, num_gpus=2, links=(*one.links, peer))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("wide heads", tmp_path_factory.mktemp("model"))


def saved_for_two_gpus(path, model, policy):
    """The file of a policy for two GPUs."""
    budgets = {"gpu": 2 * 10**6, "cpu": 2 * 10**8}
    spec = architecture(model).spec
    save_policy_file(path, policy_file(spec, profile=two_gpus(), policy=policy, memory_budget_bytes=budgets))
    return path


@pytest.fixture(scope="module")
def policy(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    return saved_for_two_gpus(path, model, make_policy(LAYERS, batch_size=4, micro_batch_size=2))


def test_two_ranks_answer_as_transformers_does_and_each_tells_what_it_did(model, policy, tmp_path, capsys):
    words = run_words(model, policy, write_lines(tmp_path, LINES), tmp_path / "run", "--gpus", "2")
    assert exit_code(words) == 0, capsys.readouterr().err
    answers = {name: tokens_of(item) for name, item in outputs(tmp_path / "run").items()}
    assert answers == {f"r{n}": transformers_greedy(model, prompt, 5) for n, prompt in enumerate(PROMPTS)}
    record = read_run(tmp_path / "run")
    (other,) = record.ranks
    assert other.rank == 1
    for phase in Phase:
        counts = {name: kind.count for name, kind in other.phases[phase.value].kinds.items()}
        assert counts == {name: kind.count for name, kind in record.phase(phase).kinds.items()}
        assert "REDUCE_ATTENTION" in counts
    for name, level in record.memory.items():
        assert other.memory[name].planned_bytes == level.planned_bytes
        assert level.peak_total_bytes <= level.planned_total_bytes
        assert other.memory[name].peak_total_bytes <= level.planned_total_bytes
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    validation = validate(record)
    assert validation.to_json()["slowest_rank"] in (0, 1)
    for phase in Phase:
        assert {rank for p, rank in validation.rank_s if p is phase} == {0, 1}
        sums = [c for (p, name), c in validation.kind_s.items() if p is phase and name.startswith(("REDUCE", "SAMPLE"))]
        lanes = [c for (p, _), c in validation.lane_s.items() if p is phase]
        assert validation.rank_s[phase, 0].measured == pytest.approx(
            sum(c.measured for c in lanes) - sum(c.measured for c in sums)
        )
    assert exit_code_of_hrm(["validate", str(tmp_path / "run")]) == 0
    assert ", the slowest" in capsys.readouterr().out
    spans = [[event for event in events if event["ph"] == "X" and event["pid"] == rank] for rank in (0, 1)]
    assert len(spans[0]) == len(spans[1]) > 0


def test_two_ranks_with_whole_experts_answer_the_same_and_count_all_experts(model, tmp_path, capsys):
    policy = replace(make_policy(LAYERS, batch_size=4, micro_batch_size=2), expert_division=ExpertDivision.WHOLE)
    path = saved_for_two_gpus(tmp_path / "policy.json", model, policy)
    words = run_words(model, path, write_lines(tmp_path, LINES), tmp_path / "run")
    assert exit_code(words) == 0, capsys.readouterr().err
    answers = {name: tokens_of(item) for name, item in outputs(tmp_path / "run").items()}
    assert answers == {f"r{n}": transformers_greedy(model, prompt, 5) for n, prompt in enumerate(PROMPTS)}
    record = read_run(tmp_path / "run")
    assert {len(layer) for layer in record.routed_tokens} == {8}
    assert all(min(sum(layer[:4]), sum(layer[4:])) > 0 for layer in record.routed_tokens)
    assert record.ranks[0].memory["gpu"].planned_bytes == record.memory["gpu"].planned_bytes


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("devices", ["cuda:0,0", "cuda:0,1"])
def test_two_ranks_on_cards_answer_as_transformers_does(model, policy, tmp_path, capsys, devices):
    """Both on one card, or each on its own."""
    if devices == "cuda:0,1" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    words = run_words(model, policy, write_lines(tmp_path, LINES), tmp_path / "run", "--accelerator", devices)
    assert exit_code(words) == 0, capsys.readouterr().err
    answers = {name: tokens_of(item) for name, item in outputs(tmp_path / "run").items()}
    assert answers == {f"r{n}": transformers_greedy(model, prompt, 5) for n, prompt in enumerate(PROMPTS)}
    for name, level in read_run(tmp_path / "run").memory.items():
        assert level.peak_total_bytes <= level.planned_total_bytes + MIB, name


@pytest.mark.parametrize(
    ("named", "own"), [("cuda", ["0", "1", "2"]), ("cuda:3", ["3", "4", "5"]), ("cuda:0,2,0", ["0", "2", "0"])]
)
def test_devices_of_ranks_are_named_or_follow_the_first(named, own):
    options = AcceleratorOptions(name=named)
    assert [for_rank(options, rank, 3).name for rank in range(3)] == [f"cuda:{device}" for device in own]
    assert for_rank(AcceleratorOptions(name="emulated"), 1, 3).name == "emulated"


@pytest.mark.parametrize("parallelism", Parallelism)
def test_what_was_measured_of_several_cards_is_run_on_one_after_the_other(monkeypatch, parallelism):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ("another", "NVIDIA T4", "NVIDIA T4")[index])
    measured, spec = replace(compose("2xT4"), accelerator="cuda"), load_model("mixtral-8x7b")
    for rank in range(2):
        own = part_of(spec, measured, parallelism).profile
        assert own.top.processor.name == "NVIDIA T4"
        options = AcceleratorOptions(name=accelerator_for("auto", own))
        assert for_rank(options, rank, 2).name == f"cuda:{1 + rank}"


@pytest.mark.parametrize("named", ["cuda:0,1,2", "cuda:x", "cuda:0,"])
def test_devices_that_are_not_as_many_as_ranks_are_refused(model, policy, tmp_path, capsys, named):
    words = run_words(model, policy, write_lines(tmp_path, LINES), tmp_path / "run", "--accelerator", named)
    assert exit_code(words) == 2
    refused(capsys.readouterr(), f"--accelerator is {named!r}", "or one for each of 2 ranks, as in cuda:0,1")


def start(model, policy, lines, folder, pace):
    """The command in a process of its own, on a link so slow that it takes seconds."""
    words = run_words(model, policy, lines, folder, "--link-bandwidth", pace, "--quiet")
    return subprocess.Popen([sys.executable, "-m", "executor", *words], stderr=subprocess.PIPE, text=True)


def until(done, *, at_most_s=120.0):
    end_s = time.monotonic() + at_most_s
    while not done():
        assert time.monotonic() < end_s
        time.sleep(0.05)


@pytest.mark.slow
def test_of_two_jobs_at_once_one_loses_a_rank_and_the_other_is_interrupted(model, policy, tmp_path, capsys):
    lines = write_lines(tmp_path, LINES)
    folders = [tmp_path / "broken", tmp_path / "other"]
    paces = ("1MB/s", "0.5MB/s")
    broken, other = (start(model, policy, lines, folder, pace) for folder, pace in zip(folders, paces, strict=True))
    until(lambda: outputs(folders[0]))
    (rank,) = psutil.Process(broken.pid).children()
    rank.kill()
    _, told = broken.communicate(timeout=60)
    assert broken.returncode == 1
    assert told.startswith("error: rank 1: its process is <ended by SIGKILL")
    assert 0 < len(outputs(folders[0])) < len(LINES)
    assert json.loads((folders[0] / "run.json").read_text())["outcome"] == "failed"

    until(lambda: outputs(folders[1]))
    (rank,) = psutil.Process(other.pid).children()
    other.send_signal(signal.SIGINT)
    _, told = other.communicate(timeout=60)
    assert (other.returncode, told.lstrip()) == (130, "interrupted; what was finished is kept\n")
    assert not rank.is_running()
    assert outputs(folders[1])

    words = run_words(model, policy, lines, folders[0], "--resume")
    assert exit_code(words) == 0, capsys.readouterr().err
    answers = {name: tokens_of(item) for name, item in outputs(folders[0]).items()}
    assert answers == {f"r{n}": transformers_greedy(model, prompt, 5) for n, prompt in enumerate(PROMPTS)}


def test_other_gpus_than_the_policys_are_refused_before_anything_is_read(model, policy, tmp_path, capsys):
    words = run_words(model, policy, write_lines(tmp_path, LINES), tmp_path / "run", "--gpus", "4")
    assert exit_code(words) == 2
    refused(capsys.readouterr(), "--gpus is 4", "must be 2")
