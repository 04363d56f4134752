"""Every family that is run gives the tokens of transformers, however the work is divided.

A family joins by a row in a table like GROUPED: its name, with other words behind it if there are several
rows, and a function that makes a tiny model of it.
"""

from dataclasses import replace

import pytest
import torch

from executor.checkpoint import Checkpoint
from executor.families import FAMILIES, family_for
from executor.generate import Generator
from executor.group import Group
from hrm.errors import ModelError
from hrm.policy import ScheduleName
from tests.contracts.selection import chosen
from tests.executor.families.grouped import GROUPED, GROUPED_OTHERWISE
from tests.executor.families.latent import LATENT
from tests.executor.families.linear import LINEAR
from tests.executor.families.tiny import Tiny, save
from tests.executor.families.windowed import WINDOWED
from tests.executor.group.threads import with_ranks
from tests.executor.runtime.fake_device import FakeDevice
from tests.executor.runtime.queued_backend import LateBackend, kernels_named
from tests.executor.runtime.support import CPU, GPU, architecture, generate, generator, make_policy, requests
from tests.executor.tiny_models import random_prompts

FAMILIES_UNDER_TEST = {**GROUPED, **LATENT, **WINDOWED, **LINEAR}
STORED_OTHERWISE = {**GROUPED_OTHERWISE}
ELSEWHERE = {"mixtral", "dbrx"}  # the runtime's own parity tests run these

# Their norms are of all heads together, or of what a block adds to hidden states.
UNDIVIDED = {"olmoe", "minimax_m2", "gemma4_text"}

ALL = 1000
MAX_TOKENS = 4
NUM_PROMPTS = 12
# Of those that every run has, each has several of the parts that a family may compute in its own way; one by one they
# are in the others.
SELECTED = {
    "attention on the gpu": {"attention": GPU, "schedule": ScheduleName.DEEPSPEED, "resident_dense": False},
    "experts on both": {"attention": CPU, "ffn": CPU, "prefill_ffn": CPU, "prefill_chunk_tokens": 40, "resident": 3},
    "experts in parts": {"attention": CPU, "resident": 1, "experts_per_part": 2, "resident_dense": False},
    "split prompts, kv split": {
        "attention": GPU,
        "gpu_kv_micro_batches": 1,
        "prefill_chunk_tokens": 11,
        "prefix_buffer_tokens": 40,
        "resident": ALL,
    },
    "split prompts, experts on the cpu": {
        "attention": CPU,
        "ffn": CPU,
        "schedule": ScheduleName.FLEXGEN,
        "prefill_chunk_tokens": 9,
        "prefix_buffer_tokens": 40,
    },
}
POLICIES = {
    **SELECTED,
    "attention on the cpu": {"attention": CPU, "resident": 1},
    "experts on the cpu": {"attention": CPU, "ffn": CPU, "schedule": ScheduleName.FLEXGEN},
    "kv split": {"attention": GPU, "gpu_kv_micro_batches": 1, "resident": 2},
    "all resident": {"attention": GPU, "resident": ALL, "gpu_kv_micro_batches": 3},
    "split prompts": {"attention": CPU, "prefill_chunk_tokens": 9, "prefix_buffer_tokens": 40},
    "split prompts, kv streamed": {"attention": GPU, "prefill_chunk_tokens": 11, "prefix_buffer_tokens": 40},
}


@pytest.fixture(scope="module", params=FAMILIES_UNDER_TEST)
def tiny(request, tmp_path_factory) -> Tiny:
    folder = tmp_path_factory.mktemp("families") / request.param
    return save(FAMILIES_UNDER_TEST[request.param], folder, STORED_OTHERWISE.get(request.param))


@pytest.fixture(scope="module")
def prompts(tiny):
    return random_prompts(NUM_PROMPTS, vocab=tiny.vocab_size)


@pytest.fixture(scope="module")
def expected(tiny, prompts):
    return {f"request-{i}": tokens for i, tokens in enumerate(tiny.greedy(prompts, MAX_TOKENS))}


