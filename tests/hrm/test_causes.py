"""What limits a plan: causes against predictions at half their cost, and against sums by hand."""

import json
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from hrm.analysis import what_if
from hrm.causes import Cause, spent_of
from hrm.cli import main
from hrm.contract import launches
from hrm.costs import Runtime
from hrm.estimate import Estimate, estimate
from hrm.formats import Formats
from hrm.hardware import Figure, HardwareProfile, LaneThreads, Source
from hrm.launches import launches_of
from hrm.machines import compose
from hrm.model_spec import BUILT_IN_MODELS, ModelSpec
from hrm.policy import Policy, ScheduleName, kv_tokens_for, spread_experts
from hrm.scaling import Resource, at_cost, resource_value, resources, with_resource
from hrm.search import Space, search
from hrm.tasks import Device, Lane
from hrm.workload import WORKLOADS, Workload
from tests.contracts.selection import chosen
from tests.hrm.support import machine, random_varied_spec, tiny_spec
from tests.hrm.test_estimate import random_machine, random_policy

pytestmark = pytest.mark.usefixtures("rough_bounds", "searches_kept")

WORKLOAD = Workload(name="test", prompt_len=40, max_prompt_len=100, gen_len=9)
TIES = 0.02  # of a job's time
# What less of each cause is more of: the host's memory bandwidth goes by several names.
RESOURCE_OF = {
    Cause.GPU_COMPUTE: Resource.GPU_FLOPS,
    Cause.GPU_MEMORY: Resource.GPU_BANDWIDTH,
    Cause.GPU_LAUNCHES: Resource.GPU_LAUNCH_LATENCY,
    Cause.CPU_COMPUTE: Resource.CPU_FLOPS,
    Cause.CPU_MEMORY: Resource.CPU_BANDWIDTH,
    Cause.STAGING: Resource.CPU_BANDWIDTH,
    Cause.HOST_MEMORY: Resource.CPU_BANDWIDTH,
    Cause.CPU_LAUNCHES: Resource.CPU_LAUNCH_LATENCY,
    Cause.H2D_LINK: Resource.H2D_BANDWIDTH,
    Cause.D2H_LINK: Resource.D2H_BANDWIDTH,
    Cause.LINK_LATENCY: Resource.LINK_LATENCY,
    Cause.PEER_LINK: Resource.PEER_BANDWIDTH,
    Cause.PEER_LATENCY: Resource.PEER_LATENCY,
}


def any_machine(rng: Random) -> HardwareProfile:
    """Rates and latencies from far apart, so that everything limits somewhere."""
    profile = random_machine(rng)
    for resource, low, high in (
        (Resource.GPU_LAUNCH_LATENCY, -8, -4),
        (Resource.CPU_LAUNCH_LATENCY, -8, -5),
        (Resource.LINK_LATENCY, -7, -4),
    ):
        profile = with_resource(profile, resource, 10 ** rng.uniform(low, high))
    return profile


def time_resources(profile: HardwareProfile) -> list[Resource]:
    return [resource for resource in resources(profile) if not resource.is_memory]


def test_what_is_named_saves_most_at_half_its_cost():
    """Over machines, models and policies at random; `hrm whatif` asks the same."""
    named = set[Cause]()
    for seed in range(45):
        rng = Random(seed)
        spec = random_varied_spec(rng)
        policy = random_policy(rng, spec, ScheduleName.CGOPIPE)
        profile = any_machine(rng)
        workload = replace(WORKLOAD, num_requests=rng.choice([None, 17, 300]))
        predicted = estimate(spec, policy, profile, workload)
        limit = predicted.limits.job
        saved = {
            resource: 1 - estimate(spec, policy, at_cost(profile, resource, 0.5), workload).seconds / predicted.seconds
            for resource in time_resources(profile)
        }
        resource = RESOURCE_OF.get(limit.cause)
        if resource is None:
            assert limit.cause is Cause.WAITING
            saved_by_it = limit.waiting_s / 2 / predicted.seconds
        else:
            saved_by_it = saved[resource]
        assert saved_by_it >= max(saved.values()) - TIES, (seed, limit.cause, saved)
        named.add(limit.cause)
    assert named >= {
        Cause.GPU_COMPUTE,
        Cause.GPU_MEMORY,
        Cause.GPU_LAUNCHES,
        Cause.CPU_COMPUTE,
        Cause.H2D_LINK,
        Cause.D2H_LINK,
        Cause.HOST_MEMORY,
    }


