"""Each function of a layer against the reference, and its temporaries against the plan."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from executor import native
from executor.model import (
    HeadWeights,
    NormKind,
    Router,
    Routing,
    Scores,
    Workspace,
    attention,
    decode_attention,
    dense_views,
    expert_views,
    logits,
    normed,
    prefill_attention,
    run_experts,
)
from executor.model.crossings import assumed
from executor.model.mixers.grouped_query import append_kv
from executor.model.numbers import Reach
from executor.model.softmax import Softmax
from hrm.contract.rows import LOGIT_BYTES
from hrm.contract.temporaries import MASK_BLOCK_TOKENS
from hrm.formats import FORMATS
from hrm.model_spec.workspace import workspace_bytes
from tests.executor import reference
from tests.executor.model.steps import post_attention, pre_attention
from tests.executor.model.tolerances import DTYPES, assert_same, name_of
from tests.executor.tiny_models import tiny_arch

ARCHS = {
    "mixtral": tiny_arch(),
    "one kv head": tiny_arch(num_kv_heads=1, head_dim=12),
    "dbrx": tiny_arch(NormKind.LAYER, clip=0.5, router=Router(norm=2.0), rope_theta=5e5),
    "weights as they are": tiny_arch(router=Router(norm=None), experts_per_token=4),
    "sigmoid": tiny_arch(router=Router(scores=Scores.SIGMOID)),
}

archs = st.builds(
    tiny_arch,
    st.sampled_from(NormKind),
    hidden_size=st.integers(1, 40),
    intermediate_size=st.integers(1, 40),
    num_heads=st.sampled_from([4, 8]),
    num_kv_heads=st.sampled_from([1, 2, 4]),
    head_dim=st.sampled_from([2, 6, 16]),
    num_experts=st.sampled_from([4, 9]),
    experts_per_token=st.integers(1, 4),
)


def big_workspace():
    return Workspace(torch.empty(4_000_000, dtype=torch.uint8))


def planned_workspace(arch, num_tokens, dtype):
    num_bytes = workspace_bytes(arch.spec, num_tokens, FORMATS[name_of(dtype)])
    return Workspace(torch.empty(int(num_bytes), dtype=torch.uint8))


def random_dense(arch, dtype=torch.float32):
    flat = torch.randn(arch.spec.layers[0].dense_parameters) * arch.spec.hidden_size**-0.5
    return dense_views(arch.spec.layers[0], flat.to(dtype))


def random_experts(arch, dtype=torch.float32):
    scale = arch.spec.hidden_size**-0.5
    size = arch.spec.expert_parameters
    return [
        expert_views(arch.spec.layers[0], (torch.randn(size) * scale).to(dtype)) for _ in range(arch.spec.num_experts)
    ]


def as_float(weights: Any) -> Any:
    if weights is None or isinstance(weights, torch.Tensor):
        return weights if weights is None else weights.float()
    return type(weights)(**{name: as_float(getattr(weights, name)) for name in weights.__dataclass_fields__})


def random_routing(arch, num_tokens):
    scores = torch.rand(num_tokens, arch.spec.num_experts)
    weights, experts = scores.topk(arch.spec.experts_per_token)
    return Routing(weights, experts)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=ARCHS)
def arch(request):
    return ARCHS[request.param]


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(arch, dtype):
    x, weight = (torch.randn(7, 16) * 3 + 1).to(dtype), torch.rand(16).to(dtype)
    before = x.clone()
    fast = normed(arch.final_norm, x, weight, big_workspace())
    assert_same(fast, reference.norm(arch.final_norm, x.float(), weight.float()))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pre_attention(arch, dtype):
    spec, dense = arch.spec, random_dense(arch, dtype)
    x, positions = torch.randn(9, 16).to(dtype), torch.tensor([0, 1, 2, 0, 1, 63, 64, 700, 4095])
    qkv = torch.empty(9, spec.query_size + 2 * spec.kv_size, dtype=dtype)
    pre_attention(arch, x, dense, positions, qkv, big_workspace())
    slow = as_float(dense.mixer)
    x_normed = reference.norm(arch.final_norm, x.float(), slow.attention_norm)
    parts = reference.queries_keys_values(arch.layers[0].mixer, x_normed, slow, positions)
    exact = torch.cat([part.flatten(1) for part in parts], dim=1)
    if dtype is torch.float32:
        exact_enough = 3e-4  # float32 angles at position 4095
        torch.testing.assert_close(qkv, exact, rtol=0, atol=exact_enough)
    else:
        assert_same(qkv, exact)


def test_clip_bounds_queries_keys_and_values():
    arch = tiny_arch(clip=0.1)
    qkv = torch.empty(3, 64)
    dense = random_dense(arch)
    pre_attention(arch, torch.randn(3, 16) * 9, dense, torch.zeros(3).long(), qkv, big_workspace())
    assert qkv.abs().max().item() == pytest.approx(0.1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_attention(arch, dtype):
    spec, lengths = arch.spec, [5, 1, 33, 2]
    qkv = torch.randn(sum(lengths), spec.query_size + 2 * spec.kv_size).to(dtype)
    out = torch.empty(sum(lengths), spec.query_size, dtype=dtype)
    prefill_attention(arch.spec.attention, qkv, lengths, [None] * 4, out, big_workspace())
    exact = [reference.attention(*split_heads(arch, part.float())) for part in qkv.split(lengths)]
    assert_same(out, torch.cat(exact))


MEMORY, OTHER = 0, 1
IN_TURN = ((MEMORY, 0, 5), (MEMORY, 5, 1), (MEMORY, 6, 33), (MEMORY, 39, 2))
APART = ((MEMORY, 90, 5), (MEMORY, 20, 1), (MEMORY, 100, 33), (MEMORY, 0, 2))


@pytest.mark.skipif(not native.paths(), reason="the native kernels are not built")
@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize(
    ("places", "num_calls"),
    [
        (IN_TURN, 1),
        (APART, 1),
        (((MEMORY, 60, 14), *APART[1:]), 2),  # nine tokens of the first prompt came before
        ((*APART[:2], None, APART[3]), 2),
        ((APART[0], (OTHER, 3, 1), APART[2], (OTHER, 0, 2)), 4),
    ],
)
def test_prompts_whose_caches_lie_in_the_same_memory_are_one_call(monkeypatch, places, num_calls, window):
    """Bit by bit as one by one; those without a cache, or with earlier tokens, are by themselves."""
    arch, calls = tiny_arch(num_kv_heads=2, head_dim=16), []
    lengths, softmax, attend = [5, 1, 33, 2], Softmax(reach=Reach(window)), native.Kernels.decode_attention
    monkeypatch.setattr(native.Kernels, "decode_attention", lambda *given: (calls.append(given), attend(*given)))
    qkv = torch.randn(sum(lengths), arch.spec.query_size + 2 * arch.spec.kv_size)
    before = [torch.randn(200, 2, 2, 16) for _ in (MEMORY, OTHER)]

    def attended(several: list[slice]) -> list[torch.Tensor]:
        memories, out = [memory.clone() for memory in before], torch.empty(len(qkv), arch.spec.query_size)
        caches = [None if at is None else memories[at[0]][at[1] : sum(at[1:])] for at in places]
        for some in several:
            rows = slice(sum(lengths[: some.start]), sum(lengths[: some.stop]))
            given = qkv[rows], lengths[some], caches[some], out[rows]
            prefill_attention(arch.spec.attention, *given, big_workspace(), softmax)
        return [out, *memories]

    with assumed(300):
        together = attended([slice(0, 4)])
        assert len(calls) == num_calls
        alone = attended([slice(number, number + 1) for number in range(4)])
    assert all(map(torch.equal, together, alone))


@settings(max_examples=60, deadline=None)
@given(
    arch=archs,
    cuts=st.lists(st.integers(1, 299), max_size=5, unique=True).map(sorted),
    form=st.sampled_from(["native", "in blocks", "by one mask"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_a_prompt_in_parts_is_attended_over_as_a_whole(arch, cuts, form, dtype, seed):
    """All forms, that of other devices than the CPU too; beside another prompt in every chunk."""
    torch.manual_seed(seed)
    spec, width = arch.spec, arch.spec.query_size + 2 * arch.spec.kv_size
    qkv, other = torch.randn(300, width).to(dtype), torch.randn(5, width).to(dtype)
    exact = reference.attention(*split_heads(arch, qkv.float()))
    exact_other = reference.attention(*split_heads(arch, other.float()))
    cache = torch.full((302, 2, spec.num_kv_heads, spec.head_dim), 1e4).to(dtype)
    kernels = native.kernels() if form == "native" else None
    with native.using(kernels), pytest.MonkeyPatch.context() as patch:
        if form == "by one mask":
            patch.setattr(
                attention,
                "_after_prefix_in_blocks",
                lambda q, cache, out, _, scale: attention._after_prefix(q, cache, out, scale),
            )
        for first, last in pairwise([0, *cuts, 300]):
            chunk, lengths = torch.cat([qkv[first:last], other]), [last - first, 5]
            out = torch.empty(len(chunk), spec.query_size, dtype=dtype)
            kept = [cache[1 : last + 1], None]
            prefill_attention(arch.spec.attention, chunk, lengths, kept, out, big_workspace())
            assert_same(out, torch.cat([exact[first:last], exact_other]))
    assert torch.equal(cache[1:301].flatten(1), qkv[:, spec.query_size :])
    assert (cache[[0, 301]] == torch.tensor(1e4).to(dtype)).all()


def test_contexts_for_which_torch_is_faster_are_its_own(monkeypatch):
    """The results are alike on both sides."""
    arch, seen = tiny_arch(num_kv_heads=2, head_dim=8), []
    width = arch.spec.query_size + 2 * arch.spec.kv_size
    attend = native.Kernels.decode_attention
    monkeypatch.setattr(
        native.Kernels,
        "decode_attention",
        lambda self, qkv, cache, starts, lengths, out, *how: (
            seen.append(len(cache)),
            attend(self, qkv, cache, starts, lengths, out, *how),
        ),
    )
    for context in (300, 301):
        qkv, cache = torch.randn(7, width), torch.randn(context, 2, 2, 8)
        out, exact = torch.empty(2, 7, arch.spec.query_size)
        with assumed(300):
            prefill_attention(arch.spec.attention, qkv, [7], [cache], out, big_workspace())
        with native.using(None):
            prefill_attention(arch.spec.attention, qkv, [7], [cache], exact, big_workspace())
        assert_same(out, exact)
    assert seen == ([300] if native.kernels() is not None else [])


@pytest.mark.parametrize("prefix", [1, 500, 8000])
def test_attention_after_a_prefix_takes_no_more_than_was_planned(prefix):
    """A second output, as without; the mask is a line of the workspace, not all tokens by all."""
    arch = tiny_arch(num_heads=16, num_kv_heads=4, head_dim=32)
    spec, tokens, size = arch.spec, 300, 4
    qkv = torch.randn(tokens, spec.query_size + 2 * spec.kv_size)
    out = torch.empty(tokens, spec.query_size)
    cache = torch.randn(prefix + tokens, 2, spec.num_kv_heads, spec.head_dim)

    workspace = big_workspace()

    def work(kept):
        with native.using(None):
            prefill_attention(arch.spec.attention, qkv, [tokens], [kept], out, workspace)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        without, with_prefix = (peak_bytes(work, kept) for kept in (None, cache))
    finally:
        torch.set_num_threads(threads)
    assert without >= out.nbytes
    assert with_prefix <= without
    assert workspace.high_water_bytes == (prefix + tokens + MASK_BLOCK_TOKENS) * size


@pytest.mark.parametrize("tokens", [1, 3, 200])
@pytest.mark.parametrize("prefix", [1, 500, 20_000])
def test_the_line_of_a_mask_fits_the_planned_workspace(prefix, tokens):
    arch = tiny_arch()
    spec = arch.spec
    planned = workspace_bytes(spec, tokens, FORMATS["float32"], longest_tokens=prefix + tokens)
    workspace = Workspace(torch.empty(int(planned), dtype=torch.uint8))
    width = spec.query_size + 2 * spec.kv_size
    qkv = workspace.take((tokens, width), torch.float32).normal_()
    out = workspace.take((tokens, spec.query_size), torch.float32)
    cache = torch.randn(prefix + tokens, 2, spec.num_kv_heads, spec.head_dim)
    held = workspace.mark()
    with native.using(None):
        prefill_attention(arch.spec.attention, qkv, [tokens], [cache], out, workspace)
    assert workspace.mark() == held
    assert workspace.high_water_bytes + out.nbytes <= planned, "torch has a second output"


def peak_bytes(work, *args):
    """The most that torch had allocated at once, the buffers of its kernels included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work(*args)
    in_use = peak = 0
    profiler: Any = profiled.profiler
    for event in profiler.kineto_results.events():
        if event.name() == "[memory]":
            in_use += event.nbytes()
            peak = max(peak, in_use)
    return peak


