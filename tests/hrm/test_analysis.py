"""Questions of many searches, each answer against searches done one by one."""

import json
import math
import sys
from dataclasses import replace
from itertools import pairwise
from multiprocessing import active_children
from typing import Any

import pytest

from hrm.analysis import (
    Axis,
    Whole,
    compare_machines,
    front_of_cpu_memory,
    front_of_gpus,
    front_of_latency,
    policy_map,
    what_if,
)
from hrm.analysis.rows import in_processes, searched
from hrm.causes import Cause
from hrm.cli.analysis import map_text
from hrm.errors import HrmError, PolicyError
from hrm.estimate import estimate
from hrm.scaling import Resource, resources, scale, with_resource
from hrm.search import Space, search, ways
from hrm.search.bound import CLOSE
from hrm.tasks import Device
from hrm.units import MB
from hrm.workload import Workload
from tests.hrm.support import machine, tiny_spec

pytestmark = pytest.mark.usefixtures("rough_bounds", "searches_kept")

SPEC = tiny_spec(num_layers=8, hidden_size=256, intermediate_size=512)
WORKLOAD = Workload(name="test", prompt_len=40, max_prompt_len=100, gen_len=9)


def small(name: str = "small", **changes: Any):
    sizes = {"gpu_bytes": 12 * MB, "cpu_bytes": 80 * MB, "link": 1e9, "cpu_flops": 1e10}
    return replace(machine(**(sizes | changes)), name=name)


def asked(profile, workload=WORKLOAD) -> Space:
    """All but experts on the slow CPU, half of a search."""
    return Space(SPEC, profile, workload, ffn=Device.GPU)


def rate(profile, workload=WORKLOAD) -> float:
    return search(asked(profile, workload)).require().tokens_per_s


@pytest.mark.slow
@pytest.mark.usefixtures("coarse_searches")
def test_what_if_is_a_search_on_every_scaled_machine():
    profile, calls = small(), []
    frame = what_if(asked(profile), factor=1.5, on_point=lambda: calls.append(1))
    named = {resource.value for resource in resources(profile)}
    assert set(frame["resource"]) == {*named, Cause.WAITING.value}
    assert len(calls) == len(frame) - 1
    assert list(frame["change"]) == sorted(frame["change"], reverse=True)
    now, today = rate(profile), search(asked(profile)).require().policy
    for row in frame.to_dict("records"):
        if row["resource"] == Cause.WAITING.value:
            continue
        resource = Resource(row["resource"])
        factor = 1 / 1.5 if resource.is_latency else 1.5
        scaled = scale(profile, resource, factor)
        if resource in {Resource.H2D_BANDWIDTH, Resource.GPU_MEMORY, Resource.CPU_FLOPS, Resource.LINK_LATENCY}:
            assert row["change"] >= (rate(scaled) / now) / (1 + CLOSE) - 1 - 1e-12
        kept = estimate(SPEC, today, scaled, WORKLOAD).tokens_per_s / now - 1
        assert row["same_policy_change"] == pytest.approx(kept)
        assert row["change"] >= kept
        assert row["elasticity"] == pytest.approx(row["change"] / (factor - 1))
    assert frame["change"].iloc[0] > 0.05


@pytest.mark.slow
def test_searches_divided_among_processes_find_what_one_does(monkeypatch):
    space, calls = asked(small()), []
    alone = front_of_latency(space, requests=[1, 7, 40, 64])
    monkeypatch.setattr("hrm.analysis.rows._WORTH_S", 0.0)
    with in_processes(2):
        divided = front_of_latency(space, requests=[1, 7, 40, 64], on_point=lambda: calls.append(active_children()))
    assert alone.equals(divided)
    assert [len(children) for children in calls] == [0, 2, 2, 2]
    assert not active_children()


@pytest.mark.parametrize("lost", ["in the first", "in another process"])
def test_a_mistake_found_in_another_process_is_told_as_it_is(monkeypatch, lost):
    """A pool whose results cannot be read waits for them without end."""
    fine = asked(small())
    wrong = replace(fine, experts_per_part=SPEC.num_experts + 1)
    spaces = [wrong, fine] if lost == "in the first" else [fine, fine, wrong]
    monkeypatch.setattr("hrm.analysis.rows._WORTH_S", 0.0)
    with in_processes(2), pytest.raises(PolicyError, match=r"--experts-per-part is .*: must be at most") as caught:
        list(searched(spaces, None))
    assert (caught.value.where, caught.value.value) == ("--experts-per-part", SPEC.num_experts + 1)
    assert not active_children()


