"""Solvers over the same spaces: they must agree, and their policies must be what they say."""

import math
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, final

import numpy as np
import pytest

from hrm.cli.report import print_plan
from hrm.errors import PolicyError
from hrm.estimate import estimate
from hrm.latency import LatencyLimits
from hrm.machines import compose
from hrm.memory import plan_memory
from hrm.model_spec import BUILT_IN_MODELS
from hrm.search import SOLVERS, Outcome, Solver, Space, search, solver_named
from hrm.search.bayesian import Optuna, study_name
from hrm.search.bound import Bounding
from hrm.search.choose import TIE, ranked
from hrm.search.constraints import within_limits
from hrm.search.exhaustive import Exhaustive
from hrm.search.grid import ALL_THAT_FIT, make_grid
from hrm.search.milp import Milp
from hrm.search.solver import Found
from hrm.search.space import KvPlace
from hrm.search.way import find
from hrm.tasks import Device
from hrm.workload import WORKLOADS, Workload
from tests.contracts.selection import chosen
from tests.hrm.random_spaces import a_space
from tests.hrm.support import machine, tiny_spec

# Of random triples some whose best differ in where things are, and one of which no policy fits.
TRIPLES = (0, 1, 2, 4, 6, 8, 9, 12, 13, 14, 21, 22, 7, 40)
MILP_AGREES = 1e-2  # both try some chunks, not the same ones
OPTUNA_AGREES = 0.02
TRIALS = (50, 150, 400)  # more only where fewer are not enough


@cache
def searched(seed: int) -> Found:
    return find(a_space(seed), Exhaustive())


def check_best(space: Space, found: Found) -> None:
    """The best policy fits, and its estimate is that of the policy."""
    best = found.ranked[0]
    plan_memory(space.spec, best.policy, space.profile).check_fits()
    again = estimate(space.spec, best.policy, space.profile, space.workload)
    assert again.tokens_per_s == best.tokens_per_s


@pytest.mark.parametrize("seeds", chosen([[*TRIPLES[1::2]], [*TRIPLES]], at=(0,)), ids=["some", "all"])
def test_the_triples_are_of_every_sort(seeds):
    best = [searched(seed).ranked[0].policy for seed in seeds if searched(seed).ranked]
    assert len(best) == len(seeds) - 1
    kinds = {(policy.attention, policy.ffn, policy.kv_share_on_gpu == 1) for policy in best}
    assert len(kinds) >= 4


@pytest.mark.usefixtures("quick_bounds")
@pytest.mark.parametrize("seed", chosen(TRIPLES, at=range(1, len(TRIPLES), 2)))
def test_programs_and_the_exhaustive_search_agree(seed):
    space, tried = a_space(seed), searched(seed)
    proved = find(space, Milp())
    if not tried.ranked:
        assert not proved.ranked
        return
    assert proved.greatest_tokens_per_s == pytest.approx(tried.greatest_tokens_per_s, rel=MILP_AGREES)
    best, bound = tried.ranked[0].tokens_per_s, Bounding(space).go_on(tried.greatest_tokens_per_s).tokens_per_s
    assert max(best, proved.ranked[0].tokens_per_s) <= bound * (1 + 1e-9), "neither beats what the other is held to"
    check_best(space, proved)
    check_best(space, tried)


@pytest.mark.parametrize("seed", chosen(TRIPLES[1::2], at=(0, 4, 6)))
def test_trials_come_close_to_the_exhaustive_search(seed):
    space, tried = a_space(seed), searched(seed)
    if not tried.ranked:
        assert not Optuna(trials=5).find(space).ranked
        return
    close = (1 - OPTUNA_AGREES) * tried.tokens_per_s
    for trials in TRIALS:
        tries = Optuna(trials=trials, seed=seed).find(space)
        check_best(space, tries)
        if tries.tokens_per_s >= close:
            return
    pytest.fail(f"{tries.tokens_per_s} < {close}")


def test_a_study_goes_on_where_it_was_kept(tmp_path):
    space, storage = a_space(1), str(tmp_path / "trials.log")
    solver = Optuna(trials=5, storage=storage)
    first, second = solver.find(space), solver.find(space)
    assert second.evaluations > first.evaluations
    assert second.tokens_per_s >= first.tokens_per_s > 0
    other = replace(space, workload=replace(space.workload, gen_len=space.workload.gen_len + 1))
    assert study_name(other) != study_name(space)
    assert study_name(replace(space, known_tokens_per_s=5.0)) == study_name(space)
    assert solver.find(other).evaluations <= 5


def test_an_interrupted_search_reports_the_best_so_far():
    def stop(number: int, tokens_per_s: float) -> None:
        assert tokens_per_s > 0
        if number == 4:
            raise KeyboardInterrupt

    result = search(a_space(1), Optuna(trials=50, progress=stop))
    assert result.outcome is Outcome.INTERRUPTED
    assert 1 <= result.evaluations <= 4
    assert result.require().memory.fits


