"""`executor run` with a policy for two GPUs: a process for each, on this machine's CPU."""

import json
from dataclasses import replace

import pytest

from hrm.policy_file import save_policy_file
from hrm.run_record import read_run
from hrm.tasks import Phase
from tests.executor.runtime.jobs import PROMPTS, exit_code, line, outputs, run_words, tokens_of, write_lines
from tests.executor.runtime.support import architecture, machine, make_policy, policy_file
from tests.executor.tiny_models import save_tiny, transformers_greedy

LINES = [line(f"r{number}", prompt) for number, prompt in enumerate(PROMPTS)]
LAYERS = 3


def two_gpus():
    one = machine()
    peer = replace(one.h2d, source="gpu", target="gpu", kind="peer")
    return replace(one, num_gpus=2, links=(*one.links, peer))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("wide heads", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def policy(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    content = policy_file(
        architecture(model).spec,
        profile=two_gpus(),
        policy=make_policy(LAYERS, batch_size=4, micro_batch_size=2),
        memory_budget_bytes={"gpu": 2 * 10**6, "cpu": 2 * 10**8},
    )
    save_policy_file(path, content)
    return path


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
    spans = [[event for event in events if event["ph"] == "X" and event["pid"] == rank] for rank in (0, 1)]
    assert len(spans[0]) == len(spans[1]) > 0