@pytest.mark.parametrize("schedule", ScheduleName)
def test_seconds_by_cause_add_up_to_those_of_the_lane(schedule):
    for seed in range(12):
        rng = Random(seed)
        spec = random_varied_spec(rng)
        policy, profile = random_policy(rng, spec, schedule), any_machine(rng)
        predicted = estimate(spec, policy, profile, WORKLOAD)
        spent = spent_of(predicted.costs, predicted.turns, WORKLOAD)
        for phase, of_phase in zip((predicted.prefill, predicted.decode), spent, strict=True):
            for name, seconds in phase.work.busy_s.items():
                assert sum(of_phase.get(name, {}).values()) == pytest.approx(seconds, rel=1e-3)


# One cause costs, everything else next to nothing: (machine, policy) by the cause it must be.
NOTHING: dict[str, Any] = {"gpu_flops": 1e17, "cpu_flops": 1e17, "gpu_read": 1e17, "cpu_read": 1e17, "link": 1e17}
ONLY = {
    Cause.GPU_COMPUTE: ({"gpu_flops": 1e9}, {}),
    Cause.GPU_MEMORY: ({"gpu_read": 1e8}, {}),
    Cause.GPU_LAUNCHES: ({"launch_s": 1e-3}, {}),
    Cause.CPU_COMPUTE: ({"cpu_flops": 1e7}, {"ffn": Device.CPU}),
    Cause.CPU_MEMORY: ({"cpu_read": 1e7}, {"ffn": Device.CPU}),
    Cause.H2D_LINK: ({"link": 1e6}, {}),
    Cause.LINK_LATENCY: ({"latency_s": 1e-3}, {}),
    Cause.STAGING: ({"cpu_read": 1e6, "shared": 1e17}, {"staging": True}),
    Cause.HOST_MEMORY: ({"shared": 1e6}, {}),
    Cause.PEER_LINK: ({"num_gpus": 2, "peer": 1e5}, {}),
}


@pytest.mark.parametrize("cause", ONLY)
def test_the_only_thing_that_costs_is_the_limit_of_decode(cause):
    rates, fields = ONLY[cause]
    spec = tiny_spec()
    policy = Policy(
        batch_size=40,
        micro_batch_size=20,
        resident_experts=(0,) * 4,
        gpu_kv_micro_batches=2,
        kv_tokens_per_micro_batch=kv_tokens_for(20, 49, 109),
        prefill_chunk_tokens=2000,
        **fields,
    )
    predicted = estimate(spec, policy, machine(**(NOTHING | {"peer": 1e17} | rates)), WORKLOAD)
    assert predicted.limits.decode.cause is cause


def test_the_latency_between_gpus_is_a_cause_of_its_own():
    profile = replace(machine(num_gpus=4, peer=1e17), levels=machine(**NOTHING).levels)
    profile = with_resource(profile, Resource.PEER_LATENCY, 1e-3)
    policy = random_policy(Random(1), tiny_spec(), ScheduleName.CGOPIPE)
    limits = estimate(tiny_spec(), policy, profile, WORKLOAD).limits
    assert {limits.prefill.cause, limits.decode.cause} == {Cause.PEER_LATENCY}


def test_waits_of_a_runtime_are_a_cause_of_their_own():
    policy = random_policy(Random(1), tiny_spec(), ScheduleName.CGOPIPE)
    runtime = Runtime(synchronise_s=1.0)
    limits = estimate(tiny_spec(), policy, machine(), WORKLOAD, runtime=runtime).limits
    assert limits.job.cause is Cause.SYNCHRONISING


def test_running_tasks_is_a_cause_of_its_own():
    policy = random_policy(Random(1), tiny_spec(), ScheduleName.CGOPIPE)
    a_task = Figure(value=1.0, source=Source.MEASURED)
    profile = replace(machine(), lane_threads=LaneThreads(cores=4, task_s=a_task))
    limits = estimate(tiny_spec(), policy, profile, WORKLOAD).limits
    assert limits.job.cause is Cause.RUNNING_TASKS