def split_heads(arch, qkv):
    spec = arch.spec
    sizes = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
    return qkv.view(len(qkv), -1, spec.head_dim).split(sizes, dim=1)


@settings(max_examples=60, deadline=None)
@given(
    arch=archs,
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    gaps=st.lists(st.integers(0, 20), min_size=6, max_size=6),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
)
def test_decode_attention_is_the_last_row_of_full_attention(arch, lengths, gaps, dtype, seed):
    torch.manual_seed(seed)
    spec = arch.spec
    starts = [sum(lengths[:r]) + sum(gaps[: r + 1]) for r in range(len(lengths))]
    cache = torch.full((starts[-1] + lengths[-1] + 3, 2, spec.num_kv_heads, spec.head_dim), 1e4)
    cache = cache.to(dtype)
    tokens = [torch.randn(n, spec.query_size + 2 * spec.kv_size).to(dtype) for n in lengths]
    for start, qkv in zip(starts, tokens, strict=True):
        append_kv(cache, qkv, start + torch.arange(len(qkv)))
    newest = torch.stack([qkv[-1] for qkv in tokens])
    out = torch.empty(len(lengths), spec.query_size, dtype=dtype)
    decode_attention(arch.spec.attention, newest, cache, starts, lengths, out)
    exact = [reference.attention(*split_heads(arch, qkv.float()))[-1] for qkv in tokens]
    assert_same(out, torch.stack(exact))
    alone = torch.empty_like(out[:1])
    decode_attention(arch.spec.attention, newest[:1], cache, starts[:1], lengths[:1], alone)
    assert torch.equal(alone[0], out[0])


