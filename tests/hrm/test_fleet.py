"""A fleet's shares against searches of each machine alone."""

from dataclasses import replace

import pytest

from hrm.analysis.fleet import MachineKind, plan_fleet
from hrm.cli.fleet import _fleet_of
from hrm.errors import HrmError
from hrm.machines import compose
from hrm.search import Space, search
from hrm.units import MB
from hrm.workload import Workload
from tests.hrm.support import machine, tiny_spec

pytestmark = pytest.mark.usefixtures("coarse_searches", "searches_kept")

SPEC = tiny_spec(num_layers=4, hidden_size=256, intermediate_size=512)
WORKLOAD = Workload(name="test", prompt_len=40, max_prompt_len=100, gen_len=9)
SLOW = machine(gpu_bytes=12 * MB, cpu_bytes=80 * MB, link=1e8, cpu_flops=1e9)
FAST = machine(gpu_bytes=12 * MB, cpu_bytes=80 * MB, link=1e9, cpu_flops=1e10)
NONE = machine(gpu_bytes=1 * MB, cpu_bytes=1 * MB)


def kinds(*counted, requests=None):
    workload = replace(WORKLOAD, num_requests=requests)
    return [MachineKind(f"kind{i}", n, Space(SPEC, profile, workload)) for i, (n, profile) in enumerate(counted)]


def alone(profile, requests=None):
    return search(Space(SPEC, profile, replace(WORKLOAD, num_requests=requests))).require()


def test_without_end_all_work_at_their_own_rate_and_share_in_proportion():
    slow, fast = alone(SLOW).tokens_per_s, alone(FAST).tokens_per_s
    three, two = kinds((3, SLOW), (2, FAST))
    fleet = plan_fleet([replace(three, price_per_hour=1), replace(two, price_per_hour=2)])
    assert fleet.tokens_per_s == pytest.approx(3 * slow + 2 * fast)
    assert fleet.tokens_per_price == pytest.approx((3 * slow + 2 * fast) * 3600 / 7)
    assert list(fleet.rows["tokens_per_price"]) == pytest.approx([slow * 3600, fast * 1800])
    # Any part of the job takes one machine of each kind as long.
    share = fleet.rows["share"]
    assert share.sum() == pytest.approx(1)
    assert share[0] / 3 / slow == pytest.approx(share[1] / 2 / fast)


def test_of_a_job_with_an_end_all_are_done_and_at_about_the_same_time():
    calls = []
    fleet = plan_fleet(kinds((3, SLOW), (2, FAST), requests=400), on_point=lambda: calls.append(1))
    slow, fast = map(int, fleet.rows["num_requests"])
    assert fleet.seconds is not None
    assert 400 <= 3 * slow + 2 * fast < 400 + 5
    ends = [alone(SLOW, slow).seconds, alone(FAST, fast).seconds]
    assert fleet.seconds == max(ends)
    assert fleet.tokens_per_s == pytest.approx(400 * 9 / fleet.seconds)
    assert min(ends) > 0.7 * fleet.seconds  # no closer than batches divide
    assert fleet.seconds < max(alone(SLOW, 80).seconds, alone(FAST, 80).seconds)
    assert calls


def test_machines_on_which_nothing_fits_get_nothing_to_do():
    for requests in (None, 40):
        fleet = plan_fleet(kinds((2, NONE), (1, FAST), requests=requests))
        assert list(fleet.rows["share"]) == [0, 1]
        assert fleet.tokens_per_s == pytest.approx(alone(FAST, requests).tokens_per_s)
        assert "no policy fits" in fleet.rows["reason"][0]
    with pytest.raises(HrmError, match="no policy fits"):
        plan_fleet(kinds((2, NONE)))


def test_a_fleet_is_written_as_machines_of_gpus():
    choice = _fleet_of(fleet="3x(4xT4),1xL4, 2x(4xT4)", prices="(4xT4)=2.5,1xL4=0.7")
    assert choice is not None
    assert choice.counts == {"4xT4": 5, "1xL4": 1}
    assert choice.prices == {"4xT4": 2.5, "1xL4": 0.7}


def test_the_command_tells_the_whole_and_the_shares(hrm, hrm_json):
    args = ["search", "--model", "mixtral-8x7b", "--fleet", "3x(1xT4),(2xL4)", "--prices", "1xT4=0.5,2xL4=2"]
    told = hrm_json(*args)
    assert told["num_machines"] == 4
    assert told["price_per_hour"] == 3.5
    assert told["tokens_per_price"] == pytest.approx(told["tokens_per_s"] * 3600 / 3.5)
    assert [row["kind"] for row in told["rows"]] == ["1xT4", "2xL4"]
    assert [row["machine"] for row in told["rows"]] == [compose("1xT4").name, compose("2xL4").name]
    assert told["rows"][0]["tokens_per_s_of_all"] == pytest.approx(3 * told["rows"][0]["tokens_per_s"])
    code, out, _ = hrm(*args)
    assert code == 0
    assert f"{told['rows'][1]['share']:.1%}" in out
    assert f"the fleet: {told['tokens_per_s']:.4g} tokens/s" in out


MISTAKES = {
    "no machine": (["--fleet", "0x(4xT4)"], "--fleet is '0x(4xT4)': must be 1 to 1,000,000 machines of one kind"),
    "an open bracket": (["--fleet", "2x(4xT4"], "--fleet is '2x(4xT4'"),
    "two kinds in one": (["--fleet", "2x(4xT4,1xL4)"], "--fleet is '2x(4xT4,1xL4)'"),
    "an unknown GPU": (["--fleet", "2x(4xT5)"], "--fleet is 'T5'"),
    "another machine": (["--fleet", "2x(4xT4)", "--gpus", "1xL4"], "--gpus is '1xL4': does not go with --fleet"),
    "a front": (["--fleet", "2x(4xT4)", "--pareto", "gpus"], "--pareto is 'gpus': does not go with --fleet"),
    "a policy file": (
        ["--fleet", "2x(4xT4)", "--out", "p.json"],
        "--out is 'p.json': is for one search, and does not go with --fleet",
    ),
    "fewer requests than machines": (["--fleet", "3x(4xT4)", "--requests", "2"], "at least one for each of"),
    "prices alone": (["--gpus", "T4", "--prices", "T4=1"], "--prices is 'T4=1': goes with --fleet only"),
    "a price missing": (["--fleet", "2x(4xT4),1xL4", "--prices", "4xT4=2"], "must have every kind, 1xL4 too"),
    "a price of nothing": (["--fleet", "1xL4", "--prices", "1xL4=0"], "--prices is '1xL4=0': must be a price above 0"),
    "two prices": (["--fleet", "1xL4", "--prices", "1xL4=1,1xL4=2"], "--prices is '1xL4=2'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_one_line_that_names_it(refused, monkeypatch, tmp_path, mistake):
    monkeypatch.chdir(tmp_path)
    args, message = MISTAKES[mistake]
    assert message in refused("search", "--model", "mixtral-8x7b", *args)
