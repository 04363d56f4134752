"""Greedy tokens through streams, marks and the GPU's kernels equal those of transformers."""

from dataclasses import replace

import pytest
import torch

from executor.model.gpu import FLASH_DTYPES
from hrm.policy import ScheduleName
from tests.executor.runtime.fake_device import FakeDevice
from tests.executor.runtime.queued_backend import LateBackend, kernels_named
from tests.executor.runtime.support import architecture, generate, generator, requests
from tests.executor.runtime.test_parity import MAX_TOKENS, POLICIES, PROMPTS, expected, policy_of
from tests.executor.tiny_models import DBRX

SOME = (
    "all streamed, both on the gpu", "ffn on the cpu, dense streams", "both on the cpu",
    "some experts stay, ragged", "kv split, cpu", "kv split, gpu", "kv on the gpu",
    "staged, gpu, uneven", "small cache",
)  # fmt: skip


@pytest.fixture
def device():
    made = FakeDevice(late_s=3e-4)
    yield made
    made.close()


@pytest.fixture
def folder(tiny_folders):
    return tiny_folders["wide heads"]


@pytest.mark.parametrize("schedule", [ScheduleName.CGOPIPE, ScheduleName.DEEPSPEED])
@pytest.mark.parametrize("name", SOME)
def test_greedy_tokens(folder, device, name, schedule):
    policy = policy_of(folder, schedule, POLICIES[name])
    with generator(folder, policy, backend=LateBackend(device, kernels_named("plain"))) as made:
        done = generate(made, requests(PROMPTS, max_tokens=MAX_TOKENS))
    assert {name: completion.tokens for name, completion in done.items()} == expected(folder)


@pytest.mark.parametrize("model", ["all experts", DBRX])
def test_other_models(tiny_folders, device, model):
    folder = tiny_folders[model]
    policy = policy_of(folder, ScheduleName.CGOPIPE, POLICIES["kv split, gpu"])
    with generator(folder, policy, backend=LateBackend(device, kernels_named("plain"))) as made:
        done = generate(made, requests(PROMPTS, max_tokens=MAX_TOKENS))
    assert {name: completion.tokens for name, completion in done.items()} == expected(folder)


def test_routed_tokens_are_counted_on_the_device(folder, device):
    policy = policy_of(folder, ScheduleName.CGOPIPE, POLICIES["kv split, gpu"])
    wanted = requests(PROMPTS, max_tokens=4, ignore_eos=True)

    def routed(**options):
        from executor.batching import Batcher

        with generator(folder, policy, **options) as made:
            (batch,) = Batcher(iter(wanted), policy)
            return made.generate(batch).routed_tokens

    assert routed(backend=LateBackend(device, kernels_named("plain"))) == routed()


def test_flash_attention_and_grouped_gemms(folder, device, monkeypatch):
    monkeypatch.setattr("executor.model.gpu.FLASH_DTYPES", (*FLASH_DTYPES, torch.float32))
    policy = policy_of(folder, ScheduleName.CGOPIPE, POLICIES["kv on the gpu"])
    assert architecture(folder).spec.head_dim % 8 == 0
    with generator(folder, policy, backend=LateBackend(device, kernels_named("fast"))) as made:
        done = generate(made, requests(PROMPTS, max_tokens=MAX_TOKENS))
    assert {name: completion.tokens for name, completion in done.items()} == expected(folder)
    # The grouped GEMM takes bfloat16 alone: that it is reached, and right, is shown in test_gpu.
    low = replace(policy, dtype="bfloat16")
    with generator(folder, low, backend=LateBackend(device, kernels_named("fast"))) as made:
        ours = generate(made, requests(PROMPTS, max_tokens=1))
    with generator(folder, low) as made:
        theirs = generate(made, requests(PROMPTS, max_tokens=1))
    same = sum(ours[name].tokens == theirs[name].tokens for name in ours)
    assert same >= len(PROMPTS) - 2
