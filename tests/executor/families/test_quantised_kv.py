"""With a quantised KV cache, tokens are those of a model whose keys and values go through its codes in float32."""

import sys
from dataclasses import replace

import pytest
import torch

from executor.model.gpu import FLASH_DTYPES
from tests.executor.families.grouped import GROUPED
from tests.executor.families.latent import LATENT
from tests.executor.families.linear import LINEAR
from tests.executor.families.test_parity import POLICIES, policy_of
from tests.executor.families.tiny import save
from tests.executor.families.windowed import WINDOWED
from tests.executor.runtime.fake_device import FakeDevice
from tests.executor.runtime.queued_backend import LateBackend, kernels_named
from tests.executor.runtime.support import generate, generator, requests
from tests.executor.tiny_models import random_prompts

FAMILIES = {**GROUPED, **WINDOWED, **LATENT, **LINEAR}
FORMATS = ("fp8", "int8")
CASES = (
    ("qwen3_moe", "fp8"),
    ("qwen3_moe", "int8"),
    ("gpt_oss", "int8"),  # windows and sinks
    ("mixtral with windows", "fp8"),
    ("deepseek_v3", "fp8"),
    ("deepseek_v3", "int8"),
    ("qwen3_next", "fp8"),  # states beside caches
)
NUM_PROMPTS, MAX_TOKENS = 6, 4


def meant(x: torch.Tensor, form: str) -> torch.Tensor:
    """What is left of numbers whose last axis shares a scale, in float32."""
    greatest = 127 if form == "int8" else 448
    scale = (x.abs().amax(-1, keepdim=True) / greatest).bfloat16().float()
    codes = torch.where(scale > 0, x / scale, 0.0).clamp(-greatest, greatest)
    return scale * (codes.round() if form == "int8" else codes.to(torch.float8_e4m3fn).float())


def quantise_as(form, model, monkeypatch) -> None:
    """Let transformers attend to what a cache of that form would hold."""
    model.set_attn_implementation("eager")
    modelling = sys.modules[type(model).__module__]
    attend = modelling.eager_attention_forward
    latent = hasattr(model.config, "kv_lora_rank")

    def attend_to_codes(module, query, key, value, *others, **options):
        if latent:  # the compressed vector is quantised below; of a key only its rotary end is cached as it is
            rotary = model.config.qk_rope_head_dim
            key = torch.cat([key[..., :-rotary], meant(key[..., -rotary:], form)], dim=-1)
        else:
            key, value = meant(key, form), meant(value, form)
        return attend(module, query, key, value, *others, **options)

    monkeypatch.setattr(modelling, "eager_attention_forward", attend_to_codes)
    for name, module in model.named_modules():
        if name.endswith("kv_a_layernorm"):
            whole = module.forward
            monkeypatch.setattr(module, "forward", lambda x, whole=whole: meant(whole(x), form))


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def case(request, tmp_path_factory):
    """A tiny model, the format of its cache, prompts, and their continuations by the reference."""
    family, form = request.param
    tiny = save(FAMILIES[family], tmp_path_factory.mktemp("quantised") / family)
    prompts = random_prompts(NUM_PROMPTS, vocab=tiny.vocab_size)
    plain = tiny.log_probabilities(prompts[-1])
    with pytest.MonkeyPatch.context() as patched:
        quantise_as(form, tiny.model, patched)
        assert not torch.equal(tiny.log_probabilities(prompts[-1]), plain), "the reference quantises nothing"
        expected = {f"request-{i}": tiny.greedy(prompt, MAX_TOKENS) for i, prompt in enumerate(prompts)}
    return tiny, form, prompts, expected


def greedy_tokens(tiny, prompts, policy, **how):
    with generator(tiny.folder, policy, **how) as made:
        done = generate(made, requests(prompts, max_tokens=MAX_TOKENS, ignore_eos=True))
    return {name: completion.tokens for name, completion in done.items()}


@pytest.mark.parametrize("name", POLICIES)
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
