"""`executor run` with a policy for a pipeline of two stages: a process for each, on this machine's CPU."""

import json
import re
from dataclasses import replace
from functools import partial

import psutil
import pytest

from executor.group.processes import TIMEOUT
from executor.job import launch
from executor.job.machine import AcceleratorOptions, files_of_ranks, longest_task_s
from executor.ranks.generator import Ranks
from executor.ranks.signs import Pulse
from executor.ranks.workers import Stillness
from hrm.estimate import estimate
from hrm.policy import Parallelism
from hrm.policy_file import load_policy_file
from hrm.run_record import read_run
from hrm.tasks import Phase
from hrm.validate import validate
from tests.executor.ranks import stuck_stage
from tests.executor.ranks.test_job import saved_for_two_gpus
from tests.executor.runtime.jobs import PROMPTS, exit_code, line, outputs, run_words, tokens_of, write_lines
from tests.executor.runtime.support import architecture, make_policy
from tests.executor.tiny_models import save_tiny, transformers_greedy

pytestmark = pytest.mark.usefixtures("forked_ranks")
LONGEST = 2  # of three layers in two stages


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("tied", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def policy(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    stage = replace(make_policy(LONGEST, batch_size=3, micro_batch_size=2), parallelism=Parallelism.PIPELINE)
    return saved_for_two_gpus(path, model, stage)


def test_two_stages_answer_as_transformers_does_and_each_tells_what_it_did(model, policy, tmp_path, capsys):
    """Ten requests in batches of three: two and two under way."""
    lines = [line(f"r{number}", prompt) for number, prompt in enumerate(PROMPTS)]
    words = run_words(model, policy, write_lines(tmp_path, lines), tmp_path / "run", "--gpus", "2")
    assert exit_code(words) == 0, capsys.readouterr().err
    answers = {name: tokens_of(item) for name, item in outputs(tmp_path / "run").items()}
    assert answers == {f"r{n}": transformers_greedy(model, prompt, 5) for n, prompt in enumerate(PROMPTS)}

    record = read_run(tmp_path / "run")
    (other,) = record.ranks
    assert sum(batch.count for batch in record.batches) == 4
    spec = architecture(model).spec
    assert len(record.routed_tokens) == spec.num_layers
    sent = {sum(layer) for layer in record.routed_tokens[:-1]}
    assert sent == {spec.experts_per_token * (sum(map(len, PROMPTS)) + 4 * len(PROMPTS))}, "no token left a stage out"
    for phase, act in ((Phase.PREFILL, "PREFILL_LAYER"), (Phase.DECODE, "POST_ATTENTION")):
        counts = [rank.phases[phase.value].kinds[act].count for rank in (record, other)]
        assert counts[1] == 2 * counts[0] > 0, "one layer of three in the first stage, two in the second"
    for levels in (record.memory, other.memory):
        for level in levels.values():
            assert level.peak_total_bytes <= level.planned_total_bytes
    validation = validate(record)
    assert {rank for _, rank in validation.rank_s} == {0, 1}
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    assert {event["pid"] for event in events if event["ph"] == "X"} == {0, 1}


def test_texts_end_in_the_first_stage_for_all(model, policy, tmp_path, capsys):
    """A token that ends one request early, and log probabilities, which come from the last stage."""
    whole = transformers_greedy(model, PROMPTS[0], 5)
    bodies = [{"stop_token_ids": [whole[1]]}, {"logprobs": 0}, {"max_tokens": 1}, {"temperature": 1.0, "seed": 7}]
    lines = [line(f"r{number}", PROMPTS[number], **body) for number, body in enumerate(bodies)]
    words = run_words(model, policy, write_lines(tmp_path, lines), tmp_path / "run")
    assert exit_code(words) == 0, capsys.readouterr().err
    done = outputs(tmp_path / "run")
    assert tokens_of(done["r0"]) == whole[: whole.index(whole[1]) + 1]
    assert done["r0"]["response"]["body"]["choices"][0]["finish_reason"] == "stop"
    logprobs = done["r1"]["response"]["body"]["choices"][0]["logprobs"]["token_logprobs"]
    assert len(logprobs) == 5
    assert max(logprobs) < 0
    assert [len(tokens_of(done[name])) for name in ("r2", "r3")] == [1, 5]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("hangs", r"<not at its end after \d+ s>: must come to where"),
        ("SIGSTOP", r"<without a sign of life for \d+ s>"),
    ],
)
def test_a_stage_that_never_ends_its_task_ends_all_and_is_named_with_it(
    model, policy, tmp_path, capsys, monkeypatch, forked_ranks, fault, told
):
    monkeypatch.setattr(launch, "WORKER", stuck_stage.__name__)
    monkeypatch.setattr(launch, "Ranks", partial(Ranks, silence_s=3.0 if fault == "SIGSTOP" else 60.0))
    monkeypatch.setenv(TIMEOUT, "3" if fault == "hangs" else "60")
    monkeypatch.setenv(stuck_stage.FAULT, fault)
    lines = [line(f"r{number}", prompt) for number, prompt in enumerate(PROMPTS)]
    words = run_words(model, policy, write_lines(tmp_path, lines), tmp_path / "run")
    assert exit_code(words) == 1
    error = capsys.readouterr().err
    assert re.search(rf"error: rank 1: task A1\.\d\S* \(PRE_ATTENTION\) in lane GPU is {told}", error), error
    (rank,) = forked_ranks
    assert not psutil.pid_exists(rank.pid)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["outcome"] == "failed"


