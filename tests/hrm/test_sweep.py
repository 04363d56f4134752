"""A sweep is so many single searches, as a table."""

import math
from dataclasses import replace
from itertools import pairwise

import pandas as pd
import pytest

from hrm.analysis import SWEPT, Axis, Length, Whole, sweep
from hrm.errors import HrmError, ProfileError
from hrm.machines import compose, with_memory
from hrm.policy import ScheduleName
from hrm.scaling import Resource, resource_value, resources, scale
from hrm.search import Space, search
from hrm.tasks import Device
from hrm.units import MB, UnitError
from hrm.workload import Workload
from tests.hrm.support import machine, tiny_spec

pytestmark = pytest.mark.usefixtures("coarse_searches")

SPEC = tiny_spec()
WORKLOAD = Workload(name="test", prompt_len=32, max_prompt_len=96, gen_len=8, num_requests=40)
PROFILE = machine(gpu_bytes=0.8 * MB, cpu_bytes=40 * MB, link=1e8)
PAIR = compose("2xT4")


@pytest.mark.slow
def test_every_row_is_the_search_for_its_machine():
    memories = [0.05 * MB, 2 * MB, 40 * MB]
    schedules = [ScheduleName.CGOPIPE, ScheduleName.FLEXGEN]
    frame = sweep(Space(SPEC, PROFILE, WORKLOAD), Axis(Resource.CPU_MEMORY, tuple(memories)), schedules=schedules)
    assert list(frame.schedule) == ["cgopipe"] * 3 + ["flexgen"] * 3
    assert list(frame.cpu_memory_bytes) == memories * 2
    for _, row in frame.iterrows():
        single = search(
            Space(
                SPEC,
                with_memory(PROFILE, cpu_memory_bytes=row.cpu_memory_bytes),
                WORKLOAD,
                schedule=ScheduleName(row.schedule),
            )
        ).best
        if single is None:
            assert row.reason == "no policy fits, even with one request at a time"
            assert row.drop(["schedule", "cpu_memory_bytes", "reason"]).isna().all()
            continue
        assert row.reason == ""
        assert row.tokens_per_s == single.tokens_per_s
        assert row.bound_tokens_per_s == single.bound_tokens_per_s
        n, mu, a_g, f_g, r_w, r_c = single.policy.paper_tuple(SPEC)
        assert (row.batch_size, row.micro_batch_size) == (n, mu)
        assert (row.attention == "gpu", row.ffn == "gpu") == (bool(a_g), bool(f_g))
        assert (row.weight_share_on_gpu, row.kv_share_on_gpu) == (r_w, r_c)
        assert row.num_micro_batches == math.ceil(n / mu)
        limits = single.limits
        assert row.bottleneck == limits.job.cause.value
        assert row.prefill_bottleneck == limits.prefill.cause.value
        assert row.decode_bottleneck == limits.decode.cause.value
        assert row.batch_s * single.num_batches == pytest.approx(single.seconds)
        assert row.cpu_planned_bytes <= row.cpu_memory_bytes
    assert frame.tokens_per_s.isna().tolist() == [True, False, False] * 2
    assert frame.batch_size.dtype == "Int64"


@pytest.mark.parametrize("resource", [Resource.H2D_BANDWIDTH, Resource.GPU_FLOPS])
def test_more_of_a_rate_never_costs_throughput(resource):
    now = {"h2d-bandwidth": 1e8, "gpu-flops": 50e12}[resource]
    frame = sweep(Space(SPEC, PROFILE, WORKLOAD), Axis(resource, (now / 50, now / 4, now, 4 * now)))
    rates = list(frame.tokens_per_s)
    assert all(b >= 0.99 * a for a, b in pairwise(rates)), rates
    assert frame[resource.column].tolist() == [now / 50, now / 4, now, 4 * now]
    plain = search(Space(SPEC, scale(PROFILE, resource, 4), WORKLOAD)).require()
    assert rates[3] == pytest.approx(plain.tokens_per_s)


