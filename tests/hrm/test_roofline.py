"""Roofs by hand, and turning points that solve the equations that define them."""

from dataclasses import replace
from random import Random

import pytest

from hrm import operators
from hrm.contract import launches
from hrm.costs import Costs
from hrm.formats import Formats
from hrm.layers import Kernel, Operator, linear
from hrm.machines import compose
from hrm.model_spec import BUILT_IN_MODELS, load_model
from hrm.roofline import (
    attainable_flops_per_s,
    attention_turning_points,
    ffn_turning_points,
    kernel_seconds,
    operator_seconds,
    turning_points,
)
from hrm.tasks import Device
from tests.hrm.support import machine, tiny_spec

MIXTRAL = BUILT_IN_MODELS["mixtral-8x7b"]


def test_turning_points_solve_their_equations_on_random_machines():
    left = 0
    for seed in range(200):
        rng = Random(seed)
        p_i, p_j = 10 ** rng.uniform(12, 15), 10 ** rng.uniform(9, 12)
        b_i, b_j = 10 ** rng.uniform(11, 13), 10 ** rng.uniform(9, 11)
        b_ji = 10 ** rng.uniform(8, 11)
        flops, host, gpu = (10 ** rng.uniform(6, 12) for _ in range(3))
        profile = machine(gpu_flops=p_i, cpu_flops=p_j, gpu_read=b_i, cpu_read=b_j, link=b_ji)
        points = turning_points(profile, "bfloat16", flops=flops, host_bytes=host, gpu_bytes=gpu, rows=None)
        i_i, i_j = flops / gpu, flops / host
        assert (points.intensity, points.gpu_intensity) == (i_j, i_i)
        # At P1 the link gives as much as the host computes; at P2, as the GPU does (eqs. 9, 10).
        assert b_ji * points.p1 == pytest.approx(min(p_j, b_j * i_j))
        assert b_ji * points.p2 == pytest.approx(min(p_i, b_i * i_i))
        assert b_ji * points.balance == pytest.approx(b_i * i_i)
        # So left of P1 the host attains more than the GPU that fetches the data could.
        on_host = attainable_flops_per_s(compute=p_j, bandwidth=b_j, intensity=i_j)
        fetched = min(attainable_flops_per_s(compute=p_i, bandwidth=b_i, intensity=i_i), b_ji * i_j)
        if i_j < points.p1:
            assert on_host > fetched
            assert points.verdict.startswith("left of P1")
            left += 1
        elif i_j < points.p2:
            assert fetched == b_ji * i_j
            assert "limited by the link" in points.verdict
        else:
            assert fetched == min(p_i, b_i * i_i)
            assert points.verdict.startswith("right of P2")
    assert 20 < left < 180


def test_attention_of_mixtral_on_an_l4_lies_left_of_p1():
    """MoE-Lightning's Fig. 4: so it is faster on the CPU."""
    points = attention_turning_points(compose("1xL4"), MIXTRAL, Formats.of("float16"), context=512)
    # Four query heads share a KV head: 4·32·128 FLOPs a token over 2·2·8·128 bytes.
    assert points.intensity == points.gpu_intensity == 4.0
    assert points.intensity < points.p1 < points.p2


def test_the_ffn_of_mixtral_on_an_l4_turns_with_the_batch_size():
    """Fig. 5, micro-batches of 128: small batches are limited by the link, 16k are not."""
    points = [
        ffn_turning_points(compose("1xL4"), MIXTRAL, Formats.of("float16"), batch_size=b, micro_batch_size=128)
        for b in (128, 1024, 16384)
    ]
    # 2 experts of 8 for each token, 2 FLOPs a parameter of 2 bytes: batch / 4.
    assert [p.intensity for p in points] == pytest.approx([32, 256, 4096], rel=1e-6)
    assert points[0].intensity < points[0].p2
    assert points[-1].intensity > points[-1].p2
    assert len({round(p.p2, 6) for p in points}) == 1, "μ alone decides where the roof turns"


@pytest.mark.parametrize(("flops", "num_bytes", "seconds"), [(6e9, 1e6, 6e-3), (1e6, 3e9, 1e-2), (0, 0, 0)])
def test_a_kernel_takes_the_longer_of_its_two_roofs(flops, num_bytes, seconds):
    gpu = machine(gpu_flops=1e12, gpu_read=300e9).top
    assert kernel_seconds(Kernel(flops, num_bytes, 8), gpu, "bfloat16") == pytest.approx(seconds)


def test_kernels_run_one_after_the_other_and_every_launch_costs():
    gpu = machine(gpu_flops=1e12, gpu_read=300e9, launch_s=1e-3).top
    operator = Operator((Kernel(6e9, 1, 8), Kernel(1, 3e9, 8)), launches=5)
    assert operator_seconds(operator, gpu, "bfloat16") == pytest.approx(5e-3 + 6e-3 + 1e-2)