def pulse(*works, waits=False, cpu_s=0.0):
    return Pulse(tasks=(*works, *(["E"] if waits else [])), waits=waits, works=works, cpu_s=cpu_s)


@pytest.mark.parametrize(
    ("own", "others", "hung"),
    [
        (pulse(waits=True), [pulse("A", waits=True), pulse(waits=True)], 1),
        (pulse("A"), [pulse(waits=True), pulse(waits=True)], 0),
        (pulse("A"), [pulse("B"), pulse(waits=True)], 0),
        (pulse(waits=True), [pulse(waits=True), pulse()], None),
        (pulse(), [pulse(), pulse()], None),
    ],
)
def test_the_first_rank_at_work_is_named_once_all_stand_still(own, others, hung):
    signs = dict(enumerate(others, 1))
    stillness = Stillness(lambda: own, 0.0)
    stillness.hung(signs)
    found = stillness.hung(signs)
    assert list(found) == ([] if hung is None else [hung])
    assert stillness.hung({**signs, 2: pulse("other")}) == {}, "one has gone on"
    patient = Stillness(lambda: own, 1e9)
    assert not patient.hung(signs)
    assert not patient.hung(signs)


def test_a_rank_whose_cpu_computes_does_not_stand_still():
    stillness = Stillness(lambda: pulse(waits=True), 0.0)
    stillness.hung({1: pulse("A", cpu_s=1.0)})
    assert not stillness.hung({1: pulse("A", cpu_s=1e6)})


def test_no_task_that_is_predicted_takes_longer_than_what_ranks_are_given(policy):
    content = load_policy_file(policy)
    for of_rank in files_of_ranks(content):
        longest_s = longest_task_s(AcceleratorOptions(), of_rank)
        alone = replace(of_rank.policy, parallelism=Parallelism.TENSOR)
        whole = estimate(of_rank.model, alone, of_rank.profile, of_rank.workload)
        assert 0 < longest_s < max(whole.prefill.seconds, whole.decode.seconds)
        slow = AcceleratorOptions(link_bytes_per_s=1e3)
        expert_bytes = of_rank.model.expert_bytes(of_rank.policy.formats.weights)
        assert longest_task_s(slow, of_rank) > expert_bytes / 1e3
