"""Models of packed weights give the tokens of a slow reference that dequantises to float32 first, wherever they lie."""

from dataclasses import replace

import pytest

from executor.backends import make_backend
from executor.families import FAMILIES
from executor.generate import Generator, Planned, Prepared
from executor.random_weights import RandomWeights
from executor.weight_pages import StoredWeights
from hrm.memory import plan_memory
from hrm.policy import Policy, ScheduleName
from tests.executor import reference
from tests.executor.runtime.fake_device import FakeDevice
from tests.executor.runtime.queued_backend import LateBackend, kernels_named
from tests.executor.runtime.support import CPU, GPU, emulated, generate, machine, make_policy, requests
from tests.executor.tiny_models import random_prompts, tiny_arch

# Several formats in one model are the usual case.
PACKED = {
    "experts in int4, attention in fp8": {"w13": "int4-g16", "w2": "int4-g16", "qkv": "fp8", "output": "fp8"},
    "experts in mxfp4": {"w13": "mxfp4", "w2": "mxfp4"},
    "experts in nvfp4, attention in int8": {"w13": "nvfp4", "w2": "nvfp4", "qkv": "int8", "output": "int8"},
    "all in blocks of fp8": dict.fromkeys(("w13", "w2", "qkv", "output"), "fp8-b16"),
    "experts with zeros and an order": {"w13": "int4-g32-f16-z", "w2": "int4-g32-f16-z-o"},
}
POLICIES = {
    "attention on the cpu": {"attention": CPU, "resident": 1},
    "attention on the gpu": {"attention": GPU, "schedule": ScheduleName.DEEPSPEED, "resident_dense": False},
    "experts on the cpu": {"attention": CPU, "ffn": CPU, "schedule": ScheduleName.FLEXGEN},
    "prefill's experts too": {"ffn": CPU, "prefill_ffn": CPU},
    "staged, kv split": {"attention": GPU, "gpu_kv_micro_batches": 1, "resident": 2, "staging": True},
    "all resident": {"attention": GPU, "resident": 4, "gpu_kv_micro_batches": 3},
}
MAX_TOKENS, NUM_PROMPTS = 4, 8


@pytest.fixture(scope="module", params=PACKED)
def packed(request):
    """A tiny model with these formats, and what its reference says."""
    arch = tiny_arch(num_layers=2, hidden_size=64, intermediate_size=96, num_experts=4)
    layers = [replace(layer, packed=tuple(PACKED[request.param].items())) for layer in arch.spec.layers]
    arch = replace(arch, spec=arch.spec.with_layers(layers))
    prompts = random_prompts(NUM_PROMPTS, vocab=arch.spec.vocab_size)
    whole = reference.load(FAMILIES["mixtral"], RandomWeights(seed=3), arch)
    expected = {f"request-{i}": tuple(reference.greedy(whole, prompt, MAX_TOKENS)) for i, prompt in enumerate(prompts)}
    assert len({tuple(tokens) for tokens in expected.values()}) > NUM_PROMPTS / 2, "tokens tell too little"
    return arch, prompts, expected


def greedy_tokens(arch, prompts, policy: Policy, backend=None):
    plan = plan_memory(arch.spec, policy, machine())
    source, backend = RandomWeights(seed=3), backend or make_backend("cpu", None)
    prepared, stored = Prepared(backend, Planned(policy, plan)), StoredWeights(source, FAMILIES["mixtral"])
    with Generator(prepared, arch, stored) as made:
        return {name: done.tokens for name, done in generate(made, requests(prompts, max_tokens=MAX_TOKENS)).items()}


def policy_of(arch, name: str) -> Policy:
    return make_policy(arch.spec.num_layers, batch_size=NUM_PROMPTS, micro_batch_size=3, **POLICIES[name])


@pytest.mark.parametrize("name", POLICIES)
def test_tokens_equal_those_of_the_reference(packed, name):
    arch, prompts, expected = packed
    assert greedy_tokens(arch, prompts, policy_of(arch, name)) == expected


def test_pages_of_packed_weights_cross_an_emulated_link(packed):
    arch, prompts, expected = packed
    assert greedy_tokens(arch, prompts, policy_of(arch, "attention on the cpu"), emulated(machine())) == expected


def test_tokens_on_a_device(packed):
    """Whose tensors are as strict as CUDA's, and whose copies are late."""
    arch, prompts, expected = packed
    device, few = FakeDevice(late_s=1e-3), 4
    try:
        backend = LateBackend(device, kernels_named("plain"))
        policy = replace(policy_of(arch, "staged, kv split"), batch_size=few, micro_batch_size=2)
        assert greedy_tokens(arch, prompts[:few], policy, backend) == dict(list(expected.items())[:few])
    finally:
        device.close()
