"""Prefill and decode put together from the fast functions, against transformers and reference."""

import pytest
import torch

from executor.checkpoint import Checkpoint
from executor.families import FAMILIES, family_for
from executor.model import Workspace, decode_attention, logits, prefill_attention, run_experts
from executor.model.mixers.grouped_query import append_kv
from executor.random_weights import RandomWeights
from executor.sampling import SamplingParams, choose
from hrm.formats import FORMATS
from hrm.model_spec.workspace import workspace_bytes
from tests.executor import reference
from tests.executor.model.steps import post_attention, pre_attention
from tests.executor.tiny_models import DBRX, random_prompts, tiny_arch, transformers_greedy, transformers_logits

NEW_TOKENS = 12
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)


def load_reference(folder):
    with Checkpoint.open(folder) as checkpoint:
        family = family_for(checkpoint.config, checkpoint.config_path)
        arch = family.architecture(checkpoint.config, checkpoint.config_path)
        checkpoint.check(family.expected_tensors(arch))
        return reference.load(family, checkpoint, arch)


def generate(model, prompts, max_tokens, dtype=torch.float32):
    """Greedy continuations by prefilling all prompts at once and then decoding all at once."""
    arch, spec = model.arch, model.arch.spec
    sizes = [len(prompt) for prompt in prompts]
    room = [size + max_tokens for size in sizes]
    starts = [sum(room[:r]) for r in range(len(prompts))]
    cache_LC2Gd = torch.full((spec.num_layers, sum(room), 2, spec.num_kv_heads, spec.head_dim), torch.nan, dtype=dtype)
    num_bytes = workspace_bytes(spec, sum(sizes), FORMATS[str(dtype).removeprefix("torch.")])
    workspace = Workspace(torch.empty(num_bytes, dtype=torch.uint8))
    head_workspace = Workspace(torch.empty(10**6, dtype=torch.uint8))
    last = torch.tensor(sizes).cumsum(0) - 1
    fed = torch.tensor([token for prompt in prompts for token in prompt])
    positions = torch.cat([torch.arange(size) for size in sizes])
    rows = torch.cat([s + torch.arange(size) for s, size in zip(starts, sizes, strict=True)])
    out = [[] for _ in prompts]
    for step in range(max_tokens):
        hidden = model.embedding[fed].to(dtype)
        for layer, (dense, experts) in enumerate(model.layers):
            cache = cache_LC2Gd[layer]
            qkv = workspace.take((len(fed), spec.query_size + 2 * spec.kv_size), dtype)
            attended = workspace.take((len(fed), spec.query_size), dtype)
            pre_attention(arch, hidden, dense, positions, qkv, workspace)
            append_kv(cache, qkv, rows)
            if step:
                lengths = [size + step for size in sizes]
                decode_attention(arch.spec.attention, qkv, cache, starts, lengths, attended)
            else:
                prefill_attention(arch.spec.attention, qkv, sizes, [None] * len(sizes), attended, workspace)
            x, routing = post_attention(arch, hidden, attended, dense, workspace)
            run_experts(x, routing, enumerate(experts), hidden, workspace)
            workspace.reset()
        if not step:
            hidden = hidden[last]
        head_workspace.reset()
        scores = logits(arch.final_norm, hidden, model.head, head_workspace)
        chosen = choose(scores, [GREEDY] * len(prompts), [step] * len(prompts))
        for tokens, token in zip(out, chosen, strict=True):
            tokens.append(token)
        fed, positions = torch.tensor(chosen), torch.tensor(sizes) + step
        rows = torch.tensor(starts) + positions
    return [until_eos(tokens, arch.eos_token_ids) for tokens in out]


def until_eos(tokens, eos_token_ids):
    ends = [i + 1 for i, token in enumerate(tokens) if token in eos_token_ids]
    return tokens[: ends[0]] if ends else tokens


def test_reference_logits_equal_transformers(tiny_folder):
    model = load_reference(tiny_folder)
    for prompt in random_prompts(3, seed=1):
        ours = reference.forward(model, prompt)
        theirs = transformers_logits(tiny_folder, prompt)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-4)


def test_greedy_tokens_equal_transformers(tiny_folder):
    prompts = random_prompts(16, seed=2)
    ours = generate(load_reference(tiny_folder), prompts, NEW_TOKENS)
    assert ours == [transformers_greedy(tiny_folder, prompt, NEW_TOKENS) for prompt in prompts]


def test_reference_greedy_equals_transformers(tiny_folders):
    folder = tiny_folders[DBRX]
    prompt = random_prompts(1, seed=3)[0]
    assert reference.greedy(load_reference(folder), prompt, 8) == transformers_greedy(folder, prompt, 8)


@pytest.mark.parametrize("family", ["mixtral", "dbrx"])
def test_random_weights_run_and_are_reproducible(family):
    arch = FAMILIES[family].published_architecture(tiny_arch(num_layers=2).spec)
    prompt = [5, 6, 7]
    one, same, other = (
        reference.forward(reference.load(FAMILIES[family], RandomWeights(seed), arch), prompt) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    assert 0.05 < one.std() < 20


def test_random_weights_leave_tokens_to_differ():
    """A norm scales them, and a bias, which all of them have in common, is nought."""
    norm, bias = torch.empty(5), torch.empty(5)
    RandomWeights().read_into("model.norm.weight", norm)
    RandomWeights().read_into("mlp.experts.gate_up_proj_bias", bias)
    assert norm.tolist() == [1] * 5
    assert bias.tolist() == [0] * 5