def test_processes_share_a_study(tmp_path):
    storage = str(tmp_path / "trials.log")
    trial = (
        "from tests.hrm.random_spaces import a_space; from hrm.search.bayesian import Optuna; "
        f"Optuna(trials=4, storage={storage!r}).find(a_space(1))"
    )
    both = [subprocess.Popen([sys.executable, "-c", trial]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    alone = Optuna(trials=4).find(a_space(1))
    assert Optuna(trials=1, storage=storage).find(a_space(1)).evaluations > alone.evaluations


@pytest.mark.parametrize("storage", ["/no/such/folder/trials.log", "nosql://x", "{folder}"])
def test_a_storage_that_cannot_be_used_is_named(tmp_path, storage):
    with pytest.raises(PolicyError, match=r"--storage.* is .*must be a .*that Optuna opens"):
        Optuna(trials=1, storage=storage.format(folder=tmp_path)).find(a_space(1))


@final
@dataclass(frozen=True)
class Smallest(Solver):
    """Micro-batches of one request, as a solver from outside that knows little would try them."""

    count: int = 2

    name: ClassVar[str] = "smallest"
    evaluates: ClassVar[str] = "policies of one request at a time"

    def find(self, space: Space) -> Found:
        places = [(1, number, 0, ALL_THAT_FIT, space.workload.max_prompt_len) for number in range(1, self.count + 1)]
        kind = next(kind for kind in space.kinds() if kind.kv is KvPlace.NONE)
        grid = make_grid(space, kind, np.array(places))
        fitting = [space.predicted(grid.policy(space, index)) for index in range(len(grid)) if grid.fits[index]]
        return Found(ranked=ranked(fitting), evaluations=len(grid), simulated=len(fitting))


def test_a_solver_from_outside_is_a_class_and_a_row(monkeypatch, capsys):
    monkeypatch.setitem(SOLVERS, "smallest", f"{__name__}:Smallest")
    space = Space(tiny_spec(), machine(), Workload(name="few", prompt_len=8, max_prompt_len=8, gen_len=4))
    alone = Smallest(count=2).find(space)
    result = search(space, solver_named("smallest", count=2))
    # What was found is polished and bounded as any solver's is.
    assert (result.solver, result.evaluations) == ("smallest", alone.evaluations)
    assert result.require().tokens_per_s >= alone.tokens_per_s * (1 - TIE)
    assert result.require().tokens_per_s <= result.bound_tokens_per_s < math.inf
    assert all(each.policy != result.require().policy for each in result.runner_ups)
    print_plan(result.require(), space.spec, space.profile, space.workload, result)
    assert f"smallest search: {result.evaluations} policies of one request at a time" in capsys.readouterr().out
    with pytest.raises(PolicyError, match=r"--count is 3.*--solver smallest only"):
        solver_named("milp", count=3)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_row_names_its_solver(name):
    assert solver_named(name).name == name


@pytest.mark.parametrize(
    ("seed", "limited"), chosen([(1, "max_tpot_s"), (9, "max_tpot_s"), (7, "max_ttft_s")], at=(1, 2))
)
def test_every_solver_keeps_limits_on_waiting_times(seed, limited):
    free = searched(seed).ranked[0]
    waited_s = free.latency.last_ttft_s if limited == "max_ttft_s" else free.latency.tpot_s
    assert waited_s is not None
    space = replace(a_space(seed), limits=LatencyLimits(**{limited: 0.7 * waited_s}))
    by_grid, *others = (within_limits(space, solver.find) for solver in (Exhaustive(), Milp(), Optuna(trials=25)))
    for found in (by_grid, *others):
        assert space.limits.are_met(found.ranked[0].latency)
        assert found.tokens_per_s >= 0.9 * by_grid.tokens_per_s  # few trials, and one policy of a kind by a program
    assert 0 < by_grid.tokens_per_s <= free.tokens_per_s * (1 + TIE)


def test_limits_that_nothing_meets_are_told_by_every_solver():
    space = replace(a_space(1), limits=LatencyLimits(max_ttft_s=1e-9), attention=Device.GPU, ffn=Device.GPU)
    for solver in (Exhaustive(), Milp(), Optuna(trials=5)):
        assert search(space, solver).outcome is Outcome.TOO_SLOW


def test_what_interrupts_one_space_ends_the_search():
    """Of several GPUs, that are unlike and on a host that pins a part of its memory, no other way is begun."""
    spaces: list[Space] = []

    class Interrupted(Solver):
        name, evaluates = "interrupted", "policies in closed form"

        def find(self, space: Space) -> Found:
            spaces.append(space)
            return replace(Exhaustive().find(space), interrupted=True, overshoot=(2.0, 2.0))

    profile = compose("1xL4+1xT4", "generic-server")
    result = search(Space(BUILT_IN_MODELS["mixtral-8x7b"], profile, WORKLOADS["mtbench"]), Interrupted())
    assert result.outcome is Outcome.INTERRUPTED
    assert len(spaces) == 1
