"""More of a machine is never slower: what tasks take because of others settles with the time of their phase."""

from dataclasses import replace
from itertools import pairwise
from random import Random
from statistics import fmean

import pytest

from hrm.causes import Cause
from hrm.contention import ALONE, UNSHARED, Contention, Stretch
from hrm.costs import Costs
from hrm.estimate import estimate
from hrm.formats import Formats
from hrm.hardware import HardwareProfile, LaneThreads
from hrm.machines import compose
from hrm.model_spec import BUILT_IN_MODELS
from hrm.phases import decode_work, step_seconds
from hrm.policy import Policy, ScheduleName, kv_tokens_for
from hrm.scaling import Resource, at_cost, resources, with_resource
from hrm.schedules import iter_tasks
from hrm.shared_cores import Sequenced, times_of
from hrm.simulate import simulate
from hrm.tasks import Device, Lane
from hrm.units import GB
from hrm.workload import WORKLOADS
from tests.hrm.support import figure, random_spec, random_varied_spec, rate
from tests.hrm.test_estimate import WORKLOAD, random_machine, random_policy

ROUNDING = 1e-9
OF_SHARED_CORES = 0.01  # tasks that begin or end earlier on them may be in the way of more urgent ones


def a_machine(rng: Random) -> HardwareProfile:
    """A machine whose memory and CPU want more or less of one another."""
    made = random_machine(rng)
    read = made.host.read_bytes_per_s.at()
    host = replace(
        made.host,
        shared_bytes_per_s=rng.choice([None, rate(read * rng.uniform(1, 1.5))]),
        processor=replace(made.host.processor, attention_bytes_per_s=rate(read * rng.uniform(0.3, 1))),
    )
    return replace(made, levels=(made.top, host), accelerator=rng.choice(["catalog", "emulated"]))


def on_shared_cores(rng: Random, profile: HardwareProfile) -> HardwareProfile:
    levels = tuple(
        replace(level, processor=replace(level.processor, cores=cores))
        for level, cores in zip(profile.levels, (2, 1), strict=True)
    )
    threads = LaneThreads(cores=rng.choice([2, 3]), task_s=figure(10 ** rng.uniform(-7, -4)))
    return replace(profile, levels=levels, lane_threads=threads)


@pytest.mark.parametrize(("on_cores", "most"), [(False, ROUNDING), (True, OF_SHARED_CORES)])
def test_a_policy_is_never_slower_on_a_machine_with_more_of_anything(on_cores, most):
    contending = 0
    for seed in range(10 if on_cores else 70):
        rng = Random(seed)
        spec = random_varied_spec(rng) if seed % 2 else random_spec(rng)
        policy, profile = random_policy(rng, spec, rng.choice(list(ScheduleName))), a_machine(rng)
        if on_cores:
            profile = on_shared_cores(rng, profile)
        now = estimate(spec, policy, profile, WORKLOAD)
        contending += now.prefill.work.contends or now.decode.work.contends
        for resource in resources(profile):
            if resource.is_memory:
                continue
            more = estimate(spec, policy, at_cost(profile, resource, 1 / rng.uniform(1, 4)), WORKLOAD)
            assert more.tokens_per_s >= now.tokens_per_s * (1 - most), (seed, resource)
            assert more.bound_tokens_per_s >= now.bound_tokens_per_s * (1 - ROUNDING), (seed, resource)
        if not on_cores:
            limits = now.limits
            for limit, phase in ((limits.prefill, now.prefill), (limits.decode, now.decode)):
                assert min(limit.saved_s.values()) >= -ROUNDING * phase.seconds, seed
    assert contending > 0


def experts_of_one_request() -> tuple[Policy, HardwareProfile]:
    """Projections that stream to a GPU while the CPU reads experts: both want nearly all of the host's memory."""
    profile = compose("1xRTX-4090", host="generic-workstation")
    host = replace(profile.host, processor=replace(profile.host.processor, fuses_operators=True))
    spec, workload = BUILT_IN_MODELS["qwen3-30b-a3b"], WORKLOADS["mtbench"]
    policy = Policy(
        batch_size=1,
        micro_batch_size=1,
        attention=Device.GPU,
        ffn=Device.CPU,
        prefill_ffn=Device.GPU,
        resident_experts=(49,) * spec.num_layers,
        resident_dense=False,
        gpu_kv_micro_batches=1,
        kv_tokens_per_micro_batch=kv_tokens_for(1, workload.mean_context_len, workload.max_context_len),
        prefill_chunk_tokens=418,
    )
    return policy, replace(profile, levels=(profile.top, host))


