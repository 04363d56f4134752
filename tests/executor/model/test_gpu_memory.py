"""What a layer has torch allocate on a GPU, counted storage by storage, against what is planned."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from executor import native
from executor.model import GpuKernels, PromptNumbers, RowNumbers, Workspace, decode_attention, dense_views, experts_in
from executor.model.gpu import grouped_gemm
from executor.model.kv_rows import dequantise, dequantised, quantise, row_dtype
from executor.model.softmax import Softmax
from hrm.formats import FORMATS, kv_format
from hrm.model_spec import load_model
from hrm.model_spec.workspace import workspace_bytes
from tests.executor.model.steps import post_attention, pre_attention
from tests.executor.runtime.queued_backend import flash
from tests.executor.tiny_models import tiny_arch

DTYPE = torch.bfloat16
TOKENS = 96
SHAPES = {name: load_model(name) for name in ("mixtral-8x7b", "dbrx", "qwen3-235b-a22b", "phi-3.5-moe")}


def counted_flash(query, key, value, cum_q, cum_k, max_q, *rest, **named):
    """Of what the fake allocates, only what the kernel does: its output and a float32 a query.

    Of single tokens whose heads share KV heads it copies the queries, and the output afterwards.
    """
    copies = 2 if max_q == 1 and query.shape[1] > key.shape[1] else 0
    copied = [torch.empty_like(query, memory_format=torch.contiguous_format) for _ in range(copies)]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    of_logits = torch.empty((query.shape[1], len(query)), dtype=torch.float32)
    with _disable_current_modes():
        found, sums = flash(query, key, value, cum_q, cum_k, max_q, *rest, **named)
        out.copy_(found)
        of_logits.copy_(sums)
    del copied
    return out, of_logits


KERNELS = {"plain": GpuKernels(), "fast": GpuKernels(counted_flash, grouped_gemm())}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operators made and that are still alive."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, torch.Tensor):
                storage = made.untyped_storage()
                if storage._cdata not in self.alive and storage._cdata not in given:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak_bytes = max(self.peak_bytes, sum(self.alive.values()))
        return result


def small(name):
    """A sixteenth of the model in every width, so that one layer takes no time."""
    spec = SHAPES[name]
    return tiny_arch(
        hidden_size=spec.hidden_size // 16,
        intermediate_size=spec.intermediate_size // 16,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=8,
        num_experts=spec.num_experts,
        experts_per_token=spec.experts_per_token,
    )


def weights(spec):
    torch.manual_seed(0)
    dense = dense_views(spec.layers[0], torch.randn(spec.layers[0].dense_parameters).to(DTYPE) * 0.1)
    flat = torch.randn(spec.num_experts * spec.expert_parameters).to(DTYPE) * 0.1
    half = spec.num_experts // 2 * spec.expert_parameters
    layer = spec.layers[0]
    return dense, experts_in(layer, flat[:half], 0) + experts_in(layer, flat[half:], spec.num_experts // 2)


@pytest.mark.parametrize("kernels", KERNELS.values(), ids=list(KERNELS))
@pytest.mark.parametrize("name", SHAPES)
def test_prefill_of_a_whole_chunk(name, kernels):
    arch = small(name)
    spec = arch.spec
    dense, experts = weights(spec)
    planned = workspace_bytes(spec, TOKENS, FORMATS["bfloat16"])
    workspace = Workspace(torch.empty(0, dtype=torch.uint8), of_torch=planned)
    hidden = torch.randn(TOKENS, spec.hidden_size).to(DTYPE)
    prompts = PromptNumbers.write(torch.empty(2 * TOKENS, dtype=torch.int64), [0] * 4, [TOKENS // 4] * 4)
    with torch.no_grad(), LiveBytes() as live:
        width = spec.query_size + 2 * spec.kv_size
        qkv = workspace.take((TOKENS, width), DTYPE)
        pre_attention(arch, hidden, dense, prompts.positions_T, qkv, workspace)
        attended = workspace.take((TOKENS, spec.query_size), DTYPE)
        kernels.prefill_attention(arch.spec.attention, qkv, prompts, [None] * 4, attended, workspace)
        x, routing = post_attention(arch, hidden, attended, dense, workspace)
        kernels.run_experts(x, routing, experts, hidden, workspace, rows_at_once=TOKENS, num_experts=spec.num_experts)
    assert live.peak_bytes <= planned
    assert live.peak_bytes >= 0.5 * planned


@pytest.mark.parametrize("kernels", KERNELS.values(), ids=list(KERNELS))
@pytest.mark.parametrize("requests", [TOKENS // 8, TOKENS])
@pytest.mark.parametrize("name", SHAPES)
def test_decode_of_a_micro_batch(name, kernels, requests):
    arch = small(name)
    spec = arch.spec
    dense, experts = weights(spec)
    planned = workspace_bytes(spec, TOKENS, FORMATS["bfloat16"])
    workspace = Workspace(torch.empty(0, dtype=torch.uint8), of_torch=planned)
    hidden = torch.randn(requests, spec.hidden_size).to(DTYPE)
    qkv = torch.randn(requests, spec.query_size + 2 * spec.kv_size).to(DTYPE)
    attended = torch.randn(requests, spec.query_size).to(DTYPE)
    cache = torch.randn(requests * 16, 2, spec.num_kv_heads, spec.head_dim).to(DTYPE)
    there, starts = torch.zeros(5 * requests, dtype=torch.int64), list(range(0, 16 * requests, 16))
    rows = RowNumbers(torch.zeros(requests), torch.zeros(requests), starts, [16] * requests)
    rows.write(there)
    rows = rows.at(there)
    with torch.no_grad(), LiveBytes() as live:
        pre_attention(arch, hidden, dense, rows.positions_R, qkv, workspace)
        kernels.decode_attention(arch.spec.attention, qkv, cache, rows, attended, spare_bytes=planned // 2)
        x, routing = post_attention(arch, hidden, attended, dense, workspace)
        kernels.run_experts(x, routing, experts, hidden, workspace, rows_at_once=TOKENS, num_experts=spec.num_experts)
    assert live.peak_bytes <= planned


@pytest.mark.parametrize("form", ["fp8", "int8"])
@pytest.mark.parametrize("name", SHAPES)
def test_quantising_a_whole_chunk(name, form):
    arch = small(name)
    spec, block = arch.spec, arch.spec.attention
    dense, _ = weights(spec)
    planned = workspace_bytes(spec, TOKENS, FORMATS["bfloat16"])
    workspace = Workspace(torch.empty(0, dtype=torch.uint8), of_torch=planned)
    hidden = torch.randn(TOKENS, spec.hidden_size).to(DTYPE)
    rows = cache_of(block, form, TOKENS)
    with torch.no_grad(), LiveBytes() as live:
        qkv = workspace.take((TOKENS, spec.query_size + 2 * spec.kv_size), DTYPE)
        pre_attention(arch, hidden, dense, torch.arange(TOKENS), qkv, workspace)
        quantise(qkv[:, spec.query_size :], block.cached_parts, rows)
        dequantise(rows, block.cached_parts, qkv[:, spec.query_size :])
    assert live.peak_bytes <= planned


def cache_of(block, form, tokens):
    found = kv_format(form)
    assert found is not None
    return torch.zeros(tokens, int(found.row_bytes(block.cached_parts)), dtype=torch.uint8).view(
        row_dtype(found, torch.float32)
    )


@pytest.mark.parametrize("form", ["fp8", "int8"])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("spare_bytes", [20_000, 60_000, 10**7])
def test_attention_to_codes_needs_no_more_than_there_is(spare_bytes, sinks, form):
    """Whatever is computed at once, it is attention to what the codes mean, and one softmax over all tokens."""
    torch.manual_seed(0)
    block = tiny_arch(num_heads=6, num_kv_heads=2, head_dim=16).spec.attention
    lengths, starts = [70, 1, 33, 128], [0, 80, 90, 130]
    cache = cache_of(block, form, 260)
    quantise(torch.randn(260, block.cached_elements), block.cached_parts, cache)
    softmax = Softmax(sinks_H=torch.randn(6) if sinks else None)
    qkv, got, wanted = (torch.randn(4, block.query_size) for _ in range(3))
    rows = RowNumbers(torch.zeros(4), torch.zeros(4), starts, lengths)
    there = torch.zeros(5 * 4, dtype=torch.int64)
    rows.write(there)
    with torch.no_grad(), LiveBytes() as live:
        GpuKernels().decode_attention(block, qkv, cache, rows.at(there), got, spare_bytes=spare_bytes, softmax=softmax)
    assert live.peak_bytes <= spare_bytes
    numbers = dequantised(cache, block.cached_parts, torch.float32).view(-1, *block.cached_shape)
    with native.using(None):
        decode_attention(block, qkv, numbers, starts, lengths, wanted, softmax)
    torch.testing.assert_close(got, wanted)


def test_live_bytes_are_those_alive():
    with LiveBytes() as live:
        a = torch.ones(100)
        b = a + 1
        del a
        c = b.view(10, 10).mul_(2)
        d = c * 2
    assert live.peak_bytes == 800
    assert sum(live.alive.values()) == 800
    del b, c, d
    assert sum(live.alive.values()) == 0