def test_less_of_a_resource_may_leave_nothing_that_fits(monkeypatch):
    module = sys.modules[what_if.__module__]
    monkeypatch.setattr(module, "resources", lambda _: [Resource.CPU_FLOPS, Resource.CPU_MEMORY])
    frame = what_if(asked(small()), factor=0.05)
    gone = frame[frame["resource"] == "cpu-memory"].iloc[0]
    assert math.isnan(gone["change"])
    assert "no policy fits" in gone["reason"]
    with pytest.raises(HrmError, match="other than 1"):
        what_if(asked(small()), factor=1.0)


def test_machines_are_compared_the_fastest_first():
    machines = [small("slow", link=1e8), small("none", cpu_bytes=1 * MB), small("fast", link=1e10)]
    frame = compare_machines([asked(one) for one in machines])
    assert list(frame["machine"]) == ["fast", "slow", "none"]
    assert frame["tokens_per_s"].iloc[0] == rate(machines[2])
    assert math.isnan(frame["tokens_per_s"].iloc[2])
    assert "no policy fits" in frame["reason"].iloc[2]
    assert set(frame["dtype"]) == {"bfloat16"}


def test_more_host_memory_is_never_slower(monkeypatch):
    monkeypatch.setattr("hrm.analysis.fronts.POINTS", 6)
    frame = front_of_cpu_memory(asked(small()))
    rates = frame["tokens_per_s"].dropna()
    # A search is no oracle: on a larger machine it may miss the best by a little.
    assert all(later >= 0.99 * earlier for earlier, later in pairwise(rates))
    memory = int(frame["cpu_memory_bytes"].iloc[-1])
    assert memory == 80 * MB
    assert rates.iloc[-1] == rate(with_resource(small(), Resource.CPU_MEMORY, memory))


def test_latency_is_the_time_until_all_requests_are_answered():
    frame = front_of_latency(asked(small()), requests=[1, 7, 40])
    for row in frame.to_dict("records"):
        job = replace(WORKLOAD, num_requests=row["num_requests"])
        best = search(asked(small(), job)).require()
        assert row["latency_s"] == best.seconds
        assert row["tokens_per_s"] == pytest.approx(row["num_requests"] * 9 / row["latency_s"])


def test_front_of_gpus_counts_each_of_them():
    machines = [small(num_gpus=count, gpu_bytes=count * 12 * MB) for count in (1, 2)]
    frame = front_of_gpus([asked(one) for one in machines])
    assert list(frame["num_gpus"]) == [1, 2]
    assert list(frame["tokens_per_s_a_gpu"]) == [rate(machines[0]), rate(machines[1]) / 2]
    assert frame["parallelism"].isna().tolist() == [True, False]


def test_a_map_is_a_search_in_every_cell():
    x = Axis(Resource.H2D_BANDWIDTH, (1e8, 1e10))
    y = Axis(Whole.CPU, (0.01, 3.0))
    frame = policy_map(asked(small()), x=x, y=y)
    assert len(frame) == 4
    for row in frame.to_dict("records"):
        profile = small()
        for resource in (Resource.CPU_MEMORY, Resource.CPU_BANDWIDTH, Resource.CPU_FLOPS):
            profile = scale(profile, resource, row["cpu_factor"])
        profile = with_resource(profile, Resource.H2D_BANDWIDTH, row["h2d_bandwidth_bytes_per_s"])
        result = search(asked(profile))
        if result.best is None:
            assert row["cpu_factor"] == 0.01
            assert not isinstance(row["region"], str)
            continue
        assert row["tokens_per_s"] == result.best.tokens_per_s
        policy = result.best.policy
        on_cpu = policy.attention.value == "cpu" and policy.kv_share_on_gpu < 1
        assert ("attention on the CPU" in row["region"]) == on_cpu
        assert row["kv_offloaded"] == 1 - policy.kv_share_on_gpu
    text = map_text(frame, x, y)
    assert "·  no policy fits" in text
    assert text.splitlines()[0] == ("cpu (cpu-memory, cpu-bandwidth, cpu-flops) times (up), h2d-bandwidth (right)")


# ------------------------------------------------------------------------------- command lines

QUICK = ["--model", "olmoe-1b-7b", "--requests", "20"]