def test_append_kv_touches_only_its_rows():
    cache = torch.zeros(6, 2, 2, 8)
    qkv = torch.randn(2, 32 + 32)
    append_kv(cache, qkv, torch.tensor([4, 1]))
    assert torch.equal(cache[4].flatten(), qkv[0, 32:])
    assert torch.equal(cache[1].flatten(), qkv[1, 32:])
    assert not cache[[0, 2, 3, 5]].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_post_attention(arch, dtype):
    dense = random_dense(arch, dtype)
    hidden = torch.randn(9, 16).to(dtype)
    attended = torch.randn(9, arch.spec.query_size).to(dtype)
    slow = as_float(dense)
    exact_hidden = hidden.float() + attended.float() @ slow.mixer.output.T
    x, routing = post_attention(arch, hidden, attended, dense, big_workspace())
    assert_same(hidden, exact_hidden)
    assert_same(x, reference.norm(arch.final_norm, hidden.float(), slow.ffn.ffn_norm))
    weights, experts = reference.route(arch.layers[0].ffn, x.float(), slow.ffn.router)
    assert routing.weights_TK.dtype is torch.float32
    assert routing.experts_TK.dtype is torch.int64
    torch.testing.assert_close(routing.weights_TK, weights, rtol=0, atol=2e-2)
    if dtype is torch.float32:
        assert torch.equal(routing.experts_TK, experts)


