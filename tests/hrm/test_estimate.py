"""Estimates against the bound, against whole simulations, and against sums done by hand."""

import sys
import time
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from hrm.closed_form import DecodeStep, Point, batch_seconds, phases_of_batches, prefill_terms, whole_prefill
from hrm.contention import ALONE
from hrm.costs import Costs
from hrm.errors import PolicyError
from hrm.estimate import Prospect, estimate
from hrm.formats import Formats
from hrm.hardware import Figure, HardwareProfile, LaneThreads, Source
from hrm.layers import ExpertDivision
from hrm.machines import compose
from hrm.model_spec import BUILT_IN_MODELS, ModelSpec
from hrm.phase_work import prefill_phase
from hrm.phases import decode_work, prefill_seconds, prefill_work, simulate_work, step_seconds
from hrm.policy import Policy, ScheduleName, kv_tokens_for, spread_experts
from hrm.scaling import Resource, scale
from hrm.schedules import SCHEDULES, decode_pipeline, iter_tasks, pages_of
from hrm.search import Space
from hrm.tasks import Device, Lane
from hrm.workload import WORKLOADS, Workload
from tests.contracts.selection import chosen
from tests.hrm.random_plans import Case, random_case, random_policies
from tests.hrm.support import (
    machine,
    random_dimensions,
    random_experts_per_part,
    random_spec,
    random_varied_spec,
    tiny_spec,
)

ROUNDING = 1e-4  # simulated tasks move whole bytes
FLEXGEN_OVERLAPS = 0.05  # embeddings and sampling, which its closed form has in turn
WORKLOAD = Workload(name="test", prompt_len=40, max_prompt_len=100, gen_len=9)