@pytest.mark.slow
@pytest.mark.usefixtures("coarse_searches")
def test_commands_print_rows_as_json(hrm, tmp_path):
    csv = tmp_path / "rows.csv"
    for arguments, count in (
        (["search", *QUICK, "--gpus", "1xT4,2xT4,1xL4"], 3),
        (["search", *QUICK, "--gpus", "1xT4", "--pareto", "gpus"], 3),
        (["whatif", *QUICK, "--gpus", "1xT4"], 12),
        (["map", *QUICK, "--gpus", "1xT4", "--x", "cpu=1:2:2", "--y", "gpu-memory=9GB:12GB:2"], 4),
    ):
        _, out, _ = hrm(*arguments, "--json", "--csv", csv)
        rows = json.loads(out)["rows"]
        assert len(rows) == count
        assert len(csv.read_text().splitlines()) == count + 1
        assert all(row["tokens_per_s"] > 0 for row in rows)


def test_a_search_by_each_solver_finds_as_much(hrm, tmp_path):
    found = {}
    for solver in ("exhaustive", "milp", "optuna"):
        extra = ["--trials", 20, "--storage", tmp_path / "t.log"] if solver == "optuna" else []
        asked = ("search", "--model", "olmoe-1b-7b", "--gpus", "1xT4", "--requests", 6)
        asked = (*asked, "--attention", "gpu", "--ffn", "gpu")  # of four kinds of policies one: programs take long
        _, out, _ = hrm(*asked, "--solver", solver, *extra, "--json")
        plan = json.loads(out)
        assert plan["search"]["solver"] == solver
        found[solver] = plan["predicted"]["tokens_per_s"]
    # They agree in closed form (test_solvers); these are the simulations of what each chose.
    assert found["milp"] == pytest.approx(found["exhaustive"], rel=0.02)
    assert found["optuna"] >= 0.9 * found["exhaustive"]  # few trials; test_solvers asks for more
    assert (tmp_path / "t.log").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["search", *QUICK, "--gpus", "1xT4", "--trials", "5"], ("--trials is 5", "optuna only")),
        (["search", *QUICK, "--gpus", "1xT4,1xL4", "--solver", "milp"], ("several machines",)),
        (["search", *QUICK, "--gpus", "1xT4,1xL4", "--pareto", "gpus"], ("must be one",)),
        (["search", *QUICK, "--gpus", "1xT4", "--plot", "x.png"], ("--pareto",)),
        (["search", *QUICK, "--gpus", "1xT4", "--set", "link=3"], ("--set", "h2d-bandwidth")),
        (["search", *QUICK, "--gpus", "1xT4", "--set", "cpu-memory=x"], ("--set cpu-memory", "GB")),
        (["estimate", *QUICK, "--gpus", "1xT4,1xL4", "-u", "1", "-n", "1"], ("one machine",)),
        (["whatif", *QUICK, "--gpus", "1xT4", "--percent", "0"], ("--percent", "other than 0")),
        (["whatif", *QUICK, "--gpus", "1xT4", "--percent", "1e30"], ("--percent", "at most 100,000")),
        (["whatif", *QUICK, "--gpus", "1xT4", "--plot", "x.gif"], ("x.gif is <.gif>", "must end in .png")),
        (["map", *QUICK, "--gpus", "1xT4", "--x", "cpu=1", "--y", "gpu=1:2:2"], ("FROM:TO",)),
        (["map", *QUICK, "--gpus", "1xT4", "--x", "cpu=1:2:2", "--y", "cpu=1:2:2"], ("another",)),
        (["map", *QUICK, "--gpus", "1xT4", "--x", "cpu=a:2:2", "--y", "gpu=1:2:2"], ("factor",)),
        (["map", *QUICK, "--gpus", "1xT4", "--x", "cpu=2:1:2", "--y", "gpu=1:2:2"], ("greater",)),
        (
            ["map", *QUICK, "--gpus", "1xT4", "--x", "cpu=1:2:2", "--y", "gpu=1:2:2", "--plot", "/none/x.png"],
            ("No such",),
        ),
    ],
)
def test_mistakes_are_told_in_one_line_before_any_search(refused, monkeypatch, arguments, words):
    monkeypatch.setattr(ways, "_search", None)
    error = refused(*arguments)
    assert all(word in error for word in words), error


def test_a_storage_that_cannot_be_used_is_told_in_one_line(refused):
    asked = ["--solver", "optuna", "--trials", "1", "--storage", "/nowhere/at/all"]
    error = refused("search", *QUICK, "--gpus", "1xT4", *asked)
    assert "--storage" in error
    assert "must be" in error