@settings(max_examples=80, deadline=None)
@given(
    arch=archs, num_tokens=st.integers(0, 50), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32), data=st.data()
)
def test_run_experts_adds_exactly_the_experts_given(arch, num_tokens, dtype, seed, data):
    torch.manual_seed(seed)
    experts = random_experts(arch, dtype)
    chosen = data.draw(st.lists(st.sampled_from(range(len(experts))), unique=True))
    x = torch.randn(num_tokens, arch.spec.hidden_size).to(dtype)
    routing = random_routing(arch, num_tokens)
    out = torch.randn_like(x)
    exact = out.float() + reference.moe(
        x.float(), routing.weights_TK, routing.experts_TK, [(index, as_float(experts[index])) for index in chosen]
    )
    x_before = x.clone()
    workspace = big_workspace()
    run_experts(x, routing, ((index, experts[index]) for index in chosen), out, workspace)
    if num_tokens:
        assert_same(out, exact)
    assert torch.equal(x, x_before)
    assert workspace.mark() == 0


def test_experts_split_between_devices_add_up():
    arch = ARCHS["mixtral"]
    experts, routing, x = random_experts(arch), random_routing(arch, 20), torch.randn(20, 16)
    whole, parts = torch.zeros(20, 16), torch.zeros(20, 16)
    run_experts(x, routing, enumerate(experts), whole, big_workspace())
    for some in ([(0, experts[0])], [(3, experts[3]), (1, experts[1])], [(2, experts[2])]):
        run_experts(x, routing, some, parts, big_workspace())
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits(arch, dtype):
    hidden = torch.randn(5, 16).to(dtype)
    norm, head = torch.rand(16).to(dtype), torch.randn(50, 16).to(dtype)
    before = hidden.clone()
    out = logits(arch.final_norm, hidden, HeadWeights(norm, head), big_workspace())
    assert out.dtype is torch.float32
    assert_same(out.to(dtype), reference.norm(arch.final_norm, hidden.float(), norm.float()) @ head.float().T)
    assert torch.equal(hidden, before)
    narrow = logits(arch.final_norm, hidden, HeadWeights(norm, head), big_workspace(), may_be_narrow=True)
    assert narrow.dtype is dtype
    assert torch.equal(narrow.float(), out)
    scaled = logits(arch.final_norm, hidden, HeadWeights(norm, head), big_workspace(), scale=2.0, may_be_narrow=True)
    assert torch.equal(scaled, 2 * out)


