"""The GPU's kernels on CPU tensors, against the functions that the host computes with."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from executor.model import (
    Experts,
    Glu,
    GpuKernels,
    PromptNumbers,
    Routing,
    RowNumbers,
    Workspace,
    decode_attention,
    experts_in,
    prefill_attention,
    run_experts,
)
from executor.model.gpu import grouped_gemm
from executor.model.numbers import RowViews
from executor.native.experts import SILU
from tests.executor.model.steps import route
from tests.executor.model.tolerances import assert_same, name_of
from tests.executor.reference import dequantised
from tests.executor.runtime.device_tensor import DeviceTensor, WithDevice, waits
from tests.executor.runtime.queued_backend import flash, grouped
from tests.executor.tiny_models import tiny_arch

KERNELS = {"plain": GpuKernels(), "fast": GpuKernels(flash, grouped)}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def workspace():
    return Workspace(torch.empty(10**7, dtype=torch.uint8))


def prompts(lengths):
    return PromptNumbers.write(torch.empty(99, dtype=torch.int64), [0] * len(lengths), lengths)


def run(kernels, x, routing, stacks, out, *, rows_at_once, num_experts, glu=SILU):
    experts = Experts(stacks=tuple(stacks))
    return kernels.run_experts(
        x, routing, experts, out, workspace(), rows_at_once=rows_at_once, num_experts=num_experts, glu=glu
    )


@pytest.fixture(params=DTYPES, ids=name_of)
def dtype(request):
    return request.param


@pytest.fixture(params=KERNELS.values(), ids=list(KERNELS))
def kernels(request):
    return request.param


@pytest.mark.parametrize("spare_bytes", [1, 2000, 10**6])
def test_decode_attention(kernels, dtype, spare_bytes):
    arch = tiny_arch(num_heads=6, num_kv_heads=2, head_dim=16)
    spec = arch.spec
    starts, lengths = [0, 16, 48, 112], [3, 17, 16, 1]
    cache = torch.randn(128, 2, 2, 16).to(dtype)
    for start, length in zip(starts, lengths, strict=True):
        cache[start + length : start + length + 8] = torch.nan  # never written on a card
    qkv = torch.randn(4, spec.query_size + 2 * spec.kv_size).to(dtype)
    there, rows = torch.full((20,), -1), RowNumbers(torch.arange(4), torch.arange(4), starts, lengths)
    rows.write(there)
    got, wanted = (torch.full((4, spec.query_size), torch.nan, dtype=dtype) for _ in range(2))
    kernels.decode_attention(
        arch.spec.attention, qkv, cache, kernels.numbers(rows, there), got, spare_bytes=spare_bytes
    )
    decode_attention(arch.spec.attention, qkv, cache, starts, lengths, wanted)
    assert_same(got, wanted)


@pytest.mark.parametrize("count", [1, 2, 3, 100])
def test_numbers_do_not_overlap_and_fit(count):
    flat = torch.zeros(5 * count, dtype=torch.int64)
    views = RowViews.of(flat, count)
    parts = (views.positions_R, views.cache_rows_R, views.starts, views.lengths_R, views.queries)
    for value, part in enumerate(parts, start=1):
        part.fill_(value)
    assert [part.unique().tolist() for part in parts] == [[1], [2], [3], [4], [5]]
    assert [len(part) for part in parts] == [count, count, count + 1, count, count + 1]


@pytest.mark.parametrize("earlier", [0, 7])
@pytest.mark.parametrize("lengths", [[5, 1, 9], [15]])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
def test_prefill_attention(kernels, dtype, heads, lengths, earlier):
    arch = tiny_arch(num_heads=heads[0], num_kv_heads=heads[1], head_dim=8)
    qkv = torch.randn(15, (heads[0] + 2 * heads[1]) * 8).to(dtype)
    got, wanted = (torch.full((15, heads[0] * 8), torch.nan, dtype=dtype) for _ in range(2))
    caches = [torch.randn(length, 2, heads[1], 8).to(dtype) for length in lengths]
    caches[0] = torch.randn(lengths[0] + earlier, 2, heads[1], 8).to(dtype)
    ours = [cache.clone() for cache in caches[:-1]] + [caches[-1].clone() if earlier else None]
    theirs = [cache.clone() for cache in caches[:-1]] + [caches[-1].clone() if earlier else None]
    kernels.prefill_attention(arch.spec.attention, qkv, prompts(lengths), ours, got, workspace())
    prefill_attention(arch.spec.attention, qkv, lengths, theirs, wanted, workspace())
    assert_same(got, wanted)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine is None) == (other is None)
        assert mine is None or other is None or torch.equal(mine, other)


@pytest.mark.parametrize("others", [[7], [4, 7], [1], [1, 1]])
def test_a_prompt_takes_over_the_buffer_of_one_that_ends(kernels, dtype, others):
    """As chunks of split prompts have it: what is read of the one is there until it was read."""
    arch = tiny_arch(num_heads=4, num_kv_heads=2, head_dim=8)
    lengths = [5, *others]
    qkv = torch.randn(sum(lengths), 8 * 8).to(dtype)
    prefix = torch.randn(12, 2, 2, 8).to(dtype)

    def attended(attend, prompts):
        buffer, out = prefix.clone(), torch.full((len(qkv), 4 * 8), torch.nan, dtype=dtype)
        caches = [buffer, *[None] * len(others[1:]), buffer[: lengths[-1]]]
        attend(arch.spec.attention, qkv, prompts, caches, out, workspace())
        return out, buffer

    got, left = attended(kernels.prefill_attention, prompts(lengths))
    wanted, right = attended(prefill_attention, lengths)
    assert_same(got, wanted)
    assert torch.equal(left, right)


def test_plain_kernels_are_asked_for_what_every_gpu_has(dtype, monkeypatch):
    """Grouped heads not all have: with them, keys are copied or masks and scores made."""
    asked = []

    def record(query, key, value, **named):
        asked.append((query.shape[1] == key.shape[1] == value.shape[1], set(named)))
        return scaled_dot_product_attention(query, key, value, **named)

    for module in ("gpu", "attention"):
        monkeypatch.setattr(f"executor.model.{module}.scaled_dot_product_attention", record)
    arch = tiny_arch(num_heads=6, num_kv_heads=2, head_dim=8)
    lengths, qkv = [5, 3], torch.randn(8, 10 * 8).to(dtype)
    cache, wanted = torch.randn(12, 2, 2, 8).to(dtype), torch.empty(8, 6 * 8, dtype=dtype)
    got = DeviceTensor(torch.empty_like(wanted))
    ours = [DeviceTensor(cache.clone()), None]
    with WithDevice():
        there = prompts(lengths).at(DeviceTensor(prompts(lengths).flat))
        GpuKernels().prefill_attention(arch.spec.attention, DeviceTensor(qkv.clone()), there, ours, got, workspace())
    assert asked == [(True, {"attn_mask", "scale"}), (True, {"is_causal", "scale"})]
    monkeypatch.undo()
    prefill_attention(arch.spec.attention, qkv, lengths, [cache, None], wanted, workspace())
    assert_same(got.cpu(), wanted)


@pytest.mark.parametrize("rows_at_once", [3, 20, 1000])
@pytest.mark.parametrize("resident", [0, 2, 5])
@pytest.mark.parametrize("chosen", ["all", "on the gpu", "streamed"])
def test_experts(kernels, dtype, rows_at_once, resident, chosen):
    arch = tiny_arch(num_experts=5, experts_per_token=3)
    spec = arch.spec
    flat = torch.randn(5 * spec.expert_parameters).to(dtype) * 0.2
    at = resident * spec.expert_parameters
    stacks = [*experts_in(spec.layers[0], flat[:at], 0).stacks] if resident else []
    stacks += [*experts_in(spec.layers[0], flat[at:], resident).stacks] if resident < 5 else []
    if chosen == "on the gpu":
        stacks = [stack for stack in stacks if stack.first == 0 and resident]
    elif chosen == "streamed":
        stacks = [stack for stack in stacks if stack.first == resident]
    x = torch.randn(20, spec.hidden_size).to(dtype)
    router = torch.randn(5, spec.hidden_size).to(dtype)
    router[3] = -100 * x.float().mean(0)  # an expert that gets next to none
    routing = route(arch, x, router)
    hidden = torch.randn(20, spec.hidden_size).to(dtype)
    got, wanted = hidden.clone(), hidden.float()
    counts = run(kernels, x, routing, stacks, got, rows_at_once=rows_at_once, num_experts=5)
    for stack in stacks:
        for e in range(len(stack.w13_E2ID)):
            w13, w2 = dequantised(stack.w13_E2ID[e]).float(), dequantised(stack.w2_EDI[e]).float()
            gate, up = (x.float() @ w13.T).chunk(2, dim=1)
            output = (torch.nn.functional.silu(gate) * up) @ w2.T
            weight = (routing.weights_TK * (routing.experts_TK == stack.first + e)).sum(1)
            wanted += weight.unsqueeze(1) * output
    assert_same(got, wanted)
    assert counts.tolist() == routing.experts_TK.flatten().bincount(minlength=5).tolist()


def on_a_device(stack):
    assert isinstance(stack.w13_E2ID, torch.Tensor)
    assert isinstance(stack.w2_EDI, torch.Tensor)
    return replace(stack, w13_E2ID=DeviceTensor(stack.w13_E2ID), w2_EDI=DeviceTensor(stack.w2_EDI))


@pytest.mark.parametrize("rows_at_once", [30, 1000])
@pytest.mark.parametrize("resident", [1, 4])
def test_of_many_rows_each_stack_computes_its_own_alone(rows_at_once, resident, monkeypatch):
    """Where they end is read back once; of few rows it is not, and the tokens are the same."""
    spec = tiny_arch(num_experts=5, experts_per_token=3).spec
    flat = torch.randn(5 * spec.expert_parameters).bfloat16() * 0.2
    at = resident * spec.expert_parameters
    parts = [(flat[at:], resident), (flat[:at], 0)]
    stacks = [stack for part, first in parts for stack in experts_in(spec.layers[0], part, first).stacks]
    scores = torch.rand(20, 5)
    scores[:, 4] = 0  # nobody goes there
    x, routing = torch.randn(20, spec.hidden_size).bfloat16(), Routing(*scores.topk(3))
    rows, grouped = [], grouped_gemm()

    def computed(*given, **named):
        rows.append(len(given[0]))
        return grouped(*given, **named)

    def on_device(least_bytes):
        monkeypatch.setattr("executor.model.gpu.WORTH_COUNTING_BYTES", least_bytes)
        there = [on_a_device(stack) for stack in stacks]
        given = DeviceTensor(x.clone()), Routing(*map(DeviceTensor, (routing.weights_TK, routing.experts_TK)))
        out = DeviceTensor(torch.zeros_like(x))
        waits.clear()
        rows.clear()
        with WithDevice():
            run(GpuKernels(None, computed), *given, there, out, rows_at_once=rows_at_once, num_experts=5)
        return out.cpu(), [wait.function for wait in waits[:-1]], sum(rows[::2])

    without, none, all_rows = on_device(2**40)
    counted, once, own_rows = on_device(1)
    assert (none, once) == ([], ["run_experts"])
    assert all_rows == 2 * 60
    assert 60 <= own_rows <= 60 + len(stacks)
    assert torch.equal(counted, without)


@pytest.mark.parametrize("rows_at_once", [7, 1000])
def test_weights_may_multiply_the_input_of_experts(kernels, dtype, rows_at_once):
    spec = tiny_arch(num_experts=5, experts_per_token=3).spec
    flat = torch.randn(5 * spec.expert_parameters).to(dtype) * 0.2
    experts = experts_in(spec.layers[0], flat, 0)
    x, out = torch.randn(20, spec.hidden_size).to(dtype), torch.zeros(20, spec.hidden_size, dtype=dtype)
    routing = Routing(*torch.rand(20, 5).topk(3))
    glu = Glu(weight_on_input=True)
    run(kernels, x, routing, experts.stacks, out, rows_at_once=rows_at_once, num_experts=5, glu=glu)
    wanted = torch.zeros(20, spec.hidden_size)
    for index, expert in experts.each:
        weight_T1 = (routing.weights_TK * (routing.experts_TK == index)).sum(1, keepdim=True)
        gate, up = ((weight_T1 * x.float()) @ dequantised(expert.w13).float().T).chunk(2, dim=1)
        wanted += (torch.nn.functional.silu(gate) * up) @ dequantised(expert.w2).float().T
    assert_same(out, wanted)


@pytest.mark.parametrize("rows_at_once", [7, 20, 59])
def test_experts_never_add_two_rows_to_a_token_at_once(kernels, rows_at_once, monkeypatch):
    """On a card such sums come in any order: none of the operators may have to."""
    for name in ("index_add_", "scatter_add_", "index_put_"):
        real = getattr(torch.Tensor, name)

        def checked(self, *args, real=real, **named):
            assert not self.is_floating_point()
            return real(self, *args, **named)

        monkeypatch.setattr(torch.Tensor, name, checked)
    arch = tiny_arch(num_experts=5, experts_per_token=3)
    spec = arch.spec
    stack = experts_in(spec.layers[0], torch.randn(5 * spec.expert_parameters).bfloat16() * 0.2, 0).stacks[0]
    x = torch.randn(20, spec.hidden_size).bfloat16()
    routing = route(arch, x, torch.randn(5, spec.hidden_size).bfloat16())
    results = []
    for _ in range(2):
        results.append(torch.ones_like(x))
        run(kernels, x, routing, [stack], results[-1], rows_at_once=rows_at_once, num_experts=5)
    assert torch.equal(*results)
    some = torch.ones_like(x)
    run(kernels, x, routing, [stack], some, rows_at_once=1000, num_experts=5)
    assert_same(results[0], some.float())


def test_experts_of_no_tokens(kernels):
    arch = tiny_arch()
    stack = experts_in(arch.spec.layers[0], torch.randn(4 * arch.spec.expert_parameters), 0).stacks[0]
    nothing = torch.empty(0, arch.spec.hidden_size)
    routing = Routing(torch.empty(0, 2), torch.empty(0, 2, dtype=torch.int64))
    counts = run(kernels, nothing, routing, [stack], nothing.clone(), rows_at_once=4, num_experts=4)
    assert counts.tolist() == [0] * 4


def test_what_is_not_aligned_is_left_to_other_kernels():
    """A grouped GEMM on a card refuses it; every expert's own does not."""
    refused = GpuKernels(grouped=lambda *_args, **_rest: pytest.fail("not aligned"))
    arch = tiny_arch(hidden_size=12)
    stack = experts_in(arch.spec.layers[0], torch.randn(4 * arch.spec.expert_parameters).bfloat16(), 0).stacks[0]
    x = torch.randn(6, 12).bfloat16()
    routing = route(arch, x, torch.randn(4, 12).bfloat16())
    run(refused, x, routing, [stack], x.clone(), rows_at_once=99, num_experts=4)


def test_stack_is_its_experts(dtype):
    spec = tiny_arch().spec
    flat = torch.randn(3 * spec.expert_parameters).to(dtype)
    stack = experts_in(spec.layers[0], flat, 1).stacks[0]
    assert stack.w13_E2ID.shape == (3, 2 * spec.intermediate_size, spec.hidden_size)
    assert stack.w2_EDI.shape == (3, spec.hidden_size, spec.intermediate_size)
    last = dequantised(stack.w2_EDI[2])
    assert last.data_ptr() == flat[-last.numel() :].data_ptr()
    out, x = torch.zeros(2, spec.hidden_size, dtype=dtype), torch.randn(2, 16).to(dtype)
    routing = Routing(torch.ones(2, 1), torch.tensor([[1], [3]]))
    from executor.model import expert_views

    experts = [(1 + e, expert_views(spec.layers[0], part)) for e, part in enumerate(flat.chunk(3))]
    run_experts(x, routing, experts, out, workspace())
    got = torch.zeros_like(out)
    run(GpuKernels(), x, routing, [stack], got, rows_at_once=8, num_experts=4)
    assert_same(got, out)
