"""With a quantised KV cache, tokens are those of a model whose keys and values go through its codes in float32."""

from dataclasses import replace

import pytest
import torch

from executor.model.gpu import FLASH_DTYPES
from hrm.formats import SCALED_KV_FORMATS, KvFormat
from tests.contracts.selection import chosen
from tests.executor.families.grouped import GROUPED
from tests.executor.families.latent import LATENT
from tests.executor.families.linear import LINEAR
from tests.executor.families.test_parity import POLICIES, SELECTED, policy_of
from tests.executor.families.tiny import save
from tests.executor.families.windowed import WINDOWED
from tests.executor.kv_reference import quantise_as
from tests.executor.runtime.fake_device import FakeDevice
from tests.executor.runtime.queued_backend import LateBackend, kernels_named
from tests.executor.runtime.support import generate, generator, requests
from tests.executor.tiny_models import random_prompts

FAMILIES = {**GROUPED, **WINDOWED, **LATENT, **LINEAR}
CASES = (
    ("qwen3_moe", "fp8"),
    ("qwen3_moe", "int8"),
    ("gpt_oss", "int8"),  # windows and sinks
    ("mixtral with windows", "fp8"),
    ("deepseek_v3", "fp8"),
    ("deepseek_v3", "int8"),
    ("qwen3_next", "fp8"),  # states beside caches
    ("llama4_text", "int8"),  # chunks
    ("gemma4_text", "fp8"),  # heads of other widths in some layers
)
NUM_PROMPTS, MAX_TOKENS = 6, 4


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def case(request, tmp_path_factory):
    """A tiny model, the format of its cache, prompts, and their continuations by the reference."""
    family, form = request.param
    tiny = save(FAMILIES[family], tmp_path_factory.mktemp("quantised") / family)
    prompts = random_prompts(NUM_PROMPTS, vocab=tiny.vocab_size)
    plain = tiny.log_probabilities(prompts[-1:])
    with pytest.MonkeyPatch.context() as patched:
        quantise_as(form, tiny.model, patched)
        assert not torch.equal(tiny.log_probabilities(prompts[-1:]), plain), "the reference quantises nothing"
        expected = {f"request-{i}": tokens for i, tokens in enumerate(tiny.greedy(prompts, MAX_TOKENS))}
    return tiny, form, prompts, expected


def greedy_tokens(tiny, prompts, policy, **how):
    with generator(tiny.folder, policy, **how) as made:
        done = generate(made, requests(prompts, max_tokens=MAX_TOKENS, ignore_eos=True))
    return {name: completion.tokens for name, completion in done.items()}


def test_a_format_of_ones_own_is_run_with(tmp_path, monkeypatch):
    """As CONTRIBUTING says: its row. No kernel of ours knows its codes, so torch computes."""
    monkeypatch.setitem(SCALED_KV_FORMATS, "e5m2", KvFormat("e5m2", 1, codes="float8_e5m2"))
    tiny = save(FAMILIES["qwen3_moe"], tmp_path / "model")
    prompts = random_prompts(NUM_PROMPTS, vocab=tiny.vocab_size)
    quantise_as("e5m2", tiny.model, monkeypatch)
    expected = {f"request-{i}": tokens for i, tokens in enumerate(tiny.greedy(prompts, MAX_TOKENS))}
    policy = replace(policy_of(tiny, "kv split"), batch_size=NUM_PROMPTS, micro_batch_size=2, kv_format="e5m2")
    assert greedy_tokens(tiny, prompts, policy) == expected


@pytest.mark.parametrize("name", chosen(POLICIES, at=range(len(SELECTED))))
def test_greedy_tokens_equal_those_of_the_reference(case, name):
    tiny, form, prompts, expected = case
    policy = replace(policy_of(tiny, name), batch_size=NUM_PROMPTS, micro_batch_size=2, kv_format=form)
    assert greedy_tokens(tiny, prompts, policy) == expected


def test_greedy_tokens_on_a_device(case, monkeypatch):
    """Whose tensors are as strict as CUDA's, and whose copies are late."""
    tiny, form, prompts, expected = case
    monkeypatch.setattr("executor.model.gpu.FLASH_DTYPES", (*FLASH_DTYPES, torch.float32))
    device, few = FakeDevice(late_s=1e-4), 3
    name = "kv split" if form == "fp8" else "split prompts"
    policy = replace(policy_of(tiny, name), batch_size=few, micro_batch_size=2, kv_format=form)
    kernels = kernels_named("fast" if form == "fp8" else "plain")
    try:
        ours = greedy_tokens(tiny, prompts[:few], policy, backend=LateBackend(device, kernels))
        assert ours == dict(list(expected.items())[:few])
    finally:
        device.close()