def test_a_faster_link_never_makes_experts_on_the_cpu_slower():
    policy, profile = experts_of_one_request()
    spec, workload = BUILT_IN_MODELS["qwen3-30b-a3b"], replace(WORKLOADS["mtbench"], num_requests=1)
    found = []
    for rate_of_link in (20, 26, 30, 35, 40, 52, 58, 65, 100):
        faster = with_resource(profile, Resource.H2D_BANDWIDTH, rate_of_link * GB)
        predicted = estimate(spec, policy, faster, workload)
        found.append(predicted.tokens_per_s)
        if rate_of_link >= 26:  # both together then want more than the memory has, whichever of them takes longer
            assert predicted.limits.decode.cause in {Cause.HOST_MEMORY, Cause.CPU_MEMORY}, rate_of_link
    steps = [late / early for early, late in pairwise(found)]
    assert all(1 - ROUNDING <= step < 1.1 for step in steps), found


def test_what_takes_turns_at_the_memory_takes_what_fluids_would():
    """Held to a simulation in which each moment's tasks share the memory in proportion to what they would access."""
    rows = []
    for seed in range(200):
        rng = Random(seed)
        spec = random_varied_spec(rng)
        policy, profile = random_policy(rng, spec, ScheduleName.CGOPIPE), a_machine(rng)
        costs = Costs(spec, profile, Formats.of("bfloat16"))
        work = decode_work(costs, policy, 45.0, num_steps=4, stretch=ALONE)
        alone_of = work.alone()
        alone_s = last_step_s(work, lambda task, of=alone_of: of(task).alone_s)
        fluid_s = fluid_step_s(work)
        if fluid_s > 1.05 * alone_s:
            bound_s = estimate(spec, policy, profile, replace(WORKLOAD, gen_len=2)).decode.bound_s
            rows.append((max(step_seconds(costs, policy, 45.0), bound_s) / fluid_s, alone_s / fluid_s))
    assert len(rows) > 20
    off, without = (fmean(abs(row[which] - 1) for row in rows) for which in (0, 1))
    assert off < 0.15
    assert off < without / 2


def last_step_s(work, seconds_of) -> float:
    spans = simulate(iter_tasks(work.pipeline, work.policy.schedule), seconds_of).spans
    ends = [max(span.end_s for span in spans if span.id.step == step) for step in (2, 3)]
    return ends[1] - ends[0]


def fluid_step_s(work) -> float:
    tasks = list(iter_tasks(work.pipeline, work.policy.schedule))
    numbers, lanes, alone_of = {task.id: i for i, task in enumerate(tasks)}, list(Lane), work.alone()
    sequenced = []
    for task in tasks:
        alone_s, at_memory_s = alone_of(task.id)
        others = [numbers[other] for other in task.after if other.act.lane is not task.lane]
        wanted = at_memory_s / alone_s if alone_s else 0.0
        sequenced.append(Sequenced(lanes.index(task.lane), others, alone_s, wanted))
    _, ends_s = times_of(sequenced, 1.0)
    ends = [max(end_s for task, end_s in zip(tasks, ends_s, strict=True) if task.id.step == step) for step in (2, 3)]
    return ends[1] - ends[0]


def test_a_stretch_settles_where_a_phase_takes_as_long_as_it_is_stretched_for():
    for seed in range(300):
        rng = Random(seed)
        lines = [(rng.uniform(0, 3), rng.uniform(0, 2)) for _ in range(rng.randint(1, 5))]
        shared_s = rng.choice([(0.9, 0.0), (0.0, 0.7), (0.5, 0.6), (1e-9, 0.0)])
        contention = Contention(*shared_s, least_s=1.0)

        def seconds_of(stretch: Stretch, lines=lines) -> float:
            return max(apart + slope * stretch.at_memory * stretch.on_cores for apart, slope in lines)

        low, high = 1.0, 100.0
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if max(seconds_of(contention.stretch(middle)), 1.0) > middle else (low, middle)
        calls = []
        stretch, found_s = contention.settled(
            lambda stretch, calls=calls, of=seconds_of: calls.append(1) or of(stretch), rng.uniform(0.1, 20)
        )
        assert max(found_s, 1.0) == pytest.approx(low, rel=1e-9), seed
        assert stretch.at_memory == pytest.approx(contention.stretch(low).at_memory, rel=1e-6), seed
        assert len(calls) <= 25, seed


def test_what_is_not_shared_is_worked_out_once():
    calls = []
    _, found_s = UNSHARED.settled(lambda _: calls.append(1) or 3.0, 1.0)
    assert (found_s, calls) == (3.0, [1])


def test_a_lane_that_is_next_to_nothing_beside_the_memory_is_stretched_and_no_more():
    """What the memory takes for it rounds to what is contended."""
    assert 1e9 < Contention(contended_s=1.0, least_s=1.0).stretch(1.0).at_memory < float("inf")