def test_tasks_in_turn_are_named_as_waiting():
    """One micro-batch whose step is equal parts of GPU, CPU and both links, one after the other."""
    spec = tiny_spec(num_layers=8)
    policy = Policy(
        batch_size=100,
        micro_batch_size=100,
        resident_experts=(4,) * 8,
        attention=Device.CPU,
        kv_tokens_per_micro_batch=kv_tokens_for(100, 49, 109),
        prefill_chunk_tokens=4000,
    )
    profile = machine(**NOTHING)
    for resource, lane in (
        (Resource.GPU_FLOPS, Lane.GPU),
        (Resource.CPU_BANDWIDTH, Lane.CPU),
        (Resource.H2D_BANDWIDTH, Lane.H2D),
        (Resource.D2H_BANDWIDTH, Lane.D2H),
    ):
        lanes = estimate(spec, policy, profile, WORKLOAD).decode.lane_s
        value = resource_value(profile, resource) * lanes[lane]
        profile = with_resource(profile, resource, value)
    decode = estimate(spec, policy, profile, WORKLOAD).decode
    assert decode.seconds > 3 * decode.bound_s
    assert estimate(spec, policy, profile, WORKLOAD).limits.decode.cause is Cause.WAITING


def test_a_phase_without_work_is_limited_by_nothing():
    policy = random_policy(Random(1), tiny_spec(), ScheduleName.CGOPIPE)
    once = estimate(tiny_spec(), policy, machine(), replace(WORKLOAD, gen_len=1))
    assert once.limits.decode.cause is Cause.NOTHING
    assert once.limits.job.cause is once.limits.prefill.cause


# ----------------------------------------------------------------------------------- what-if


@pytest.mark.usefixtures("coarse_searches")
@pytest.mark.parametrize(
    ("model", "gpus", "workload"),
    chosen(
        [
            (
                "qwen3-30b-a3b",
                "1xMI300X",
                Workload(name="one", prompt_len=512, max_prompt_len=512, gen_len=256, num_requests=1),
            ),
            ("olmoe-1b-7b", "1xT4", replace(WORKLOADS["summarization"], num_requests=40)),
        ],
        at=(0,),
    ),
)
def test_what_if_and_report_name_the_same(model, gpus, workload):
    spec, profile = BUILT_IN_MODELS[model], compose(gpus)
    dtype = profile.default_dtype
    limit = search(Space(spec, profile, workload, dtype=dtype)).require().limits.job
    frame = what_if(Space(spec, profile, workload, dtype=dtype), factor=2)
    kept = dict(zip(frame["resource"], frame["same_policy_change"], strict=True))
    named = RESOURCE_OF.get(limit.cause)
    assert named is not None
    assert kept[named.value] >= max(kept.values()) - TIES


def test_less_of_a_latency_and_of_waiting_are_rows_of_what_if():
    spec = tiny_spec()
    profile = machine(launch_s=1e-4, latency_s=1e-4, gpu_bytes=1e8, cpu_bytes=1e9)
    workload = replace(WORKLOAD, num_requests=10)
    space = Space(spec, profile, workload, attention=Device.GPU, ffn=Device.GPU)
    frame = what_if(space, factor=2).set_index("resource")
    for resource in resources(profile):
        assert frame.loc[resource.value, "factor"] == (0.5 if resource.is_latency else 2)
    today = search(space).require()
    less = today.seconds - today.limits.job.waiting_s / 2
    change = frame.loc[Cause.WAITING.value, "change"]
    assert change == pytest.approx(today.seconds / less - 1)
    kept = dict(zip(frame.index, frame["same_policy_change"], strict=True))
    assert kept["gpu-launch-latency"] > 0


# ---------------------------------------------------------------------------------- launches


def by_hand(spec: ModelSpec, micro_batches: int, m: float, steps: int, *, fused: bool) -> float:
    """Launches on the GPU of a decode with everything there, from the constants of operators."""
    hit = float(spec.experts_hit(m))
    experts = 1 if fused else launches.ROUTING_LAUNCHES + hit * launches.LAUNCHES_PER_EXPERT
    before = launches.FUSED_PRE_ATTENTION_LAUNCHES if fused else launches.PRE_ATTENTION_LAUNCHES
    after = launches.FUSED_POST_ATTENTION_LAUNCHES if fused else launches.POST_ATTENTION_LAUNCHES
    layer = before + launches.ATTENTION_LAUNCHES_PER_TASK + after + experts
    return steps * micro_batches * (spec.num_layers * layer + launches.SAMPLE_LAUNCHES)