@settings(max_examples=60, deadline=None)
@given(
    arch=archs,
    num_tokens=st.integers(1, 60),
    dtype=st.sampled_from(DTYPES),
    same_expert=st.booleans(),
    prefill=st.booleans(),
)
def test_plan_covers_the_temporaries_of_a_layer(arch, num_tokens, dtype, same_expert, prefill):
    spec = arch.spec
    workspace = planned_workspace(arch, num_tokens, dtype)
    dense, experts = random_dense(arch, dtype), random_experts(arch, dtype)
    hidden = torch.randn(num_tokens, spec.hidden_size).to(dtype)
    qkv = workspace.take((num_tokens, spec.query_size + 2 * spec.kv_size), dtype)
    attended = workspace.take((num_tokens, spec.query_size), dtype)
    pre_attention(arch, hidden, dense, torch.arange(num_tokens), qkv, workspace)
    if prefill:
        prefill_attention(arch.spec.attention, qkv, [num_tokens], [None], attended, workspace)
        by_torch = attended.numel() * dtype.itemsize
    else:
        cache = torch.randn(num_tokens, 2, spec.num_kv_heads, spec.head_dim).to(dtype)
        ones = [1] * num_tokens
        decode_attention(arch.spec.attention, qkv, cache, range(num_tokens), ones, attended)
        by_torch = 0
    assert workspace.mark() + by_torch <= workspace.capacity_bytes
    x, routing = post_attention(arch, hidden, attended, dense, workspace)
    if same_expert:
        routing.experts_TK.copy_(torch.arange(spec.experts_per_token))
    out = workspace.take((num_tokens, spec.hidden_size), dtype).zero_()
    run_experts(x, routing, enumerate(experts), out, workspace)
    assert workspace.high_water_bytes <= workspace_bytes(spec, num_tokens, FORMATS[name_of(dtype)])


