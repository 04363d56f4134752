"""The GPU's kernels at the sizes of runs, in bfloat16 against float32 on the host; on a card where there is one."""

import pytest
import torch

from executor.backends.cuda import kernels_of
from executor.model import (
    Experts,
    GpuKernels,
    PromptNumbers,
    Routing,
    RowNumbers,
    Workspace,
    decode_attention,
    experts_in,
    prefill_attention,
)
from tests.executor.model.tolerances import assert_same
from tests.executor.reference import dequantised
from tests.executor.runtime.queued_backend import flash, grouped
from tests.executor.tiny_models import tiny_arch

CARD = pytest.param(
    "cuda:0", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)
HOST = "cpu"


@pytest.fixture(params=[HOST, CARD])
def device(request):
    torch.manual_seed(0)
    with torch.no_grad():
        yield request.param


def kernels(device) -> GpuKernels:
    """A card's own; on the host slow ones that are as strict."""
    if device == HOST:
        return GpuKernels(flash, grouped)
    return kernels_of(torch.cuda.get_device_capability(device))


def workspace(device):
    return Workspace(torch.empty(0, dtype=torch.uint8, device=device), of_torch=10**8)


@pytest.mark.parametrize("requests", [1, 33])
def test_decode_attention_of_a_micro_batch(device, requests):
    block = tiny_arch(num_heads=8, num_kv_heads=2, head_dim=64).spec.attention
    lengths = torch.randint(1, 140, (requests,)).tolist()
    starts = [144 * r for r in range(requests)]
    cache, qkv = torch.randn(144 * requests, 2, 2, 64).bfloat16(), torch.randn(requests, 12 * 64).bfloat16()
    rows = RowNumbers(torch.arange(requests), torch.arange(requests), starts, lengths)
    flat = torch.full((5 * requests,), -1)
    rows.write(flat)
    got = torch.full((requests, 8 * 64), torch.nan, dtype=torch.bfloat16, device=device)
    there = rows.at(flat.to(device))
    kernels(device).decode_attention(block, qkv.to(device), cache.to(device), there, got, spare_bytes=10**8)
    wanted = torch.empty(requests, 8 * 64)
    decode_attention(block, qkv.float(), cache.float(), starts, lengths, wanted)
    assert_same(got.cpu(), wanted)


@pytest.mark.parametrize("lengths", [[77, 60, 1, 200], [300]])
def test_prefill_attention_of_a_chunk(device, lengths):
    block = tiny_arch(num_heads=8, num_kv_heads=2, head_dim=64).spec.attention
    qkv = torch.randn(sum(lengths), 12 * 64).bfloat16()
    prompts = PromptNumbers.write(torch.empty(2 * sum(lengths) + 9, dtype=torch.int64), [0] * len(lengths), lengths)
    got = torch.full((len(qkv), 8 * 64), torch.nan, dtype=torch.bfloat16, device=device)
    none = [None] * len(lengths)
    there = prompts.at(prompts.flat.to(device))
    kernels(device).prefill_attention(block, qkv.to(device), there, none, got, workspace(device))
    wanted = torch.empty(len(qkv), 8 * 64)
    prefill_attention(block, qkv.float(), lengths, none, wanted, Workspace(torch.empty(10**8, dtype=torch.uint8)))
    assert_same(got.cpu(), wanted)


@pytest.mark.parametrize("rows_at_once", [200, 10**4])
@pytest.mark.parametrize(("tokens", "resident"), [(5, 0), (84, 3), (500, 3)])
def test_experts_at_decode_and_prefill_sizes(device, tokens, resident, rows_at_once):
    """Two stacks, and one expert that no token goes to."""
    spec = tiny_arch(num_experts=8, experts_per_token=2, hidden_size=128, intermediate_size=192).spec
    flat = (torch.randn(8 * spec.expert_parameters) * 0.05).bfloat16()
    at = resident * spec.expert_parameters
    parts = [(flat[:at], 0), (flat[at:], resident)] if resident else [(flat, 0)]
    x, experts = torch.randn(tokens, 128).bfloat16(), torch.stack([torch.randperm(7)[:2] for _ in range(tokens)])
    weights = torch.rand(tokens, 2).softmax(1)
    routing = Routing(weights.to(device), experts.to(device))
    stacks = [stack for part, first in parts for stack in experts_in(spec.layers[0], part.to(device), first).stacks]
    got = torch.zeros(tokens, 128, dtype=torch.bfloat16, device=device)
    counts = kernels(device).run_experts(
        x.to(device),
        routing,
        Experts(stacks=tuple(stacks)),
        got,
        workspace(device),
        rows_at_once=rows_at_once,
        num_experts=8,
    )
    wanted = torch.zeros(tokens, 128)
    (whole,) = experts_in(spec.layers[0], flat.float(), 0).stacks
    for e in range(8):
        w13, w2 = dequantised(whole.w13_E2ID[e]), dequantised(whole.w2_EDI[e])
        gate, up = (x.float() @ w13.T).chunk(2, dim=1)
        output = (torch.nn.functional.silu(gate) * up) @ w2.T
        wanted += (weights * (experts == e)).sum(1, keepdim=True) * output
    assert_same(got.cpu(), wanted)
    assert counts.tolist() == experts.flatten().bincount(minlength=8).tolist()
