"""The experts' FFN by every path against torch in float32, from the same inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from executor import native
from executor.model import ExpertWeights, Glu, Routing, Workspace, run_experts
from executor.model.crossings import assumed
from executor.native.experts import SILU, Activation
from tests.executor.model.tolerances import DTYPES, assert_same
from tests.executor.native.support import MOST_UNTILED, PATHS, TILED_CASES, WITH_TILES, on_threads
from tests.executor.reference import dequantised


def make(dtype, *, tokens, hidden, intermediate, num_experts, per_token):
    weights = [
        ExpertWeights(
            (torch.randn(2 * intermediate, hidden) * hidden**-0.5).to(dtype),
            (torch.randn(hidden, intermediate) * intermediate**-0.5).to(dtype),
        )
        for _ in range(num_experts)
    ]
    scores = torch.rand(tokens, num_experts).softmax(-1)
    return torch.randn(tokens, hidden).to(dtype), Routing(*scores.topk(per_token)), weights


def run(kernels, x, routing, weights, *, max_tokens=10**9, bytes_of_workspace=10**6, glu=SILU):
    out = torch.ones_like(x)
    workspace = Workspace(torch.empty(bytes_of_workspace, dtype=torch.uint8))
    with native.using(kernels), assumed(max_tokens):
        counts = run_experts(x, routing, enumerate(weights), out, workspace, glu=glu)
    assert workspace.mark() == 0
    return out, counts


def wide(weights):
    """What they mean, in float32."""
    return [ExpertWeights(dequantised(each.w13).float(), dequantised(each.w2).float()) for each in weights]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(("path", "dtype"), TILED_CASES, ids=str)
@settings(max_examples=30)
@given(data=st.data())
def test_equals_torch(path, dtype, data):
    num_experts = data.draw(st.integers(1, 6), "experts")
    x, routing, weights = make(
        dtype,
        tokens=data.draw(st.integers(0, 40), "tokens"),
        hidden=data.draw(st.integers(1, 80), "hidden"),
        intermediate=data.draw(st.integers(1, 80), "intermediate"),
        num_experts=num_experts,
        per_token=data.draw(st.integers(1, num_experts), "experts per token"),
    )
    max_tokens = data.draw(st.sampled_from([0, 4, 16, 10**9]), "max tokens")
    out, counts = run(native.Kernels(path), x, routing, weights, max_tokens=max_tokens)
    exact, exact_counts = run(None, x.float(), routing, wide(weights))
    if len(x):
        assert_same(out, exact)
    assert counts == exact_counts


def plain(weights, biases=None):
    """The experts as they are stored without a packed format, with biases if any are given."""
    pairs = biases or [()] * len(weights)
    return [ExpertWeights(dequantised(e.w13), dequantised(e.w2), *pair) for e, pair in zip(weights, pairs, strict=True)]


def exact(activation, limit, x, routing, weights, biases, *, weight_on_input=False):
    """Token by token in float64, every activation as its models' code has it."""
    out = torch.ones(x.shape, dtype=torch.float64)
    for t, row in enumerate(x.double()):
        for weight, index in zip(routing.weights_TK[t], routing.experts_TK[t].tolist(), strict=True):
            w13, w2, (bias13, bias2) = weights[index].w13, weights[index].w2, biases[index]
            before, after = (weight, 1.0) if weight_on_input else (1.0, weight)
            gate, up = (w13.double() @ (before * row) + bias13.double()).chunk(2)
            if activation is Activation.CLAMPED:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
                activated = (up + 1) * gate * torch.sigmoid(gate * 1.702)
            elif activation is Activation.GELU_TANH:
                activated = functional.gelu(gate, approximate="tanh") * up
            else:
                activated = functional.silu(gate) * up
            out[t] += after * (w2.double() @ activated + bias2.double())
    return out.float()


@pytest.mark.parametrize(("path", "dtype"), TILED_CASES, ids=str)
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("has_biases", [True, False])
def test_activations_and_biases(path, dtype, activation, has_biases):
    x, routing, weights = make(dtype, tokens=24, hidden=70, intermediate=100, num_experts=4, per_token=2)
    x *= 3
    size = 1.0 if has_biases else 0.0
    biases = [((torch.randn(200) * size).to(dtype), (torch.randn(70) * size).to(dtype)) for _ in weights]
    out = torch.ones_like(x)
    counts, left_out = native.Kernels(path).run_experts(
        x,
        routing,
        list(enumerate(plain(weights, biases if has_biases else None))),
        out,
        torch.empty(48 * 128),
        max_tokens=24,
        glu=Glu(activation, limit=2.0),
    )
    assert sum(counts) == 48
    assert not left_out
    assert_same(out, exact(activation, 2.0, x, routing, weights, biases))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["torch", *PATHS])
def test_weights_may_multiply_the_input(path, dtype):
    x, routing, weights = make(dtype, tokens=9, hidden=70, intermediate=100, num_experts=4, per_token=2)
    biases = [(torch.randn(200).to(dtype), torch.randn(70).to(dtype)) for _ in weights]
    biased = [ExpertWeights(each.w13, each.w2, *of) for each, of in zip(weights, biases, strict=True)]
    kernels = None if path == "torch" else native.Kernels(path)
    out, _ = run(kernels, x, routing, biased, glu=Glu(weight_on_input=True))
    assert_same(out, exact(Activation.SILU, 0, x, routing, weights, biases, weight_on_input=True))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("activation", Activation)