@settings(max_examples=40, deadline=None)
@given(
    hidden=st.integers(1, 400),
    inner=st.integers(1, 60),
    shared=st.integers(1, 60),
    num_tokens=st.integers(1, 60),
    dtype=st.sampled_from(DTYPES),
    by_torch=st.booleans(),
)
def test_plan_covers_what_waits_for_the_sum_of_experts(hidden, inner, shared, num_tokens, dtype, by_torch):
    arch = tiny_arch(hidden_size=hidden, intermediate_size=inner)
    (layer,) = arch.spec.layers
    block = replace(layer.experts[0], shared_intermediate_size=shared).with_vectors(
        router_scale=hidden,
        expert_scale=layer.num_experts,
        shared_norm=hidden,
        shared_output_norm=hidden,
        routed_output_norm=hidden,
        ffn_output_norm=hidden,
        layer_scale=1,
    )
    arch = replace(arch, spec=arch.spec.with_layers([replace(layer, ffn=(block,))]))
    workspace, ffn = planned_workspace(arch, num_tokens, dtype), arch.layers[0].ffn
    workspace.take((num_tokens, layer.mixer.kept_elements), dtype)
    weights, states = random_dense(arch, dtype).ffn, torch.randn(num_tokens, hidden).to(dtype)
    with native.using(None if by_torch else native.kernels()):
        x, routing, pending = ffn.before_experts(states, weights, workspace)
        run_experts(x, routing, enumerate(random_experts(arch, dtype)), ffn.sum_of(pending, states), workspace)
        ffn.finish(pending, states, weights, workspace)
    assert workspace.high_water_bytes <= workspace.capacity_bytes


def test_plan_is_no_more_than_needed():
    arch = tiny_arch(hidden_size=256, intermediate_size=512, num_heads=4, head_dim=64)
    workspace = planned_workspace(arch, 128, torch.bfloat16)
    workspace.take((128, 256 + 2 * 128 + 256), torch.bfloat16)
    dense, experts = random_dense(arch, torch.bfloat16), random_experts(arch, torch.bfloat16)
    hidden, attended = torch.randn(2, 128, 256).to(torch.bfloat16)
    x, routing = post_attention(arch, hidden, attended, dense, workspace)
    routing.experts_TK.copy_(torch.arange(2))
    out = workspace.take((128, 256), torch.bfloat16).zero_()
    run_experts(x, routing, enumerate(experts), out, workspace)
    assert workspace.high_water_bytes >= 0.95 * workspace.capacity_bytes


def test_planned_workspace_takes_arrays():
    spec = ARCHS["dbrx"].spec
    planned = workspace_bytes(spec, np.array([1, 8]), FORMATS["bfloat16"])
    assert np.asarray(planned).tolist() == [workspace_bytes(spec, n, FORMATS["bfloat16"]) for n in (1, 8)]


@settings(max_examples=40, deadline=None)
@given(arch=archs, vocab=st.integers(1, 90), num_requests=st.integers(1, 20), dtype=st.sampled_from(DTYPES))
def test_plan_covers_the_logits(arch, vocab, num_requests, dtype):
    hidden = arch.spec.hidden_size
    planned = workspace_bytes(arch.spec, num_requests, FORMATS[name_of(dtype)])
    planned += num_requests * vocab * (LOGIT_BYTES + dtype.itemsize)
    workspace = Workspace(torch.empty(planned, dtype=torch.uint8))
    states, head = torch.randn(num_requests, hidden), torch.randn(vocab, hidden)
    logits(arch.final_norm, states.to(dtype), HeadWeights(torch.ones(hidden, dtype=dtype), head.to(dtype)), workspace)
    assert workspace.high_water_bytes <= planned
