"""Which of several policies a machine runs, and engines of several ranks; no Ray is started."""

import time
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from executor.batching import Request
from executor.errors import RunError
from executor.job.machine import AcceleratorOptions
from executor.job.report import Ending
from executor.ray import Engine, own_plan
from executor.ray.options import FleetOptions
from executor.ray.plans import Plan, by_preference, read_plans
from executor.ray.work import FleetWork
from executor.ray.worker import Ready, Refused, Worker
from executor.sampling import SamplingParams
from hrm.errors import PolicyError
from hrm.policy import Parallelism
from hrm.policy_file import save_policy_file
from hrm.profiling.environment import host_facts
from hrm.run_record import FleetRecord, WorkerRecord
from hrm.validate import validate_fleet
from hrm.workload import Workload
from tests.executor.ranks.test_job import two_gpus
from tests.executor.runtime.jobs import PROMPTS
from tests.executor.runtime.support import architecture, make_policy, policy_file
from tests.executor.tiny_models import save_tiny, transformers_greedy
from tests.hrm.profiling.fakes import small_sizes

LAYERS = 3
ROOM = {"gpu": 2 * 10**6, "cpu": 2 * 10**8}
CPU = AcceleratorOptions(name="cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny("wide heads", tmp_path_factory.mktemp("model"))


def saved(folder, path, *, rate=1.0, cpu=None, **changes):
    """A policy file at that path, predicted to reach a rate, of a host."""
    values = {"memory_budget_bytes": ROOM, "policy": make_policy(LAYERS, batch_size=4, micro_batch_size=2), **changes}
    content = policy_file(architecture(folder).spec, **values, predicted={"tokens_per_s": rate})
    here = host_facts().describe()
    environment = {"cpu": cpu or here["cpu"], "usable_cores": here["usable_cores"]} if cpu != "unknown" else {}
    save_policy_file(path, replace(content, profile=replace(content.profile, environment=environment)))
    return path


def test_the_plan_of_a_host_like_this_comes_first_and_then_the_fastest(model, tmp_path):
    rates = {"slow": (1.0, None), "fast": (2.0, None), "other": (9.0, "another CPU"), "catalogue": (5.0, "unknown")}
    for name, (rate, cpu) in rates.items():
        saved(model, tmp_path / f"{name}.json", rate=rate, cpu=cpu)
    (tmp_path / "notes.txt").write_text("no policy")
    plans = read_plans([tmp_path])
    assert {plan.path for plan in plans} == {str(tmp_path / f"{name}.json") for name in rates}
    best = [plan.path.removeprefix(f"{tmp_path}/") for plan in by_preference(plans, CPU)]
    assert best == ["fast.json", "slow.json", "other.json", "catalogue.json"]


def test_the_plan_for_a_gpu_that_is_here_comes_before_all_others(model, tmp_path, monkeypatch):
    plans = read_plans(
        [saved(model, tmp_path / "host.json", rate=9.0), saved(model, tmp_path / "card.json", cpu="unknown")]
    )
    card = replace(plans[1].file.profile, accelerator="cuda")
    plans = [plans[0], Plan("card.json", replace(plans[1].file, profile=card))]
    monkeypatch.setattr("executor.job.machine.cuda_index_of", lambda name: 0 if name == "gpu" else None)
    assert by_preference(plans, AcceleratorOptions())[0].path == "card.json"
    assert by_preference(plans, CPU)[0] is plans[0]


def test_policies_that_do_not_go_together_are_refused(model, tmp_path):
    first = saved(model, tmp_path / "a.json")
    other = saved(model, tmp_path / "b.json", policy=make_policy(LAYERS, dtype="bfloat16"))
    with pytest.raises(PolicyError, match=r"b.json: policy.dtype is 'bfloat16': must be as in \S+a.json 'float32'"):
        read_plans([first, other])
    spec = replace(architecture(model).spec, vocab_size=77)
    with pytest.raises(PolicyError, match=r"c.json: model is <\S+>: must be as in \S+a.json"):
        read_plans([first, saved(model, tmp_path / "c.json", model=spec)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(PolicyError, match=r"empty.*folder that holds some"):
        read_plans([tmp_path / "empty"])


def test_an_engine_takes_the_best_plan_that_can_be_run(model, tmp_path):
    too_large = saved(model, tmp_path / "large.json", rate=9.0, memory_budget_bytes={"gpu": 1000, "cpu": 1000})
    small = saved(model, tmp_path / "small.json", rate=1.0)
    engine = Engine(model, [too_large, small], accelerator=CPU)
    assert engine.plan.path == str(small)
    made = engine(
        {"prompt": np.array(PROMPTS[:2], dtype=object), "max_tokens": np.array([5, 5]), "temperature": np.zeros(2)}
    )
    assert list(made["token_ids"]) == [transformers_greedy(model, prompt, 5) for prompt in PROMPTS[:2]]
    engine.close()
    with pytest.raises(PolicyError, match="planned"):
        Engine(model, too_large, accelerator=CPU)
    with pytest.raises(RunError, match=r"--policy is <2 policy files>: must hold one for this machine; .* \| "):
        Engine(model, [too_large, too_large], accelerator=CPU)


def test_an_engine_measures_its_machine_once_and_solves_for_it(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    few = Workload(
        name="few", prompt_len=20, max_prompt_len=40, gen_len=5, num_requests=8
    )  # or a batch fills the memory
    given = saved(model, tmp_path / "given.json", workload=few)
    (plan,) = read_plans([given])
    with small_sizes() as patch:
        engine = Engine(model, given, accelerator=CPU, own_plan=True)
        patch.setattr(own_plan, "profile_machine", lambda *_, **__: pytest.fail("measured again"))
        half = own_plan.own_plan(plan, CPU, engines=2).file.profile
    file = engine.plan.file
    assert file.profile.environment["cpu"] == host_facts().describe()["cpu"]
    assert (file.model, file.workload) == (plan.file.model, plan.file.workload)
    assert half.host.usable_bytes < 0.6 * file.profile.host.usable_bytes
    assert "own plan (for " in engine.plan.text(engine.generator.policy)
    made = engine(
        {"prompt": np.array(PROMPTS[:1], dtype=object), "max_tokens": np.array([5]), "temperature": np.zeros(1)}
    )
    assert made["token_ids"][0] == transformers_greedy(model, PROMPTS[0], 5)
    engine.close()
    monkeypatch.setenv("XDG_CACHE_HOME", str(given))
    with pytest.raises(RunError, match=r"--own-plans is \S+: must be writable"):
        own_plan.own_plan(plan, CPU)


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize(("parallelism", "layers"), [(Parallelism.TENSOR, LAYERS), (Parallelism.PIPELINE, 2)])
def test_a_worker_runs_as_many_ranks_as_its_policy_is_for_and_tells_of_each(model, tmp_path, parallelism, layers):
    policy = replace(make_policy(layers, batch_size=3, micro_batch_size=2), parallelism=parallelism)
    path = saved(model, tmp_path / "two.json", profile=two_gpus(), policy=policy)
    worker = Worker(model=model, policy=path, accelerator=CPU)
    ready = worker.load()
    assert isinstance(ready, Ready)
    assert ready.batch_size == (6 if parallelism is Parallelism.PIPELINE else 3)
    assert "2 ranks" in ready.plan
    params = SamplingParams(max_tokens=5, temperature=0)
    requests = [Request(str(index), tuple(prompt), params) for index, prompt in enumerate(PROMPTS)]
    answers = {}
    for share in (requests[:6], requests[6:]):
        worker.begin(share)
        is_last = False
        while not is_last:
            ended = worker.look(60.0)
            assert ended.error is None
            answers |= {one.request.name: list(one.tokens) for one in ended.completions}
            is_last = ended.is_last
    assert answers == {str(n): transformers_greedy(model, prompt, 5) for n, prompt in enumerate(PROMPTS)}
    report = worker.finish()
    (other,) = report.record.ranks
    assert other.rank == 1
    assert report.record.totals.requests == len(PROMPTS)
    assert report.spans.keys() == {0, 1}
    assert len(report.spans[1]) > 0
    record = WorkerRecord(worker=1, node="here", policy="two.json", outcome="completed", run=report.record)
    fleet = FleetRecord(
        outcome="completed", seconds=1.0, requests=10, generated_tokens=50, tokens_per_s=50.0, workers=[record]
    )
    assert {rank for _, rank in validate_fleet(fleet).workers[1].rank_s} == {0, 1}


def test_a_worker_that_cannot_run_says_why(model, tmp_path):
    refused = Worker(model=tmp_path / "none", policy=saved(model, tmp_path / "a.json"), accelerator=CPU).load()
    assert isinstance(refused, Refused)
    assert "none" in refused.message


def test_a_fleet_that_nothing_answered_took_no_time():
    """Its run.json can be read: no seconds are below 0."""
    work = FleetWork(cast("Any", None), FleetOptions(), [])
    for first_s in (None, time.time()):
        work._first_s = first_s  # a request was sent
        record = work.record(Ending.of(KeyboardInterrupt()))
        assert (record.outcome, record.seconds, record.tokens_per_s) == ("interrupted", 0.0, 0.0)