@pytest.fixture(scope="module")
def after_prompts(tiny, prompts):
    return tiny.log_probabilities(prompts)


def policy_of(tiny, name):
    choices, layers = dict(POLICIES[name]), architecture(tiny.folder).spec.layers
    most = choices.pop("resident", 0)
    resident = tuple(min(most, layer.num_experts) for layer in layers)
    return make_policy(len(layers), batch_size=NUM_PROMPTS, resident_experts=resident, **choices)


def greedy_tokens(tiny, prompts, policy, *, max_tokens=MAX_TOKENS, **how):
    with generator(tiny.folder, policy, **how) as made:
        done = generate(made, requests(prompts, max_tokens=max_tokens, ignore_eos=True))
    return {name: completion.tokens for name, completion in done.items()}


def test_every_family_that_is_run_is_here():
    assert {*(name.split()[0] for name in FAMILIES_UNDER_TEST), *ELSEWHERE} == set(FAMILIES)


@pytest.mark.parametrize("name", chosen(POLICIES, at=range(len(SELECTED))))
def test_greedy_tokens_equal_those_of_transformers(tiny, prompts, expected, name):
    assert greedy_tokens(tiny, prompts, policy_of(tiny, name)) == expected


def test_greedy_tokens_on_a_device(tiny, prompts, expected):
    """Whose tensors are as strict as CUDA's, and whose copies are late: of two micro-batches and two decode steps."""
    device, few = FakeDevice(late_s=1e-3), 4
    backend, policy = LateBackend(device, kernels_named("plain")), replace(policy_of(tiny, "kv split"), batch_size=few)
    policy = replace(policy, micro_batch_size=2)
    try:
        ours = greedy_tokens(tiny, prompts[:few], policy, max_tokens=3, backend=backend)
        assert ours == {name: tokens[:3] for name, tokens in list(expected.items())[:few]}
    finally:
        device.close()


def test_greedy_tokens_of_two_ranks(tiny, prompts, expected):
    """Of models that ranks can divide; others say what they cannot."""
    policy, spec = policy_of(tiny, "experts on both"), architecture(tiny.folder).spec

    def tokens(made: Generator, _: Group) -> dict[str, tuple[int, ...]]:
        done = generate(made, requests(prompts, max_tokens=MAX_TOKENS, ignore_eos=True))
        return {name: completion.tokens for name, completion in done.items()}

    if tiny.folder.name.split()[0] in UNDIVIDED:
        with pytest.raises(ModelError, match="needs the whole of what each rank has a part of"):
            architecture(tiny.folder).of_rank(1, spec.of_rank(2))
        return
    assert with_ranks(tiny.folder, policy, 2, tokens) == [expected] * 2


@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-4), ("bfloat16", 0.25)])
def test_log_probabilities_are_near_those_of_transformers(tiny, prompts, after_prompts, dtype, within):
    policy = replace(policy_of(tiny, "attention on the cpu"), dtype=dtype, weight_format="", kv_format="")
    with generator(tiny.folder, policy) as made:
        done = generate(made, requests(prompts, max_tokens=1, ignore_eos=True, logprobs=True))
    completions = [done[f"request-{i}"] for i in range(NUM_PROMPTS)]
    ours = torch.tensor([one.logprobs[0] for one in completions])
    theirs = after_prompts[range(NUM_PROMPTS), [one.tokens[0] for one in completions]]
    # Rounding may send a token to another expert now and then, so most count, not the worst.
    far = (ours - theirs).abs()
    assert far.median() < within
    assert dtype == "bfloat16" or far.max() < within


def test_saved_names_are_those_that_are_expected(tiny):
    with Checkpoint.open(tiny.folder) as checkpoint:
        family = family_for(checkpoint.config, checkpoint.config_path)
        arch = family.architecture(checkpoint.config, checkpoint.config_path)
        expected = family.expected_tensors(arch, checkpoint.names)
        checkpoint.check(expected)
    assert sum(torch.Size(each.shape).numel() for each in expected.values()) == arch.spec.parameters
