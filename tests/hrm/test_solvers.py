"""Three solvers over the same spaces: they must agree, and their policies must be what they say."""

import subprocess
import sys
from dataclasses import replace
from functools import cache
from random import Random

import pytest

from hrm.errors import PolicyError
from hrm.estimate import estimate
from hrm.formats import FORMATS
from hrm.memory import plan_memory
from hrm.policy import ScheduleName
from hrm.search import bayesian, exhaustive, milp
from hrm.search.result import Outcome, SearchResult
from hrm.search.space import Space
from hrm.units import MB
from hrm.workload import Workload
from tests.hrm.support import machine, random_spec, random_varied_spec

TRIPLES = 24
MILP_AGREES = 1e-2  # both try some chunks, not the same ones
OPTUNA_AGREES = 0.02
TRIALS = (50, 150, 400)  # more only where fewer are not enough


@cache
def a_space(seed: int) -> Space:
    """A random model, machine and workload, with sizes small enough to be searched whole."""
    rng = Random(seed)
    spec = random_spec(rng) if seed % 2 else random_varied_spec(rng)
    weights = spec.total_layer_bytes(FORMATS["bfloat16"])
    profile = machine(
        gpu_bytes=weights * rng.uniform(0.3, 1.3) + rng.uniform(0.2, 4) * MB,
        cpu_bytes=weights * rng.uniform(0.9, 2) + rng.uniform(1, 20) * MB,
        gpu_flops=10 ** rng.uniform(9, 12),
        cpu_flops=10 ** rng.uniform(8, 11),
        gpu_read=10 ** rng.uniform(9, 11.5),
        cpu_read=10 ** rng.uniform(8, 10.5),
        link=10 ** rng.uniform(6.5, 9.5),
        latency_s=rng.choice([0.0, 1e-5]),
        launch_s=rng.choice([0.0, 1e-6]),
    )
    prompt_len = rng.randint(4, 60)
    workload = Workload(
        name="random",
        prompt_len=prompt_len,
        max_prompt_len=prompt_len + rng.choice([0, 0, 30]),
        gen_len=rng.choice([2, 9, 40]),
        num_requests=rng.choice([None, rng.randint(3, 40)]),
    )
    return Space(
        spec=spec,
        profile=profile,
        workload=workload,
        dtype="bfloat16",
        schedule=rng.choice([ScheduleName.CGOPIPE, ScheduleName.CGOPIPE, *ScheduleName]),
        staging=rng.random() < 0.2,
        max_micro_batch_size=rng.randint(2, 10),
        max_micro_batches=rng.randint(1, 6),
    )


@cache
def searched(seed: int) -> SearchResult:
    return exhaustive.search_space(a_space(seed))


def check_best(space: Space, result: SearchResult) -> None:
    """The best policy fits, and its estimate is that of the policy."""
    best = result.require()
    plan_memory(space.spec, best.policy, space.profile).check_fits()
    again = estimate(space.spec, best.policy, space.profile, space.workload)
    assert again.tokens_per_s == best.tokens_per_s


def test_the_triples_are_of_every_sort():
    outcomes = [searched(seed).outcome for seed in range(TRIPLES)]
    assert outcomes.count(Outcome.BEST_FOUND) >= 20
    kinds = {
        (best.policy.attention, best.policy.ffn, best.policy.kv_share_on_gpu == 1)
        for seed in range(TRIPLES)
        if (best := searched(seed).best) is not None
    }
    assert len(kinds) >= 4


@pytest.mark.parametrize("seed", range(TRIPLES))
def test_programs_and_the_exhaustive_search_agree(seed):
    space, tried = a_space(seed), searched(seed)
    proved = milp.search_space(space)
    if tried.best is None:
        assert proved.outcome is Outcome.INFEASIBLE
        return
    assert proved.greatest_tokens_per_s == pytest.approx(tried.greatest_tokens_per_s, rel=MILP_AGREES)
    check_best(space, proved)
    check_best(space, tried)


@pytest.mark.parametrize("seed", range(TRIPLES))
def test_trials_come_close_to_the_exhaustive_search(seed):
    space, tried = a_space(seed), searched(seed)
    if tried.best is None:
        assert bayesian.search_space(space, trials=5).outcome is Outcome.INFEASIBLE
        return
    close = (1 - OPTUNA_AGREES) * tried.best.tokens_per_s
    for trials in TRIALS:
        tries = bayesian.search_space(space, trials=trials, seed=seed)
        assert tries.outcome is Outcome.BEST_FOUND
        check_best(space, tries)
        if tries.require().tokens_per_s >= close:
            return
    pytest.fail(f"{tries.require().tokens_per_s} < {close}")


def test_a_study_goes_on_where_it_was_kept(tmp_path):
    space, storage = a_space(1), str(tmp_path / "trials.log")
    first = bayesian.search_space(space, trials=5, storage=storage)
    second = bayesian.search_space(space, trials=5, storage=storage)
    assert second.evaluations > first.evaluations
    assert second.require().tokens_per_s >= first.require().tokens_per_s
    other = replace(space, workload=replace(space.workload, gen_len=space.workload.gen_len + 1))
    assert bayesian.study_name(other) != bayesian.study_name(space)
    third = bayesian.search_space(other, trials=5, storage=storage)
    assert third.evaluations <= 5


def test_an_interrupted_search_reports_the_best_so_far():
    def stop(number: int, tokens_per_s: float) -> None:
        assert tokens_per_s > 0
        if number == 4:
            raise KeyboardInterrupt

    result = bayesian.search_space(a_space(1), trials=50, progress=stop)
    assert result.outcome is Outcome.INTERRUPTED
    assert 1 <= result.evaluations <= 4
    check_best(a_space(1), result)


def test_processes_share_a_study(tmp_path):
    storage = str(tmp_path / "trials.log")
    trial = (
        "from tests.hrm.test_solvers import a_space; from hrm.search import bayesian; "
        f"bayesian.search_space(a_space(1), trials=6, storage={storage!r})"
    )
    both = [subprocess.Popen([sys.executable, "-c", trial]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    alone = bayesian.search_space(a_space(1), trials=6)
    assert bayesian.search_space(a_space(1), trials=1, storage=storage).evaluations > (alone.evaluations)


@pytest.mark.parametrize("storage", ["/no/such/folder/trials.log", "nosql://x", "{folder}"])
def test_a_storage_that_cannot_be_used_is_named(tmp_path, storage):
    with pytest.raises(PolicyError, match=r"--storage.* is .*must be a .*that Optuna opens"):
        bayesian.search_space(a_space(1), trials=1, storage=storage.format(folder=tmp_path))
