"""Bytes by purpose, counted again as the tensors that are held."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest

from hrm.buffers import Purpose
from hrm.errors import PolicyError
from hrm.formats import FORMATS
from hrm.memory import plan_memory, purposes
from hrm.model_spec import ModelSpec
from hrm.model_spec.workspace import workspace_bytes
from hrm.policy import Policy, ScheduleName, kv_tokens_for
from hrm.tasks import Device
from tests.hrm.support import machine, random_experts_per_part, random_ffn, random_spec, tiny_spec

SIZE = 2  # bytes of a bfloat16
SIZES = {"float32": 4, "bfloat16": SIZE, "float16": 2}


def a_policy(rng: Random, spec: ModelSpec) -> Policy:
    micro_batch_size, n = rng.randint(1, 9), rng.randint(1, 6)
    ffn, staging = random_ffn(rng), rng.random() < 0.5
    return Policy(
        schedule=rng.choice(list(ScheduleName)),
        batch_size=micro_batch_size * n,
        micro_batch_size=micro_batch_size,
        attention=rng.choice(list(Device)),
        **ffn,
        resident_experts=tuple(rng.randint(0, spec.num_experts) for _ in range(spec.num_layers)),
        resident_dense=rng.random() < 0.5,
        gpu_kv_micro_batches=rng.randint(0, n),
        kv_tokens_per_micro_batch=16 * rng.randint(1, 20),
        prefill_chunk_tokens=rng.randint(1, 300),
        prefix_buffer_tokens=rng.choice([0, rng.randint(1, 900)]),
        experts_per_part=random_experts_per_part(rng, spec, ffn["prefill_ffn"], staging=staging),
        staging=staging,
    )


def counted(spec: ModelSpec, p: Policy) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of every tensor held, by purpose, for the GPU and for the host."""
    of_weights, of_kv, size = (SIZES[name] for name in (p.weight_format, p.kv_format, p.dtype))
    heads, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    hidden = spec.hidden_size
    expert = 3 * hidden * spec.intermediate_size
    dense = hidden * heads + 2 * hidden * kv + heads * hidden + hidden * spec.num_experts + 2 * hidden
    on_gpu = on_host = largest = part = 0
    for resident in p.resident_experts:
        others = sum(expert for number in range(spec.num_experts) if number >= resident)
        on_gpu += resident * expert + dense * p.resident_dense
        on_host += others + dense * (not p.resident_dense)
        in_parts = p.experts_per_part > 0
        streamed = others * (p.prefill_ffn is Device.GPU and not in_parts) + dense * (not p.resident_dense)
        largest = max(largest, streamed)
        part = max(part, in_parts * min(others, 1) * p.experts_per_part * expert)
    n = p.num_micro_batches
    kv_on_gpu = sum(p.kv_on_gpu(j) for j in range(n))
    cache = p.kv_tokens_per_micro_batch * 2 * kv
    moves_kv = p.attention is Device.GPU and kv_on_gpu < n
    cpu_experts = p.ffn is Device.CPU and on_host > 0
    request = (hidden + heads + heads) * size + 2 * kv * of_kv
    request += 3 * 8 + 4 * 4  # int64 and int32 that tell a GPU where it is
    request += (2 * hidden * size + 12 * spec.experts_per_token) * cpu_experts
    to_experts = hidden * size + 12 * spec.experts_per_token if p.prefill_ffn is Device.CPU and on_host > 0 else 0
    pages = n if p.schedule is ScheduleName.CGOPIPE else 1
    gpu = {
        "resident_weights": (on_gpu + spec.vocab_size * hidden + hidden) * of_weights,
        "weight_slots": 2 * largest * of_weights,
        "expert_slots": 2 * part * of_weights,
        "kv_cache": kv_on_gpu * spec.num_layers * cache * of_kv,
        "kv_buffers": 2 * cache * of_kv * moves_kv,
        "exchange": p.batch_size * request,
        "prefill_buffers": 2 * p.prefill_chunk_tokens * (hidden * size + 2 * kv * of_kv + 2 * 8 + to_experts),
        "prefix_buffer": p.prefix_buffer_tokens * 2 * kv * of_kv,
        "logits": p.micro_batch_size * spec.vocab_size * (4 + size),
    }
    cpu = {
        "weights": (on_host + spec.vocab_size * hidden) * of_weights,
        "staging": 4 * 16 * -(-largest * of_weights // (16 * pages)) * p.staging,  # pages of 16 bytes each
        "kv_cache": (n - kv_on_gpu) * spec.num_layers * cache * of_kv,
        "exchange": p.batch_size * request,
        "prefill_buffers": 2 * p.prefill_chunk_tokens * to_experts,
        "prefill_hidden": n * p.kv_tokens_per_micro_batch * (hidden * size + 2 * 8),
    }
    return gpu, cpu


def test_purposes_are_the_tensors_that_are_held():
    for seed in range(200):
        rng = Random(seed)
        spec = random_spec(rng)
        formats = {name: rng.choice(list(SIZES)) for name in ("dtype", "weight_format", "kv_format")}
        policy = replace(a_policy(rng, spec), **formats)
        for planned, tensors in zip(purposes(spec, policy), counted(spec, policy), strict=True):
            assert {**planned, "workspace": 0} == {**tensors, "workspace": 0}, (seed, policy)


def test_the_workspace_holds_the_tensors_of_one_layer():
    spec = tiny_spec()
    for tokens in (1, 64, 1000):
        at_once = tokens * SIZE * (2 * 64 + 2 * 32)  # queries and output, keys and values
        expert = tokens * SIZE * (3 * 64 + 2 * 96)
        needed = at_once + expert
        assert needed <= workspace_bytes(spec, tokens, FORMATS["bfloat16"]) <= 1.3 * needed + 1024
    slim = Policy(
        batch_size=4,
        micro_batch_size=4,
        resident_experts=(0,) * 4,
        kv_tokens_per_micro_batch=64,
        prefill_chunk_tokens=3,
    )
    gpu, cpu = purposes(spec, slim)
    counts = 8 * spec.num_layers * spec.num_experts
    assert gpu[Purpose.WORKSPACE] == workspace_bytes(spec, 4, FORMATS["bfloat16"]) + counts
    assert cpu[Purpose.WORKSPACE] == 0


def test_one_level_holds_both_purposes_and_refuses_what_is_too_much():
    spec = tiny_spec()
    policy = a_policy(Random(5), spec)
    two = machine(gpu_bytes=1e9, cpu_bytes=2e9)
    plan = plan_memory(spec, policy, two)
    plan.check_fits()
    assert (plan.gpu.capacity_bytes, plan.cpu.capacity_bytes) == (10**9, 2 * 10**9)
    for level, need in (("gpu", plan.gpu.planned_bytes), ("cpu", plan.cpu.planned_bytes)):
        exact = {"gpu_bytes": 1e9, "cpu_bytes": 2e9, f"{level}_bytes": need}
        plan_memory(spec, policy, machine(**exact)).check_fits()
        short = {**exact, f"{level}_bytes": need - 1}
        with pytest.raises(PolicyError, match=f"memory at level {level} .*--{level}-memory"):
            plan_memory(spec, policy, machine(**short)).check_fits()


def test_a_micro_batchs_cache_holds_its_requests_and_the_longest():
    assert kv_tokens_for(1, 100, 600) == 608
    assert kv_tokens_for(32, 205, 546) == 560 + 31 * 213 + -(560 + 31 * 213) % 16
    for requests in (1, 3, 8):
        assert kv_tokens_for(requests, 33, 33) == requests * 48
    sizes = np.array([1, 2, 7, 32])
    one_by_one = [kv_tokens_for(size, 205, 546) for size in sizes.tolist()]
    assert kv_tokens_for(sizes, 205, 546).tolist() == one_by_one
