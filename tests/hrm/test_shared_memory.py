"""The host's memory as a roof that links, staging and the CPU share."""

from dataclasses import replace
from random import Random

import pytest

from hrm.causes import Cause
from hrm.closed_form import DecodeStep, Point, whole_prefill
from hrm.costs import Costs
from hrm.estimate import estimate
from hrm.formats import Formats
from hrm.hardware import HardwareProfile
from hrm.lane_work import CHAIN
from hrm.phases import decode_work, prefill_work, simulate_work, step_seconds
from hrm.policy import Policy, ScheduleName, kv_tokens_for
from hrm.tasks import Device, Phase
from hrm.workload import Workload
from tests.hrm.support import machine, random_varied_spec, tiny_spec

WORKLOAD = Workload(name="test", prompt_len=40, max_prompt_len=100, gen_len=9)
LINK_KINDS = {
    "EMBED",
    "OFFLOAD_QKV",
    "LOAD_KV",
    "STORE_KV",
    "LOAD_HIDDEN",
    "OFFLOAD_TOKENS",
    "LOAD_EXPERT_OUTPUT",
    "LOAD_PAGE",
    "STORE_HIDDEN",
}


def a_policy(rng: Random, spec, **changes) -> Policy:
    micro_batch_size, n = rng.randint(1, 40), rng.randint(1, 7)
    policy = Policy(
        schedule=ScheduleName.CGOPIPE,
        batch_size=micro_batch_size * n,
        micro_batch_size=micro_batch_size,
        attention=rng.choice(list(Device)),
        ffn=rng.choice(list(Device)),
        resident_experts=(0,) * spec.num_layers,
        resident_dense=rng.random() < 0.5,
        kv_tokens_per_micro_batch=kv_tokens_for(micro_batch_size, 49, 109),
        prefill_chunk_tokens=10**6,
        staging=rng.random() < 0.5,
    )
    return replace(policy, **changes)


def accesses(work, profile: HardwareProfile) -> float:
    """Bytes read or written in the host's memory, task by task."""
    spec, m = work.costs.spec, work.tokens
    total = 0.0
    for span in simulate_work(work).spans:
        kind, num_bytes = span.id.act.name, work.num_bytes(span.id)
        if kind in LINK_KINDS:
            total += num_bytes * (2 if profile.accelerator == "emulated" else 1)
        elif kind == "STAGE_PAGE":
            total += 2 * num_bytes
        elif kind == "ATTENTION" and span.lane.value == "CPU":
            mixer = spec.layers[span.id.layer].mixer
            reached = min(work.context, mixer.window or 10**9)
            total += m * (reached * mixer.cached_elements * 2 + 2 * mixer.state_bytes(work.costs.formats))
        elif kind == "CPU_EXPERTS":
            total += spec.experts_hit(m) * spec.expert_parameters * 2
    return total


@pytest.mark.parametrize("accelerator", ["catalog", "emulated"])
def test_bytes_on_the_hosts_memory_are_those_of_the_tasks(accelerator):
    for seed in range(60):
        rng = Random(seed)
        spec = random_varied_spec(rng)
        profile = replace(machine(shared=1e9), accelerator=accelerator)
        policy, costs = a_policy(rng, spec), Costs(spec, profile, Formats.of("bfloat16"))
        point = Point.of_policy(policy, spec)
        work = decode_work(costs, policy, 45.0, num_steps=1)
        seconds = DecodeStep.of_point(costs, point, policy.schedule).seconds(45.0).host_memory_s
        assert seconds * 1e9 == pytest.approx(accesses(work, profile), rel=3e-3), seed
        work = prefill_work(costs, policy, WORKLOAD)
        seconds = whole_prefill(costs, point, WORKLOAD).host_memory_s
        assert work.pipeline.phase is Phase.PREFILL
        assert seconds * 1e9 == pytest.approx(accesses(work, profile), rel=3e-3), seed


def test_a_step_is_as_long_as_the_hosts_memory_needs_where_that_is_the_limit():
    spec = tiny_spec(num_layers=8)
    policy = a_policy(
        Random(4), spec, attention=Device.CPU, ffn=Device.GPU, staging=False, micro_batch_size=400, batch_size=2400
    )
    plentiful, scarce = machine(shared=1e15), machine(shared=2e8)
    steps = {}
    for name, profile in (("plentiful", plentiful), ("scarce", scarce)):
        costs = Costs(spec, profile, Formats.of("bfloat16"))
        step = DecodeStep.of_point(costs, Point.of_policy(policy, spec), policy.schedule)
        bound = step.seconds(45.0)
        steps[name] = step_seconds(costs, policy, 45.0), bound.lanes, bound.host_memory_s
    simulated_s, lanes, needed_s = steps["scarce"]
    assert needed_s > 2 * max(lanes.values())
    assert simulated_s == pytest.approx(needed_s, rel=0.05)
    simulated_s, lanes, needed_s = steps["plentiful"]
    assert simulated_s < 1.2 * max(lanes.values())
    assert estimate(spec, policy, scarce, WORKLOAD).limits.decode.cause is Cause.HOST_MEMORY
    assert estimate(spec, policy, plentiful, WORKLOAD).limits.decode.cause is not Cause.HOST_MEMORY


def test_the_chain_is_among_the_terms_where_bounds_look_for_it():
    spec = tiny_spec(num_layers=8)
    policy = a_policy(Random(4), spec, attention=Device.CPU, ffn=Device.GPU, staging=False)
    costs = Costs(spec, machine(shared=1e9), Formats.of("bfloat16"))
    seconds = DecodeStep.of_point(costs, Point.of_policy(policy, spec), policy.schedule).seconds(45.0)
    assert 0 < seconds.chain_s == seconds.terms[CHAIN] != seconds.host_memory_s


def test_scarcer_memory_never_helps_and_the_bound_holds():
    for seed in range(40):
        rng = Random(200 + seed)
        spec = random_varied_spec(rng)
        policy = a_policy(rng, spec)
        rates = []
        for shared in (1e7, 1e9, 1e12):
            predicted = estimate(spec, policy, machine(shared=shared), WORKLOAD)
            assert predicted.tokens_per_s <= predicted.bound_tokens_per_s * (1 + 1e-4), seed
            rates.append(predicted.tokens_per_s)
        assert rates == sorted(rates), seed