def test_no_activation_hides_what_is_not_a_number(path, activation):
    x, routing, weights = make(torch.float32, tokens=2, hidden=16, intermediate=32, num_experts=1, per_token=1)
    x[1, 3] = torch.nan
    out = torch.zeros_like(x)
    listed = [(0, plain(weights)[0])]
    native.Kernels(path).run_experts(x, routing, listed, out, torch.empty(64), max_tokens=2, glu=Glu(activation))
    assert out[0].isfinite().all()
    assert out[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_neither_neighbours_nor_threads_change_a_result(path, dtype):
    x, routing, weights = make(dtype, tokens=MOST_UNTILED, hidden=96, intermediate=336, num_experts=5, per_token=3)
    kernels = native.Kernels(path)
    together, _ = on_threads(1, lambda: run(kernels, x, routing, weights))
    for threads in (2, 4):
        assert torch.equal(on_threads(threads, lambda: run(kernels, x, routing, weights)[0]), together)
    for t in range(len(x)):
        one = Routing(routing.weights_TK[t : t + 1], routing.experts_TK[t : t + 1])
        assert torch.equal(run(kernels, x[t : t + 1], one, weights)[0][0], together[t])


@pytest.mark.parametrize("path", WITH_TILES)
@pytest.mark.parametrize("intermediate", [64, 100])
def test_neighbours_change_no_result_by_tiles(path, intermediate):
    """More of them than are computed at once."""
    x, routing, weights = make(
        torch.bfloat16, tokens=420, hidden=96, intermediate=intermediate, num_experts=3, per_token=2
    )
    kernels = native.Kernels(path)
    together, counts = on_threads(1, lambda: run(kernels, x, routing, weights))
    assert_same(together, run(None, x.float(), routing, wide(weights))[0])
    assert torch.equal(on_threads(3, lambda: run(kernels, x, routing, weights)[0]), together)
    some = slice(100, 150)
    few = Routing(routing.weights_TK[some], routing.experts_TK[some])
    out, few_counts = run(kernels, x[some], few, weights)
    assert min(few_counts) > MOST_UNTILED
    assert max(counts) > 192
    assert torch.equal(out, together[some])


@pytest.mark.parametrize("path", WITH_TILES)
def test_one_experts_tokens_may_be_arranged_in_several_rounds(path):
    x, routing, weights = make(torch.bfloat16, tokens=300, hidden=7001, intermediate=32, num_experts=1, per_token=1)
    out, _ = run(native.Kernels(path), x, routing, weights)
    assert_same(out, run(None, x.float(), routing, wide(weights), bytes_of_workspace=2 * 10**7)[0])


@pytest.mark.parametrize("path", PATHS)
def test_experts_take_turns_where_room_is_short(path):
    """The plan has room for one expert with every token, not for all experts at once."""
    x, routing, weights = make(torch.float32, tokens=9, hidden=16, intermediate=64, num_experts=8, per_token=7)
    kernels = native.Kernels(path)
    room = 9 * (16 + 2 * 64) * 4
    assert room < 9 * 7 * 64 * 4
    out, _ = run(kernels, x, routing, weights, bytes_of_workspace=room)
    assert_same(out, run(None, x, routing, weights)[0])


@pytest.mark.parametrize("path", PATHS)
def test_experts_whose_activations_outgrow_a_cache_take_turns(path):
    """In whatever turns, each adds its output by itself, after those before it."""
    tokens, intermediate = 20_000, 32
    x, routing, weights = make(
        torch.float32, tokens=tokens, hidden=16, intermediate=intermediate, num_experts=8, per_token=2
    )
    kernels, enough = native.Kernels(path), tokens * 2 * intermediate * 4
    out, _ = run(kernels, x, routing, weights, bytes_of_workspace=enough)
    one_by_one, workspace = torch.ones_like(x), Workspace(torch.empty(enough, dtype=torch.uint8))
    with native.using(kernels), assumed(tokens):
        for index, expert in enumerate(weights):
            run_experts(x, routing, [(index, expert)], one_by_one, workspace)
    assert torch.equal(out, one_by_one)


@pytest.mark.parametrize("path", PATHS)
def test_experts_of_many_tokens_are_left_to_torch(path):
    x, routing, weights = make(torch.float32, tokens=24, hidden=16, intermediate=32, num_experts=3, per_token=1)
    routing.experts_TK[:20] = 1
    routing.experts_TK[20:] = 2
    out, scratch = torch.zeros_like(x), torch.empty(24 * 32)
    listed = list(enumerate(plain(weights)))
    counts, left_out = native.Kernels(path).run_experts(x, routing, listed, out, scratch, max_tokens=19)
    assert counts == [0, 20, 4]
    assert left_out == [1]
    assert not out[:20].any()
    assert out[20:].any(dim=1).all()