def on_gpu(spec: ModelSpec, profile: HardwareProfile, workload: Workload) -> Estimate:
    policy = Policy(
        batch_size=8,
        micro_batch_size=4,
        attention=Device.GPU,
        gpu_kv_micro_batches=2,
        resident_experts=spread_experts(spec, spec.num_expert_layers * spec.num_experts),
        kv_tokens_per_micro_batch=kv_tokens_for(4, 49, 109),
        prefill_chunk_tokens=400,
    )
    return estimate(spec, policy, profile, workload)


def test_launches_are_counted_and_told_for_engines_with_fused_kernels():
    spec, profile = tiny_spec(), machine(launch_s=1e-3)
    workload = replace(WORKLOAD, num_requests=8)
    (launches,) = launches_of(on_gpu(spec, profile, workload))
    prefill_only = replace(workload, gen_len=1)
    (first,) = launches_of(on_gpu(spec, profile, prefill_only))
    steps = workload.decode_steps
    assert launches.count - first.count == pytest.approx(by_hand(spec, 2, 4, steps, fused=False))
    assert launches.fused_count is not None
    assert first.fused_count is not None
    fused = launches.fused_count - first.fused_count
    assert fused == pytest.approx(by_hand(spec, 2, 4, steps, fused=True))
    assert launches.share == pytest.approx(1, abs=0.02)
    # All time is that of launches: throughput grows as they become fewer.
    now = on_gpu(spec, profile, workload).tokens_per_s
    assert launches.fused_tokens_per_s == pytest.approx(now * launches.count / launches.fused_count, rel=0.02)
    assert launches.free_tokens_per_s > 100 * now


def test_fused_kernels_are_not_told_where_the_profile_has_them():
    profile = machine(launch_s=1e-3)
    top = replace(profile.top, processor=replace(profile.top.processor, fuses_operators=True))
    (launches,) = launches_of(on_gpu(tiny_spec(), replace(profile, levels=(top, profile.host)), WORKLOAD))
    assert launches.fused_count is launches.fused_tokens_per_s is None


def test_a_plan_that_launches_do_not_limit_says_nothing_of_them():
    assert launches_of(on_gpu(tiny_spec(), machine(gpu_flops=1e9), WORKLOAD)) == []


def test_launches_cost_as_much_fused_only_where_kernels_are():
    spec = tiny_spec()
    kind = spec.layers[0]
    for fused in (False, True):
        operator = kind.after_attention(Formats.of("bfloat16"), 4, spec.num_experts)
        profile = machine(launch_s=1.0, gpu_flops=1e17, gpu_read=1e17)
        seconds = replace(on_gpu(spec, profile, WORKLOAD).costs, runtime=Runtime(fused_kernels=fused)).post_attention(
            4, spec.num_experts, kind
        )
        unfused = 0 if fused else operator.unfused_launches
        assert seconds == pytest.approx(operator.launches + unfused)


# ------------------------------------------------------------------------------ command lines


def test_the_report_tells_launches_of_this_executor_from_those_of_others(capsys):
    arguments = [
        "search",
        "--model",
        "qwen3-30b-a3b",
        "--gpus",
        "1xMI300X",
        "--requests",
        "1",
        "--prompt-len",
        "512",
        "--gen-len",
        "256",
        "--ffn",
        "gpu",
    ]
    for extra in ([], ["--json"]):
        main([*arguments, *extra])
        out = capsys.readouterr().out
        if not extra:
            assert out.count("limited by the launches of GPU kernels") == 2
            assert "GPU kernels at 5.00 µs each (assumed), 97% of the time" in out
            assert "tokens/s with fused kernels" in out
            continue
        predicted = json.loads(out)["predicted"]
        assert predicted["bottleneck"] == {"prefill": "GPU launches", "decode": "GPU launches"}
        spent = predicted["limits"]["decode"]["spent_s"]["GPU"]
        assert spent["GPU launches"] > 0.9 * predicted["lane_s"]["decode"]["GPU"]
        told = predicted["launches"]["GPU launches"]
        assert told["source"] == "assumed"
        assert (
            predicted["tokens_per_s"]
            < told["fused_kernels"]["tokens_per_s"]
            < told["without_launch_costs"]["tokens_per_s"]
        )


def test_every_cause_has_words_of_its_own():
    assert len({cause.phrase for cause in Cause}) == len(Cause)
    assert set(time_resources(machine(num_gpus=2))) <= set(RESOURCE_OF.values())
