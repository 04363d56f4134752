"""Bytes by format against torch, and what a format of its own for the KV cache changes: no more than that."""

from dataclasses import replace
from random import Random

import pytest
import torch

from hrm.contention import ALONE
from hrm.costs import Costs, TaskWork
from hrm.errors import PolicyError
from hrm.formats import ALIGNMENT_BYTES, FORMATS, SCALED_KV_FORMATS, Formats, kv_format
from hrm.model_spec import ModelSpec
from hrm.phases import decode_work, prefill_work
from hrm.policy import Policy
from hrm.schedules import iter_tasks
from hrm.tasks import Phase
from hrm.workload import Workload
from tests.hrm.support import machine, random_spec
from tests.hrm.test_memory import a_policy

WORKLOAD = Workload(name="test", prompt_len=40, max_prompt_len=60, gen_len=9, num_requests=None)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_takes_the_bytes_of_torchs_tensors(name):
    for shape in ((7,), (3, 5), (2, 3, 4)):
        tensor = torch.empty(shape, dtype=getattr(torch, name))
        assert FORMATS[name].bytes_of(*shape) == FORMATS[name].bytes_of(tensor.numel()) == tensor.nbytes
        assert FORMATS[name].elements_in(tensor.nbytes + 1) == tensor.numel()


@pytest.mark.parametrize("name", SCALED_KV_FORMATS)
@pytest.mark.parametrize("parts", [(128,) * 16, (512, 64), (40,) * 6, (7,)])
def test_a_token_of_a_quantised_cache_has_a_byte_for_a_number_and_two_for_a_scale(name, parts):
    found = kv_format(name)
    assert found is not None
    needed = sum(parts) + 2 * len(parts)
    assert found.row_bytes(parts) % ALIGNMENT_BYTES == 0
    assert needed <= found.row_bytes(parts) < needed + 2 * ALIGNMENT_BYTES


def test_other_formats_of_a_cache_are_plain():
    for name in FORMATS:
        found = kv_format(name)
        assert found is not None
        assert found.row_bytes((3, 4)) == torch.empty(7, dtype=getattr(torch, name)).nbytes
    assert kv_format("int5") is None


def test_a_policy_is_complete_in_its_formats():
    policy = a_policy(Random(1), random_spec(Random(1)))
    assert (policy.weight_format, policy.kv_format) == ("bfloat16", "bfloat16")
    assert policy.formats == Formats.of("bfloat16")
    apart = replace(policy, dtype="float16", weight_format="float32")
    assert [one.name for one in (apart.formats.weights, apart.formats.kv_cache, apart.formats.compute)] == [
        "float32",
        "bfloat16",
        "float16",
    ]
    with pytest.raises(PolicyError, match="policy: kv_format is 'int5': must be one of float32"):
        replace(policy, kv_format="int5")


def works(spec: ModelSpec, policy: Policy) -> list[TaskWork]:
    costs = Costs(spec, machine(), policy.formats)
    both = decode_work(costs, policy, 45.0, num_steps=1), prefill_work(costs, policy, WORKLOAD)
    return [replace(work, stretch=ALONE) for work in both]


def moved(work: TaskWork, policy: Policy) -> dict[str, tuple[int, float]]:
    """Bytes and seconds of a phase by kind of task."""
    totals: dict[str, tuple[int, float]] = {}
    seconds_of = work.seconds_of()
    for task in iter_tasks(work.pipeline, policy.schedule):
        num_bytes, seconds = totals.get(task.id.act.name, (0, 0.0))
        totals[task.id.act.name] = num_bytes + work.num_bytes(task.id), seconds + seconds_of(task.id)
    return totals


# What moves, reads or writes keys and values; prefill reads them again where a prompt is split.
OF_CACHE = {"LOAD_KV", "STORE_KV", "OFFLOAD_QKV"}
READS_CACHE = {"ATTENTION", "PREFILL_LAYER"}


def test_a_wider_kv_cache_changes_its_own_tasks_only():
    """Float32 for bfloat16: two more bytes for each element of a key or value that is moved."""
    seen: set[str] = set()
    for seed in range(60):
        rng = Random(seed)
        spec = random_spec(rng)
        policy = a_policy(rng, spec)
        wide = replace(policy, kv_format="float32")
        for plain_work, wide_work in zip(works(spec, policy), works(spec, wide), strict=True):
            plain, widened = moved(plain_work, policy), moved(wide_work, wide)
            tokens, context = plain_work.tokens, plain_work.context
            cached = tokens * 2 * spec.num_kv_heads * spec.head_dim * spec.num_layers
            for kind, (num_bytes, seconds) in plain.items():
                wide_bytes, wide_s = widened[kind]
                if kind in OF_CACHE:
                    # A cache is moved whole by a load, and otherwise grows by the new tokens.
                    in_each = cached * (context if kind == "LOAD_KV" else 1)
                    number = round(number_of(plain_work, policy, kind))
                    assert wide_bytes - num_bytes == pytest.approx(2 * in_each * number, rel=0.02), (seed, kind)
                    assert wide_s > seconds
                    seen.add(kind)
                elif kind in READS_CACHE:
                    split = policy.prefill_chunk_tokens < WORKLOAD.prompt_len
                    reads = plain_work.pipeline.phase is Phase.DECODE or split
                    assert wide_bytes == num_bytes == 0
                    assert wide_s >= seconds if reads else wide_s == seconds, (seed, kind)
                    seen |= {kind} if wide_s > seconds else set()
                else:
                    assert (wide_bytes, wide_s) == (num_bytes, seconds), (seed, kind)
    assert seen == OF_CACHE | READS_CACHE


@pytest.mark.parametrize("name", SCALED_KV_FORMATS)
def test_a_quantised_kv_cache_moves_the_bytes_of_its_rows_and_changes_nothing_else(name):
    seen: set[str] = set()
    for seed in range(20):
        rng = Random(seed)
        spec = random_spec(rng)
        policy = a_policy(rng, spec)
        small = replace(policy, kv_format=name)
        row_bytes = spec.layers[0].mixer.cached_bytes(small.formats)
        elements = 2 * spec.num_kv_heads * spec.head_dim
        for plain_work, small_work in zip(works(spec, policy), works(spec, small), strict=True):
            plain, shrunk = moved(plain_work, policy), moved(small_work, small)
            for kind, (num_bytes, seconds) in plain.items():
                if kind in {"LOAD_KV", "STORE_KV"}:
                    assert shrunk[kind][0] == pytest.approx(num_bytes * row_bytes / (2 * elements), rel=0.02)
                    seen.add(kind)
                elif kind == "OFFLOAD_QKV":
                    number = round(number_of(plain_work, policy, kind)) * spec.num_layers
                    saved = plain_work.tokens * (2 * elements - row_bytes) * number
                    assert num_bytes - shrunk[kind][0] == pytest.approx(saved, rel=0.02)
                    seen.add(kind)
                elif kind not in READS_CACHE:
                    assert shrunk[kind] == (num_bytes, seconds), (seed, kind)
    assert seen == OF_CACHE


def number_of(work: TaskWork, policy: Policy, kind: str) -> float:
    """How many tasks of a kind each layer has."""
    tasks = sum(task.id.act.name == kind for task in iter_tasks(work.pipeline, policy.schedule))
    return tasks / work.pipeline.num_layers