def test_fused_experts_cost_one_launch():
    level = machine(launch_s=1e-3).host
    grouped = replace(level, processor=replace(level.processor, fuses_operators=True))
    operator = MIXTRAL.experts.run(Formats.of("bfloat16"), 1, MIXTRAL.num_experts)
    loop_s = operator_seconds(operator, level, "bfloat16")
    one_s = operator_seconds(operator, grouped, "bfloat16")
    hit = MIXTRAL.experts_hit(1)
    one_by_one = launches.ROUTING_LAUNCHES + hit * launches.LAUNCHES_PER_EXPERT
    assert loop_s - one_s == pytest.approx((one_by_one - 1) * 1e-3)


@pytest.mark.parametrize(("formats", "groups"), [(Formats.of("bfloat16"), True), (Formats.of("float16"), False)])
def test_a_gpu_that_groups_experts_issues_as_much_for_many_as_for_few(formats, groups):
    level = machine(launch_s=1e-3).top
    grouping = replace(level, processor=replace(level.processor, groups_experts=True))
    kernels = replace(MIXTRAL.experts.run(formats, 1, MIXTRAL.num_experts), kernels=())
    wanted = launches.GROUPED_EXPERTS_LAUNCHES * 1e-3 if groups else operator_seconds(kernels, level, "bfloat16")
    assert operator_seconds(kernels, grouping, "bfloat16") == pytest.approx(wanted)
    assert operator_seconds(kernels, grouping, "bfloat16", fused=True) == pytest.approx(1e-3)


def test_decode_attention_is_qk_and_pv_over_the_cache_read_once():
    attention = MIXTRAL.attention.attend(Formats.of("bfloat16"), 3, 1000)
    qk = pv = 2 * 3 * 1000 * 32 * 128
    assert attention.flops == qk + pv
    assert attention.num_bytes == 3 * 1000 * 2 * 8 * 128 * 2
    profile = machine(cpu_read=50e9, cpu_flops=1e12)
    seconds = Costs(MIXTRAL, profile, Formats.of("bfloat16")).attention(Device.CPU, 3, 1000, MIXTRAL.layers[0])
    assert seconds == pytest.approx(attention.num_bytes / 50e9)


def test_gemms_count_two_flops_a_multiply_add_and_weights_once():
    kernel = linear(16, 100, 30, Formats.of("float32"))
    assert kernel.flops == 2 * 16 * 100 * 30
    assert kernel.num_bytes == 4 * (100 * 30 + 16 * 100 + 16 * 30)
    (qkv,) = MIXTRAL.attention.project(Formats.of("bfloat16"), 7).kernels
    assert qkv.flops == 2 * 7 * 4096 * (32 + 8 + 8) * 128


def test_experts_count_the_tokens_routed_to_them_and_the_weights_that_are_hit():
    spec = tiny_spec(num_experts=4, experts_per_token=2)
    (ffn,) = spec.experts.run(Formats.of("bfloat16"), 1000, 4).kernels
    assert ffn.flops == 2 * (1000 * 2) * 3 * 64 * 96
    assert ffn.rows == pytest.approx(500)
    weights = 4 * 3 * 64 * 96 * 2
    activations = 2000 * (2 * 64 + 3 * 96) * 2
    assert ffn.num_bytes == pytest.approx(weights + activations)
    half = spec.experts.run(Formats.of("bfloat16"), 1000, 2)
    assert half.flops == ffn.flops / 2
    one_token = spec.experts.run(Formats.of("bfloat16"), 1, 4).kernels[0]
    assert one_token.flops == 2 * 2 * 3 * 64 * 96


def test_transfers_move_what_their_tensors_hold():
    size, m = 2, 5
    assert operators.hidden_bytes(MIXTRAL, Formats.of("bfloat16"), m) == m * 4096 * size
    assert m * MIXTRAL.attention.sent_bytes(Formats.of("bfloat16")) == m * (32 + 2 * 8) * 128 * size
    assert m * MIXTRAL.attention.returned_bytes(Formats.of("bfloat16")) == m * 32 * 128 * size
    assert MIXTRAL.attention.cache_bytes(Formats.of("bfloat16"), 1, m) == m * 2 * 8 * 128 * size
    # Of each routed expert an 8-byte index and a 4-byte weight.
    assert operators.routed_token_bytes(MIXTRAL, Formats.of("bfloat16"), m) == m * (4096 * size + 2 * (8 + 4))
    # Norms after the experts wait for what shared ones add and for the sum of the routed ones.
    gemma = load_model("gemma-4-26b-a4b")
    assert operators.routed_token_bytes(gemma, Formats.of("bfloat16"), m) == m * (3 * 2816 * size + 8 * (8 + 4))
    profile = machine(link=10e9, latency_s=1e-5)
    costs = Costs(MIXTRAL, profile, Formats.of("bfloat16"))
    assert costs.h2d(1e9) == pytest.approx(0.1 + 1e-5)
    assert costs.h2d(0) == 0