def random_policy(rng: Random, spec: ModelSpec, schedule: ScheduleName) -> Policy:
    micro_batch_size, n = rng.randint(1, 40), rng.randint(1, 7)
    batch_size = max(micro_batch_size * n - rng.randint(0, micro_batch_size - 1), micro_batch_size)
    made = Policy(
        schedule=schedule,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        attention=rng.choice(list(Device)),
        ffn=(ffn := rng.choice(list(Device))),
        prefill_ffn=ffn if n % 2 else Device.GPU,
        resident_experts=spread_experts(spec, rng.randint(0, spec.num_expert_layers * (spec.num_experts - 1))),
        resident_dense=rng.random() < 0.5,
        gpu_kv_micro_batches=rng.choice([0, 0, n // 2, n]),
        kv_tokens_per_micro_batch=kv_tokens_for(micro_batch_size, 49, 109),
        prefill_chunk_tokens=rng.choice([100, 250, 4000]),
        staging=rng.random() < 0.3,
    )
    parts = random_experts_per_part(Random(batch_size), spec, made.prefill_ffn, staging=made.staging)
    return replace(made, experts_per_part=parts)


def random_machine(rng: Random, latency_s: float | None = None) -> HardwareProfile:
    """Rates from far apart, so that every lane is the bottleneck somewhere."""
    return machine(
        gpu_flops=10 ** rng.uniform(9, 13),
        cpu_flops=10 ** rng.uniform(8, 12),
        gpu_read=10 ** rng.uniform(9, 12),
        cpu_read=10 ** rng.uniform(8, 11),
        link=10 ** rng.uniform(6, 10),
        latency_s=rng.choice([0.0, 1e-5]) if latency_s is None else latency_s,
        launch_s=rng.choice([0.0, 1e-6]),
    )


@pytest.mark.parametrize("schedule", ScheduleName)
def test_no_schedule_is_predicted_to_beat_its_bound(schedule):
    longest = set[str]()
    for seed in range(30):
        rng = Random(seed)
        spec = random_spec(rng)
        policy, profile = random_policy(rng, spec, schedule), random_machine(rng)
        predicted = estimate(spec, policy, profile, WORKLOAD)
        for name, phase in (("prefill", predicted.prefill), ("decode", predicted.decode)):
            assert phase.bound_s <= phase.seconds * (1 + ROUNDING), (seed, name, phase, policy)
            assert max(phase.lane_s.values()) <= phase.seconds * (1 + ROUNDING)
        assert predicted.tokens_per_s <= predicted.bound_tokens_per_s * (1 + ROUNDING)
        longest.add(predicted.decode.work.longest)
    assert longest >= {Lane.GPU.value, Lane.CPU.value, Lane.H2D.value}


@pytest.mark.parametrize("schedule", ScheduleName)
def test_lane_work_of_the_closed_form_is_that_of_the_simulated_tasks(schedule):
    for seed in range(40):
        rng = Random(100 + seed)
        spec = random_varied_spec(rng)
        policy, profile = random_policy(rng, spec, schedule), random_machine(rng, latency_s=0.0)
        policy = replace(policy, experts_per_part=min(policy.experts_per_part, 1))  # else the last part may be smaller
        costs = Costs(spec, profile, Formats.of("bfloat16"))
        work = replace(decode_work(costs, policy, 45.0, num_steps=1), stretch=ALONE)
        trace = simulate_work(work)
        lanes = DecodeStep.of_point(costs, Point.of_policy(policy, spec), schedule).seconds(45.0).lanes
        for lane, seconds in trace.busy_s().items():
            # Tasks move whole bytes and, in some layers, an expert more than in others.
            assert lanes[lane] == pytest.approx(seconds, rel=4e-3), (seed, lane, policy)
        whole = replace(policy, prefill_chunk_tokens=10**9)
        trace = simulate_work(replace(prefill_work(costs, whole, WORKLOAD), stretch=ALONE))
        kv_is_whole = policy.gpu_kv_micro_batches in {0, policy.num_micro_batches}
        lanes = whole_prefill(costs, Point.of_policy(whole, spec), WORKLOAD).lanes
        for lane, seconds in trace.busy_s().items():
            if lane is not Lane.D2H or kv_is_whole:
                assert lanes[lane] == pytest.approx(seconds, rel=4e-3), (seed, lane, policy)


CUT = [("mixtral-8x7b", "1xT4", (0, 1)), ("dbrx", "4xT4", (5, 6)), ("dbrx", "4xT4", (0, 16))]


@pytest.mark.parametrize("schedule", [ScheduleName.CGOPIPE, ScheduleName.FLEXGEN])
@pytest.mark.parametrize(("model", "gpus", "residents"), CUT)
def test_time_carried_on_from_few_layers_is_that_of_all_layers(monkeypatch, schedule, model, gpus, residents):
    spec, profile = BUILT_IN_MODELS[model], compose(gpus)
    low, high = residents
    total = (low + high) * spec.num_layers // 2 + spec.num_layers // 5
    halves = (high,) * (spec.num_layers // 2) + (low,) * (spec.num_layers - spec.num_layers // 2)
    even = spread_experts(spec, min(total, high * spec.num_layers))
    for counts, tolerance in (((low,) * spec.num_layers, 0.01), (even, 0.01), (halves, 0.04)):
        policy = Policy(
            schedule=schedule,
            batch_size=30 * 64,
            micro_batch_size=64,
            resident_experts=counts,
            kv_tokens_per_micro_batch=64 * 224,
            prefill_chunk_tokens=4096,
            dtype="float16",
        )
        costs = Costs(spec, profile, Formats.of("float16"))
        workload = Workload(name="test", prompt_len=77, max_prompt_len=418, gen_len=64)
        quick = step_seconds(costs, policy, 150), prefill_seconds(costs, policy, workload)
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[step_seconds.__module__], "MAX_TASKS", 10**9)
            whole = step_seconds(costs, policy, 150), prefill_seconds(costs, policy, workload)
        assert quick == pytest.approx(whole, rel=tolerance), counts


@pytest.mark.parametrize("seed", [7, 21, 75, 153, 225])
def test_what_is_left_out_of_long_graphs_waits_as_what_is_simulated(monkeypatch, seed):
    """Also where some layers have all experts on the GPU and others none, in any order, and wait for one another."""
    rng = Random(seed)
    case = random_case(rng)
    for policy in random_policies(rng, case, None, count=2):
        short = estimate(case.spec, policy, case.profile, case.workload)
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[step_seconds.__module__], "MAX_TASKS", 10**9)
            whole = estimate(case.spec, policy, case.profile, case.workload)
        assert short.tokens_per_s == pytest.approx(whole.tokens_per_s, rel=0.03), policy


@pytest.mark.parametrize("model", ["qwen3-next", "qwen3.5-35b-a3b", "deepseek-v3"])
def test_layers_of_other_kinds_take_turns_in_what_is_simulated(monkeypatch, model):
    """Of few large micro-batches that attend on the CPU for long in some layers only, means were 10 % too fast."""
    spec, profile = BUILT_IN_MODELS[model], compose("1xA10G", host="generic-server")
    workload = Workload(name="test", prompt_len=100, max_prompt_len=100, gen_len=300)
    policy = Policy(
        batch_size=7 * 462,
        micro_batch_size=462,
        resident_experts=(0,) * spec.num_layers,
        resident_dense=False,
        kv_tokens_per_micro_batch=462 * 416,
        prefill_chunk_tokens=8192,
    )
    costs, found = Costs(spec, profile, Formats.of("bfloat16")), list[float]()
    for most in (1, 10**9):
        monkeypatch.setattr(sys.modules[step_seconds.__module__], "MAX_TASKS", most)
        found += [step_seconds(costs, policy, 250.0), step_seconds(costs, policy, 16000.0)]
        found += [prefill_seconds(costs, policy, workload)]
    assert found[:3] == pytest.approx(found[3:], rel=1e-3)


@pytest.mark.parametrize("schedule", list(ScheduleName))
def test_time_of_few_micro_batches_that_stand_for_many_is_that_of_all(monkeypatch, schedule):
    """Also where the latency of very small pages of weights is most of the time."""
    module, spec, rng, n = sys.modules[step_seconds.__module__], tiny_spec(), Random(5), 120
    for seed in range(6):
        latency_s = 0.05 if seed % 2 else 0.0
        costs = Costs(spec, random_machine(rng, latency_s=latency_s), Formats.of("bfloat16"))
        policy = random_policy(rng, spec, schedule)
        policy = replace(
            policy, batch_size=policy.micro_batch_size * n, gpu_kv_micro_batches=rng.choice([0, n // 2, n])
        )
        for batch, few in ((policy, 40), (policy.for_batch(policy.micro_batch_size * 30), 60)):
            found: list[tuple[float, float]] = []
            for most in (few, 10**9):
                monkeypatch.setattr(module, "MAX_MICRO_BATCHES", most)
                found.append((step_seconds(costs, batch, 50.0), prefill_seconds(costs, batch, WORKLOAD)))
            assert found[0] == pytest.approx(found[1], rel=0.03), (seed, batch)


def test_any_number_of_micro_batches_is_estimated_at_once():
    spec, profile = tiny_spec(num_layers=6), machine(latency_s=1e-5)
    seconds: list[float] = []
    for n in (10**4, 10**6, 10**12):
        policy = replace(
            random_policy(Random(2), spec, ScheduleName.CGOPIPE),
            batch_size=40 * n,
            micro_batch_size=40,
            gpu_kv_micro_batches=n // 2,
        )
        began_s = time.process_time()
        predicted = estimate(spec, policy, profile, WORKLOAD)
        assert time.process_time() - began_s < 10
        seconds.append(predicted.seconds / n)
    assert seconds[1:] == pytest.approx(seconds[:1] * 2, rel=0.01)


def test_a_step_in_the_steady_state_takes_as_long_as_a_late_one_of_many():
    spec, profile = tiny_spec(num_layers=3), machine(link=1e8, cpu_read=1e9, gpu_read=1e10)
    for schedule in ScheduleName:
        for seed in range(10):
            policy = random_policy(Random(seed), spec, schedule)
            costs = Costs(spec, profile, Formats.of("bfloat16"))
            trace = simulate_work(decode_work(costs, policy, 50.0, num_steps=12))
            ends = [max(s.end_s for s in trace.spans if s.id.step == t) for t in range(12)]
            late = (ends[9] - ends[3]) / 6  # the last steps have fewer weights left to load
            assert step_seconds(costs, policy, 50.0) == pytest.approx(late, rel=0.02), seed


def test_a_job_is_its_full_batches_and_a_smaller_last_one():
    spec, profile = tiny_spec(), machine()
    policy = random_policy(Random(3), spec, ScheduleName.CGOPIPE)
    policy = replace(policy, batch_size=24, micro_batch_size=6, gpu_kv_micro_batches=2)
    one = estimate(spec, policy, profile, WORKLOAD)
    rest = estimate(spec, policy.for_batch(10), profile, WORKLOAD)
    job = estimate(spec, policy, profile, replace(WORKLOAD, num_requests=58))
    assert (one.num_requests, one.num_batches, one.generated_tokens) == (24, 1, 24 * 9)
    assert (job.num_requests, job.num_batches, job.generated_tokens) == (58, 3, 58 * 9)
    assert job.seconds == pytest.approx(2 * one.seconds + rest.seconds)
    for lane in Lane:
        assert job.decode.lane_s[lane] == pytest.approx(2 * one.decode.lane_s[lane] + rest.decode.lane_s[lane])


@pytest.mark.parametrize(
    ("requests", "expected"),
    [
        (25, (24, 6, 4, [False, True, False, True])),
        (24, (24, 6, 4, [False, True, False, True])),
        (13, (13, 6, 3, [False, True, True])),
        (10, (10, 6, 2, [True, True])),
        (3, (3, 3, 1, [True])),
    ],
)
def test_a_smaller_batch_has_as_many_caches_on_the_gpu_and_the_pages_of_the_whole(requests, expected):
    policy = replace(
        random_policy(Random(3), tiny_spec(), ScheduleName.CGOPIPE),
        batch_size=24,
        micro_batch_size=6,
        gpu_kv_micro_batches=2,
    )
    made = policy.for_batch(requests)
    on_gpu = [made.kv_on_gpu(j) for j in range(made.num_micro_batches)]
    assert (made.batch_size, made.micro_batch_size, made.num_micro_batches, on_gpu) == expected
    assert pages_of(made) == pages_of(policy) == 4
    assert pages_of(replace(made, schedule=ScheduleName.FLEXGEN)) == 1
    assert made.for_batch(2) == policy.for_batch(2), "however many times"


def test_a_link_bound_step_takes_the_time_of_its_weights():
    """All weights of Mixtral 8x7B over 10 GB/s, and nothing else that costs time."""
    spec = BUILT_IN_MODELS["mixtral-8x7b"]
    profile = machine(link=10e9, gpu_flops=1e18, cpu_flops=1e18, gpu_read=1e15, cpu_read=1e15)
    policy = Policy(
        batch_size=64,
        micro_batch_size=8,
        resident_experts=(2,) * 32,
        kv_tokens_per_micro_batch=1600,
        prefill_chunk_tokens=512,
    )
    costs = Costs(spec, profile, Formats.of("bfloat16"))
    weights_s = 32 * 6 * 3 * 4096 * 14336 * 2 / 10e9
    hidden_s = 64 * (32 + 1) * 4096 * 2 / 10e9  # attention outputs of 32 layers, and embeddings
    assert step_seconds(costs, policy, 100) == pytest.approx(weights_s + hidden_s, rel=1e-3)


def test_a_policy_for_another_model_is_refused():
    policy = random_policy(Random(1), tiny_spec(num_layers=3), ScheduleName.CGOPIPE)
    with pytest.raises(PolicyError, match="one count for each of the 4 layers"):
        estimate(tiny_spec(num_layers=4), policy, machine(), WORKLOAD)


@pytest.mark.parametrize("schedule", ScheduleName)
@pytest.mark.parametrize("first", chosen((0, 30, 60), at=(0,)))
def test_the_closed_form_takes_no_longer_than_the_simulation(first, schedule):
    """What the search leaves out by its closed form could not have won."""
    workload = replace(WORKLOAD, gen_len=60)  # contexts outgrow a window of 64 on the way
    flexgen = schedule in (ScheduleName.FLEXGEN, ScheduleName.FLEXGEN_C)
    for seed in range(first, first + 30):
        rng = Random(seed)
        # FlexGen's closed form is of layers alike.
        spec = replace(random_dimensions(rng), num_layers=6).spec if flexgen else random_varied_spec(rng)
        policy, profile = random_policy(rng, spec, schedule), random_machine(rng)
        policy = policy_of_system(policy)
        if flexgen:
            policy = replace(policy, resident_experts=(0,) * 6)
        costs = Costs(spec, profile, policy.formats)
        point = Point.of_policy(policy, spec)
        predicted = estimate(spec, policy, profile, workload)
        prefill_s, decode_s = batch_seconds(costs, point, schedule, workload)
        assert prefill_s <= predicted.prefill.seconds * (1 + ROUNDING), (seed, policy)
        within = FLEXGEN_OVERLAPS if flexgen else ROUNDING
        assert decode_s <= predicted.decode.seconds * (1 + within), (seed, policy)


@pytest.mark.parametrize("least_on_gpu", [0.0, 0.5])
def test_the_cpus_attention_and_the_gpu_wait_for_one_another_where_each_has_some_caches(least_on_gpu):
    exact = longest = 0
    for seed in range(120):
        rng = Random(seed)
        spec = random_varied_spec(rng)
        number, size = rng.randint(2, 9), rng.randint(1, 40)
        policy = replace(
            policy_of_system(random_policy(rng, spec, ScheduleName.CGOPIPE)),
            batch_size=size * number,
            micro_batch_size=size,
            attention=Device.CPU,
            ffn=Device.GPU if seed % 4 else Device.CPU,
            prefill_ffn=Device.GPU,
            gpu_kv_micro_batches=rng.randint(max(1, int(least_on_gpu * number)), number - 1),
            experts_per_part=0,
        )
        costs = Costs(spec, random_machine(rng), policy.formats)
        step = DecodeStep.of_point(costs, Point.of_policy(policy, spec), policy.schedule)
        *others, in_turn_s, with_attention_s = step.in_order(step.seconds(90.0))
        in_turn_s, simulated_s = max(in_turn_s, with_attention_s), step_seconds(costs, policy, 90.0)
        assert in_turn_s <= simulated_s * (1 + ROUNDING), (seed, policy)
        is_longest = in_turn_s > 1.01 * max(others)
        longest += is_longest
        exact += is_longest and simulated_s < in_turn_s * (1 + ROUNDING)
    assert longest > 7
    assert exact > 2, exact


def test_parts_of_experts_and_what_is_computed_between_them_take_turns():
    """Loads wait for the GPU to make room, and hidden states for such loads."""
    longest = near = 0
    for seed in range(75):
        rng = Random(seed)
        spec = random_varied_spec(rng)
        policy = replace(
            random_policy(rng, spec, ScheduleName.CGOPIPE),
            staging=False,
            prefill_ffn=Device.GPU,
            experts_per_part=rng.randint(1, max(1, spec.num_experts // 2)),
            resident_experts=spread_experts(
                spec, rng.randint(0, spec.num_expert_layers * max(0, spec.num_experts - 2))
            ),
        )
        costs = Costs(spec, random_machine(rng), policy.formats)
        point = Point.of_policy(policy, spec)
        step = DecodeStep.of_point(costs, point, policy.schedule)
        others = len(step.seconds(90.0).terms)
        of_prefill, of_step = prefill_terms(costs, point, WORKLOAD), step.terms(90.0)
        prefill_s, step_s = prefill_seconds(costs, policy, WORKLOAD), step_seconds(costs, policy, 90.0)
        step_s = max(step_s, *of_step[:others])  # few layers are not yet in their steady state
        assert max(of_prefill) <= prefill_s * (1 + ROUNDING), (seed, policy)
        assert max(of_step) <= step_s * (1 + ROUNDING), (seed, policy)
        longest += max(of_prefill[others:]) > 1.01 * max(of_prefill[:others])
        near += max(of_prefill[others:]) > max(0.98 * prefill_s, 1.01 * max(of_prefill[:others]))
    assert longest > 10
    assert near > 2, near


def policy_of_system(policy: Policy) -> Policy:
    """The policy within what the search leaves to the system that the schedule is from."""
    fixed = SCHEDULES[policy.schedule]
    if fixed.single_micro_batch:
        policy = replace(policy, micro_batch_size=policy.batch_size, gpu_kv_micro_batches=0)
    return replace(
        policy,
        attention=fixed.attention or policy.attention,
        ffn=fixed.ffn or policy.ffn,
        prefill_ffn=fixed.ffn or policy.prefill_ffn,
        gpu_kv_micro_batches=policy.num_micro_batches if fixed.kv_on_gpu else policy.gpu_kv_micro_batches,
    )


# -- the closed form over arrays --------------------------------------------------------------


@pytest.mark.parametrize("schedule", ScheduleName)
def test_a_grid_of_policies_is_computed_as_each_of_them_alone(schedule):
    rng = Random(7)
    spec = tiny_spec(num_experts=7, experts_per_token=3)
    profiles = [compose("1xT4"), machine(latency_s=1e-5, launch_s=1e-6)]
    for profile, staging, parts in ((profiles[0], 0, 0), (profiles[1], 1, 0), (profiles[1], 0, 2)):
        costs = Costs(spec, profile, Formats.of("bfloat16"))
        points = [
            replace(Point.of_policy(random_policy(rng, spec, schedule), spec), staging=staging, experts_per_part=parts)
            for _ in range(60)
        ]
        names = Point.__dataclass_fields__.keys() - {"staging", "experts_per_part", "parts_of_chunks"}
        grid = Point(
            **{name: np.array([getattr(p, name) for p in points]) for name in names},  # pyright: ignore[reportArgumentType]
            staging=staging,
            experts_per_part=parts,
        )
        # On one stage nothing waits to be filled.
        together = [np.asarray(seconds) for seconds in phases_of_batches(costs, grid, schedule, WORKLOAD)]
        alone = [batch_seconds(costs, point, schedule, WORKLOAD) for point in points]
        np.testing.assert_allclose(np.transpose(together), alone, rtol=1e-12)


def test_lanes_that_share_cores_take_as_long_as_these_are_busy_with_running_tasks_and_computing():
    rng = Random(4)
    for _ in range(10):
        spec = tiny_spec()
        none_stay = (0,) * spec.num_layers
        policy = replace(random_policy(rng, spec, ScheduleName.CGOPIPE), resident_experts=none_stay, experts_per_part=0)
        counts = [
            sum(1 for _ in iter_tasks(decode_pipeline(spec, policy, num_steps=steps), ScheduleName.CGOPIPE))
            for steps in (2, 3)
        ]
        running_s = float(counts[1] - counts[0])  # of a step, at a second each
        alone = random_machine(rng)
        a_task = Figure(value=1.0, source=Source.MEASURED)
        levels = tuple(replace(level, processor=replace(level.processor, cores=1)) for level in alone.levels)

        def costs_on(cores: int) -> Costs:
            profile = replace(alone, levels=levels, lane_threads=LaneThreads(cores=cores, task_s=a_task))  # noqa: B023
            return Costs(spec, profile, policy.formats)  # noqa: B023

        point = Point.of_policy(policy, spec)
        for cores in (1, 2):
            step = DecodeStep.of_point(costs_on(cores), point, policy.schedule).seconds(40)
            expected_s = (running_s + step.lanes[Lane.GPU] + step.lanes[Lane.CPU]) / cores
            assert step.shared_cores == (pytest.approx(expected_s, rel=1e-6),)
            assert step_seconds(costs_on(cores), policy, 40) >= (1 - 1e-6) * expected_s


def test_phases_take_no_less_on_shared_cores_and_their_work_at_least():
    rng, longer = Random(5), 0
    for _ in range(12):
        spec = tiny_spec()
        policy = random_policy(rng, spec, ScheduleName.CGOPIPE)
        machine = random_machine(rng)
        levels = tuple(replace(level, processor=replace(level.processor, cores=1)) for level in machine.levels)
        no_s = Figure(value=0.0, source=Source.ASSUMED)
        one, two = (
            Costs(spec, replace(machine, levels=levels, lane_threads=LaneThreads(cores=n, task_s=no_s)), policy.formats)
            for n in (1, 2)
        )
        assert one.shared_cores is not None
        assert two.shared_cores is None
        steps = [step_seconds(costs, policy, 40) for costs in (one, two)]
        prefills = [prefill_seconds(costs, policy, WORKLOAD) for costs in (one, two)]
        for together, apart in (steps, prefills):
            assert together >= apart * (1 - 1e-9)
            longer += together > apart * 1.001
        assert prefills[0] >= prefill_phase(one, policy, WORKLOAD).cores_s * (1 - 1e-9)
    assert longer > 5


def test_what_is_stored_holds_up_nothing_that_follows_in_its_layer():
    """States that go back to the host move beside the layer's experts: a bound that had them in a row was too low."""
    spec, profile = BUILT_IN_MODELS["qwen3-next"], compose("4xL4")
    policy = Policy(
        batch_size=1081,
        micro_batch_size=1081,
        attention=Device.GPU,
        resident_experts=spread_experts(spec, 11216),
        resident_dense=True,
        kv_tokens_per_micro_batch=230608,
        prefill_chunk_tokens=21544,
    )
    decode = estimate(spec, policy, profile, WORKLOADS["mtbench"]).decode
    assert decode.work.lane_s[Lane.D2H] > 0.4 * decode.seconds
    assert decode.work.in_order_s <= decode.seconds


def test_no_phase_is_quicker_than_its_lanes_though_long_ones_are_shortened():
    """Residents that lie unevenly in a model with a dense first layer, which is simulated in shortened forms."""
    spec, profile = BUILT_IN_MODELS["glm-4.7-flash"], compose("1xL40S")
    rng, checked = Random(11), 0
    for _ in range(12):
        prompt_len = rng.randint(50, 900)
        workload = Workload(name="short", prompt_len=prompt_len, max_prompt_len=prompt_len, gen_len=4)
        case = Case(spec, profile, workload)
        for policy in random_policies(rng, case, None, count=3):
            predicted = estimate(spec, policy, profile, case.workload)
            for phase in (predicted.prefill, predicted.decode):
                assert phase.seconds >= phase.bound_s * (1 - 1e-12)
                checked += 1
    assert checked > 40


@pytest.mark.parametrize("schedule", ScheduleName)
def test_no_job_is_faster_than_its_prospect(schedule):
    """By the closed form, before any task is simulated; where lanes contend for the host's memory it is closer."""
    ratios, of_bounds = list[float](), list[float]()
    for seed in range(40):
        rng = Random(500 + seed)
        spec = random_varied_spec(rng) if seed % 2 else random_spec(rng)
        prospect = Prospect(spec, random_policy(rng, spec, schedule), random_machine(rng), WORKLOAD)
        at_most = prospect.at_most_tokens_per_s
        predicted = prospect.above(0.0)
        assert predicted is not None
        assert predicted.tokens_per_s <= at_most * (1 + ROUNDING), seed
        assert prospect.at_most_tokens_per_s == pytest.approx(predicted.tokens_per_s), "all of it has been simulated"
        assert at_most <= predicted.bound_tokens_per_s * (1 + ROUNDING)
        if predicted.prefill.work.contends and predicted.decode.work.contends:
            ratios.append(at_most / predicted.tokens_per_s)
            of_bounds.append(predicted.bound_tokens_per_s / predicted.tokens_per_s)
    assert len(ratios) >= 5
    assert sum(ratios) < sum(of_bounds)


def test_a_policy_is_given_up_only_if_it_is_slower_than_asked():
    rng, given_up, slower = Random(17), 0, 0
    for _ in range(30):
        case = random_case(rng)
        space = Space(case.spec, case.profile, case.workload, dtype=case.dtype)
        if case.profile.num_gpus > 1:
            continue
        for policy in random_policies(rng, case, None, count=2):
            whole = space.predicted(policy)
            enough = whole.tokens_per_s * rng.choice([0.5, 0.999, 1.001, 1.1, 2.0])
            predicted = space.predicted_above(enough, policy)
            assert predicted is None or (predicted.prefill, predicted.decode) == (whole.prefill, whole.decode)
            assert predicted is not None or whole.tokens_per_s < enough
            given_up, slower = given_up + (predicted is None), slower + (whole.tokens_per_s < enough)
    assert 0.5 * slower < given_up


def test_a_little_more_of_a_rate_changes_little_where_links_share_the_hosts_memory():
    """Eight GPUs move hidden states both ways at once; about where that takes as long as what they compute."""
    spec, profile = BUILT_IN_MODELS["gemma-4-26b-a4b"], compose("8xH200")
    policy = Policy(
        batch_size=17663,
        micro_batch_size=17663,
        attention=Device.GPU,
        resident_experts=(16,) * spec.num_layers,
        resident_dense=False,
        gpu_kv_micro_batches=1,
        kv_tokens_per_micro_batch=kv_tokens_for(17663, 450, 546),
        prefill_chunk_tokens=8500,
        expert_division=ExpertDivision.WHOLE,
    )
    for resource in (Resource.GPU_FLOPS, Resource.H2D_BANDWIDTH, Resource.D2H_BANDWIDTH, Resource.CPU_BANDWIDTH):
        rates = [
            estimate(spec, policy, scale(profile, resource, 0.8 + 0.02 * i), WORKLOADS["mtbench"]).tokens_per_s
            for i in range(21)
        ]
        steps = np.diff(rates) / rates[:-1]
        # The quicker a link, the more of the memory it takes from the other.
        assert steps.min() > -1e-3, f"more of {resource}: {rates}"
        assert steps.max() < 0.03, f"more of {resource}: {rates}"
