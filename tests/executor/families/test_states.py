"""States of sequences: the same tokens wherever they lie, in any parts of prompts, whoever else has ended."""

from dataclasses import replace

import pytest

from hrm.memory import purposes
from hrm.policy import ScheduleName
from tests.executor.families.linear import LINEAR
from tests.executor.families.tiny import save
from tests.executor.runtime.fake_device import FakeDevice
from tests.executor.runtime.queued_backend import LateBackend, kernels_named
from tests.executor.runtime.support import CPU, GPU, architecture, emulated, generate, generator, machine, make_policy
from tests.executor.runtime.support import requests as greedy
from tests.executor.tiny_models import random_prompts

PROMPTS, MAX_TOKENS = random_prompts(7, longest=30, seed=3), 4
PLACES = {
    "host": {"attention": CPU, "prefix_buffer_tokens": 40},
    "streamed": {"attention": GPU, "resident_dense": False},
    "streamed, flexgen": {"attention": GPU, "schedule": ScheduleName.FLEXGEN},
    "streamed, deepspeed": {"attention": GPU, "resident_dense": False, "schedule": ScheduleName.DEEPSPEED},
    "gpu": {"attention": GPU, "gpu_kv_micro_batches": 4},
    "mixed": {"attention": CPU, "gpu_kv_micro_batches": 2, "prefix_buffer_tokens": 40, "ffn": CPU},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save(LINEAR["qwen3_5_moe_text"], tmp_path_factory.mktemp("states"))


@pytest.fixture(scope="module")
def expected(tiny):
    return {f"request-{i}": tokens for i, tokens in enumerate(tiny.greedy(PROMPTS, MAX_TOKENS))}


def policy_of(tiny, place, chunk):
    layers = architecture(tiny.folder).spec.num_layers
    sizes = {"batch_size": 8, "micro_batch_size": 2, "kv_tokens_per_micro_batch": 96, "prefill_chunk_tokens": chunk}
    return make_policy(layers, resident=1, **sizes, **PLACES[place])


def wanted():
    """As many tokens as their number has: some end in every step."""
    return [
        replace(request, params=replace(request.params, max_tokens=1 + (3 * i + 2) % MAX_TOKENS, ignore_eos=True))
        for i, request in enumerate(greedy(PROMPTS))
    ]


def tokens_of(made):
    return {name: done.tokens for name, done in generate(made, wanted()).items()}


@pytest.fixture
def right(expected):
    return {one.name: expected[one.name][: one.params.max_tokens] for one in wanted()}


@pytest.mark.parametrize("place", PLACES)
def test_any_parts_give_the_tokens_of_transformers(tiny, right, place):
    for chunk in (5, 13):
        with generator(tiny.folder, policy_of(tiny, place, chunk)) as made:
            for memory in (made.memory.prefill.prefix, made.memory.prefill.kv_B):
                memory.fill_(255)  # nothing is read that earlier requests left
            assert tokens_of(made) == right, chunk


@pytest.mark.parametrize("place", ["host", "streamed", "gpu"])
def test_on_a_device(tiny, right, place):
    device = FakeDevice(late_s=1e-3)
    backend = LateBackend(device, kernels_named("plain"))
    try:
        with generator(tiny.folder, policy_of(tiny, place, 13), backend=backend) as made:
            assert tokens_of(made) == right
    finally:
        device.close()


@pytest.mark.parametrize("place", ["host", "streamed", "mixed"])
def test_memory_stays_within_the_plan(tiny, place):
    policy, spec = policy_of(tiny, place, 13), architecture(tiny.folder).spec
    with generator(tiny.folder, policy, backend=emulated(machine(bandwidth=5e8))) as made:
        tokens_of(made)
        peak = made.peak_bytes
    for level, planned in zip(("gpu", "cpu"), purposes(spec, policy), strict=True):
        for purpose, used in peak[level].items():
            assert used <= planned[purpose], (level, purpose)