def test_lengths_are_swept_with_the_spread_of_the_workload():
    frame = sweep(Space(SPEC, PROFILE, WORKLOAD), Axis(Length.PROMPT_LEN, (16, 48)))
    for value, rate in zip((16, 48), frame.tokens_per_s, strict=True):
        asked = replace(WORKLOAD, prompt_len=value, max_prompt_len=3 * value)
        assert rate == search(Space(SPEC, PROFILE, asked)).require().tokens_per_s
    frame = sweep(Space(SPEC, PROFILE, WORKLOAD), Axis(Length.GEN_LEN, (4, 16)))
    single = search(Space(SPEC, PROFILE, replace(WORKLOAD, gen_len=16))).require()
    assert frame.tokens_per_s[1] == single.tokens_per_s
    assert "gen_len" in frame.columns


def test_options_go_to_the_search_and_every_point_is_told():
    told: list[int] = []
    frame = sweep(
        Space(SPEC, PROFILE, WORKLOAD, attention=Device.GPU),
        Axis(Resource.CPU_BANDWIDTH, (5e10, 1e11)),
        on_point=lambda: told.append(len(told)),
    )
    assert list(frame.attention) == ["gpu", "gpu"]
    assert told == [0, 1]
    assert isinstance(frame, pd.DataFrame)


def test_what_the_machine_lacks_cannot_be_swept():
    with pytest.raises(ProfileError, match="has no link between GPUs"):
        sweep(Space(SPEC, PROFILE, WORKLOAD), Axis(Resource.PEER_BANDWIDTH, (1e9,)))


def test_values_are_read_as_people_write_them():
    for name, text, value in (
        ("cpu-memory", "64GB", 64e9),
        ("h2d-bandwidth", "12 GB/s", 12e9),
        ("gpu-flops", "65TFLOP/s", 65e12),
        ("prompt-len", "512", 512),
        ("cpu", "1.5", 1.5),
    ):
        assert SWEPT[name].read(text, "--from") == value
    with pytest.raises(UnitError, match="--to is '12XB'"):
        Resource.CPU_MEMORY.read("12XB", "--to")
    with pytest.raises(HrmError, match="--to is 'much': must be a factor"):
        Whole.CPU.read("much", "--to")
    for text in ("", "0", "1.5", "-3", "²"):
        with pytest.raises(HrmError, match=r"--to is .*: must be a positive number of tokens"):
            Length.GEN_LEN.read(text, "--to")


@pytest.mark.parametrize("name", SWEPT)
def test_a_space_at_what_it_has_now_is_as_it_is(name):
    space = Space(SPEC, PAIR, WORKLOAD)
    assert set(resources(PAIR)) == set(Resource)
    axis = Axis(SWEPT[name], ())
    same = axis.at(space, axis.now(space))
    assert same.workload == WORKLOAD
    for resource in Resource:
        assert resource_value(same.profile, resource) == pytest.approx(resource_value(PAIR, resource))
    value = max(2 * axis.now(space), 1e-6)
    more = axis.at(space, value)
    assert more != space
    assert axis.now(more) == pytest.approx(1.0 if isinstance(axis.what, Whole) else value)


def test_points_lie_evenly_between_the_ends():
    assert Axis.between(Resource.CPU_MEMORY, 64e9, 512e9, 8).points == tuple(64e9 * n for n in range(1, 9))
    rates = Axis.between(Resource.H2D_BANDWIDTH, 1e9, 16e9, 5, logarithmic=True).points
    assert rates == pytest.approx((1e9, 2e9, 4e9, 8e9, 16e9))
    assert Axis.between(Length.GEN_LEN, 16, 20, 9).points == (16, 17, 18, 19, 20), "whole, and each once"
    for low, high, count in ((2, 1, 3), (1, 1, 3), (0, 1, 3), (1, 2, 1), (1, math.inf, 3)):
        with pytest.raises(HrmError, match="two or more points"):
            Axis.between(Resource.H2D_BANDWIDTH, low, high, count)
