"""The operators that a task issues, counted, beside the numbers that its time is predicted from.

Launches decide the time of small tasks, so a kernel rewritten with twice the operators must not
pass unseen by the model of the machine. The numbers are torch's: a native kernel is called once
for a whole task and issues no planned.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from executor import native
from executor.model import (
    Experts,
    GpuKernels,
    HeadWeights,
    Workspace,
    decode_attention,
    dense_views,
    expert_views,
    experts_in,
    logits,
    run_experts,
)
from executor.model.gpu import grouped_gemm
from executor.model.mixers.grouped_query import append_kv
from executor.sampling import SamplingParams, choose
from hrm.contract import launches as planned
from tests.executor.model.steps import post_attention, pre_attention, route
from tests.executor.tiny_models import tiny_arch

ARCH = tiny_arch()
SPEC = ARCH.spec
DTYPE = torch.bfloat16  # what models are run in; casts count
REQUESTS = 6
WITHIN = 0.35


class Counter(TorchDispatchMode):
    """Counts operators, views included."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def launches(work, *args):
    work(*args)  # caches are filled
    with Counter() as counter:
        result = work(*args)
    return counter.count, result


def workspace():
    return Workspace(torch.empty(1_000_000, dtype=torch.uint8))


def rows(width, dtype=DTYPE):
    return torch.randn(REQUESTS, width).to(dtype)


@pytest.fixture(autouse=True)
def without_gradients():
    torch.manual_seed(0)
    with torch.no_grad(), native.using(None):
        yield


@pytest.fixture
def dense():
    return dense_views(SPEC.layers[0], torch.randn(SPEC.layers[0].dense_parameters).to(DTYPE))


def near(constant):
    return pytest.approx(constant, rel=WITHIN)


def test_pre_attention(dense):
    qkv = rows(SPEC.query_size + 2 * SPEC.kv_size)
    positions = torch.arange(REQUESTS)
    count, _ = launches(pre_attention, ARCH, rows(SPEC.hidden_size), dense, positions, qkv, workspace())
    assert count == near(planned.PRE_ATTENTION_LAUNCHES)


@pytest.mark.skipif(not native.paths(), reason="the native kernels are not built")
def test_fused_operators(dense):
    """Each native product, norm, rotation and choice of experts is one launch besides."""
    qkv = rows(SPEC.query_size + 2 * SPEC.kv_size)
    hidden, attention = rows(SPEC.hidden_size), rows(SPEC.query_size)
    with native.using(native.Kernels(native.paths()[0])):
        before, _ = launches(pre_attention, ARCH, hidden, dense, torch.arange(REQUESTS), qkv, workspace())
        after, _ = launches(post_attention, ARCH, hidden, attention, dense, workspace())
    assert before + 3 == planned.FUSED_PRE_ATTENTION_LAUNCHES
    assert after + 4 == planned.FUSED_POST_ATTENTION_LAUNCHES


def test_decode_attention():
    qkv, out = rows(SPEC.query_size + 2 * SPEC.kv_size), rows(SPEC.query_size)
    cache = torch.randn(REQUESTS * 16, 2, SPEC.num_kv_heads, SPEC.head_dim).to(DTYPE)

    def work(qkv, out, rows, starts):
        append_kv(cache, qkv, rows)
        decode_attention(SPEC.attention, qkv, cache, starts, [8] * len(qkv), out)

    def count(n):
        starts = [16 * r for r in range(n)]
        return launches(work, qkv[:n], out[:n], torch.tensor(starts) + 7, starts)[0]

    per_request = planned.ATTENTION_LAUNCHES_PER_REQUEST
    assert count(REQUESTS) - count(1) == near(per_request * (REQUESTS - 1))
    assert count(REQUESTS) == near(planned.ATTENTION_LAUNCHES_PER_TASK + per_request * REQUESTS)


def test_post_attention_and_experts(dense):
    hidden, attention = rows(SPEC.hidden_size), rows(SPEC.query_size)
    experts = [
        (index, expert_views(SPEC.layers[0], torch.randn(SPEC.expert_parameters).to(DTYPE)))
        for index in range(SPEC.num_experts)
    ]
    count, (x, routing) = launches(post_attention, ARCH, hidden, attention, dense, workspace())
    assert count == near(planned.POST_ATTENTION_LAUNCHES)

    here = workspace()

    def work(some):
        here.reset()
        run_experts(x, routing, some, hidden, here)

    hit = routing.experts_TK.flatten().unique().tolist()
    none, all_hit = launches(work, [])[0], launches(work, experts)[0]
    assert none == near(planned.ROUTING_LAUNCHES)
    assert (all_hit - none) / len(hit) == near(planned.LAUNCHES_PER_EXPERT)


@pytest.mark.skipif(not native.paths(), reason="the native kernels are not built")
def test_native_kernels_issue_no_operators_of_their_own(dense):
    """What is left: the store to the cache, and a view of the workspace for the activations."""
    qkv, out = rows(SPEC.query_size + 2 * SPEC.kv_size), rows(SPEC.query_size)
    cache = torch.randn(REQUESTS * 16, 2, SPEC.num_kv_heads, SPEC.head_dim).to(DTYPE)
    starts = [16 * r for r in range(REQUESTS)]
    x, hidden, here = rows(SPEC.hidden_size), rows(SPEC.hidden_size), workspace()
    routing = route(ARCH, x, dense.ffn.router)
    experts = [
        (index, expert_views(SPEC.layers[0], torch.randn(SPEC.expert_parameters).to(DTYPE)))
        for index in range(SPEC.num_experts)
    ]

    def attend():
        decode_attention(SPEC.attention, qkv, cache, starts, [8] * REQUESTS, out)

    def feed_forward():
        here.reset()
        run_experts(x, routing, experts, hidden, here)

    with native.using(native.Kernels(native.paths()[0])):
        assert launches(attend)[0] == 0
        assert launches(feed_forward)[0] == 1


def test_grouped_experts(dense):
    """As on GPUs that group them, however many experts there are."""
    experts = Experts(
        stacks=tuple(experts_in(SPEC.layers[0], torch.randn(4 * SPEC.expert_parameters).to(DTYPE), 0).stacks)
    )
    x, hidden = rows(SPEC.hidden_size), rows(SPEC.hidden_size)
    routing = route(ARCH, x, dense.ffn.router)

    def work():
        kernels = GpuKernels(None, grouped_gemm())
        kernels.run_experts(x, routing, experts, hidden, workspace(), rows_at_once=10**6, num_experts=SPEC.num_experts)

    assert launches(work)[0] == near(planned.GROUPED_EXPERTS_LAUNCHES)


def test_sample():
    weight = torch.rand(SPEC.hidden_size).to(DTYPE)
    head = torch.randn(SPEC.vocab_size, SPEC.hidden_size).to(DTYPE)
    hidden, here = rows(SPEC.hidden_size), workspace()
    params = [SamplingParams(temperature=0)] * REQUESTS

    def work():
        here.reset()
        choose(logits(ARCH.final_norm, hidden, HeadWeights(weight, head), here), params, [0] * REQUESTS)

    assert launches(work)[0] == near(planned.SAMPLE_LAUNCHES)
