"""What an implementation adds to its schedule: other links, more passes over the cache, waits."""

from dataclasses import replace

import pytest

from hrm.closed_form import DecodeStep, Point, whole_prefill
from hrm.costs import Costs, Runtime
from hrm.errors import ProfileError
from hrm.estimate import estimate
from hrm.formats import FORMATS, Formats
from hrm.policy import Policy, ScheduleName, kv_tokens_for
from hrm.tasks import Device, Lane
from hrm.workload import Workload
from tests.hrm.support import machine, tiny_spec

SPEC = tiny_spec()
PINNED, PAGEABLE = 1e9, 0.25e9
WORKLOAD = Workload(name="test", prompt_len=48, max_prompt_len=48, gen_len=5)
PAIR = 3


def with_pageable_link():
    profile = machine(link=PINNED)
    link = replace(profile.h2d, kind="pageable", bandwidth_bytes_per_s=machine(link=PAGEABLE).h2d.bandwidth_bytes_per_s)
    return replace(profile, links=(*profile.links, link))


def policy(attention: Device) -> Policy:
    return Policy(
        schedule=ScheduleName.FLEXGEN,
        batch_size=8 * PAIR,
        micro_batch_size=8,
        attention=attention,
        resident_experts=(0,) * SPEC.num_layers,
        resident_dense=False,
        kv_tokens_per_micro_batch=kv_tokens_for(8, 53, 53),
        prefill_chunk_tokens=8 * 48,
    )


def decode_lanes(runtime: Runtime, attention: Device) -> dict[Lane, float]:
    costs = Costs(SPEC, with_pageable_link(), Formats.of("bfloat16"), runtime)
    plan = policy(attention)
    step = DecodeStep.of_point(costs, Point.of_policy(plan, SPEC), plan.schedule)
    return {lane: float(seconds) for lane, seconds in step.seconds(50).lanes.items()}


def test_weights_and_cache_cross_the_links_that_the_runtime_names():
    weights = SPEC.total_layer_bytes(FORMATS["bfloat16"])
    cache = SPEC.num_layers * PAIR * SPEC.attention.cache_bytes(Formats.of("bfloat16"), 8, 8 * 50)
    pinned = decode_lanes(Runtime(), Device.GPU)[Lane.H2D]
    slow_weights = decode_lanes(Runtime(weights_link="pageable"), Device.GPU)[Lane.H2D]
    slow_cache = decode_lanes(Runtime(kv_link="pageable"), Device.GPU)[Lane.H2D]
    more_a_byte = 1 / PAGEABLE - 1 / PINNED
    assert slow_weights - pinned == pytest.approx(weights * more_a_byte)
    assert slow_cache - pinned == pytest.approx(cache * more_a_byte)


def test_prefill_loads_its_weights_over_the_same_link():
    point = Point.of_policy(policy(Device.GPU), SPEC)
    formats = Formats.of("bfloat16")
    pinned, pageable = (
        whole_prefill(Costs(SPEC, with_pageable_link(), formats, runtime), point, WORKLOAD).lanes[Lane.H2D]
        for runtime in (Runtime(), Runtime(weights_link="pageable"))
    )
    weights = SPEC.total_layer_bytes(FORMATS["bfloat16"])
    assert pageable - pinned == pytest.approx(weights * (1 / PAGEABLE - 1 / PINNED))


@pytest.mark.parametrize(
    ("runtime", "attention"),
    [
        (Runtime(weights_link="pageable"), Device.GPU),
        (Runtime(kv_link="pageable"), Device.GPU),
        (Runtime(attention_passes=21), Device.CPU),
        (Runtime(synchronise_s=1e-3), Device.GPU),
    ],
)
def test_decode_takes_longer(runtime, attention):
    profile, plan = with_pageable_link(), policy(attention)
    plain = estimate(SPEC, plan, profile, WORKLOAD)
    slower = estimate(SPEC, plan, profile, WORKLOAD, runtime=runtime)
    assert slower.decode.seconds > plain.decode.seconds
    assert slower.decode.bound_s >= plain.decode.bound_s
    assert slower.tokens_per_s <= slower.bound_tokens_per_s * (1 + 1e-4)


def test_more_passes_move_more_bytes_on_the_cpu_only():
    many = Runtime(attention_passes=21)
    on_cpu, on_gpu = (
        [decode_lanes(runtime, device) for runtime in (Runtime(), many)] for device in (Device.CPU, Device.GPU)
    )
    assert on_gpu[0] == on_gpu[1]
    kernel = SPEC.attention.attend(Formats.of("bfloat16"), 8, 50).kernels[0]
    read = with_pageable_link().host.attention_bytes_per_s
    extra = SPEC.num_layers * PAIR * 20 * kernel.num_bytes / read
    assert on_cpu[1][Lane.CPU] - on_cpu[0][Lane.CPU] == pytest.approx(extra)


@pytest.mark.parametrize("prompt_len", [3, 4, 48, 768])
def test_the_last_layer_of_prefill_goes_on_with_the_ends_of_prompts(prompt_len):
    """In chunks of 384 tokens on a machine whose GPU only multiplies: FLOPs of what is skipped."""
    flops, batch = 1e9, 8 * PAIR
    workload = Workload(name="test", prompt_len=prompt_len, max_prompt_len=prompt_len, gen_len=5)
    plan = replace(policy(Device.CPU), prefix_buffer_tokens=prompt_len)
    profile = machine(gpu_flops=flops, gpu_read=1e18)

    def gpu_s(runtime):
        costs = Costs(SPEC, profile, Formats.of("bfloat16"), runtime)
        lanes = whole_prefill(costs, Point.of_policy(plan, SPEC), workload).lanes
        return lanes[Lane.GPU]

    a_token = 2 * (
        SPEC.query_size * SPEC.hidden_size
        + SPEC.hidden_size * SPEC.num_experts
        + SPEC.experts_per_token * SPEC.expert_parameters
    )
    skipped = batch * (prompt_len - 1) if prompt_len > 3 else 0
    whole_s = gpu_s(Runtime(whole_last_layer=True))
    assert whole_s - gpu_s(Runtime()) == pytest.approx(skipped * a_token / flops, rel=1e-9)
    profile = replace(profile, num_stages=2)  # of which one has the model's last layer
    assert gpu_s(Runtime()) == whole_s


def test_a_link_that_the_machine_lacks_is_a_mistake():
    with pytest.raises(ProfileError, match="no pageable link cpu->gpu"):
        estimate(SPEC, policy(Device.GPU), machine(), WORKLOAD, runtime=Runtime(kv_link="pageable"))
