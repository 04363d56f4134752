"""The gated delta rule's step by every path, against what transformers computes in float32."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers.models.qwen3_next.modeling_qwen3_next import causal_conv1d_update, torch_recurrent_gated_delta_rule

from executor import native
from executor.native.mixers import DeltaStep
from tests.executor.model.tolerances import DTYPES, assert_same
from tests.executor.native.support import PATHS, on_threads


@dataclass
class Case:
    key_heads: int
    qkv: Tensor  # (R, X)
    convolution: Tensor  # (X, k)
    conv_states: Tensor  # (S, k - 1, X)
    states: Tensor  # (S, H, key_dim, value_dim)
    a: Tensor  # (R, H)
    b: Tensor
    log_rate: Tensor  # (H)
    step_bias: Tensor
    rows: list[int]

    def run(self, path, *, requests=slice(None)):
        """Outputs, and the states after it."""
        states, conv_states = self.states.clone(), self.conv_states.clone()
        rows = self.rows[requests]
        out = torch.full((len(rows), states[0, :, 0].numel()), torch.nan, dtype=self.qkv.dtype)
        before = self.qkv[requests], self.convolution, conv_states, states, self.a[requests], self.b[requests]
        kernels, step = native.Kernels(path), DeltaStep(*before, self.log_rate, self.step_bias)
        assert kernels.takes_gated_delta(step, out)
        kernels.gated_delta_step(step, rows, out)
        return out, states, conv_states

    def exact(self):
        states, conv_states = self.states.clone(), self.conv_states.clone()
        _, heads, key_dim, value_dim = states.shape
        keys = self.key_heads * key_dim
        sizes = (keys, keys, heads * value_dim)
        before = conv_states[self.rows].float().transpose(1, 2).contiguous()
        x = causal_conv1d_update(
            self.qkv.float().unsqueeze(2), before, self.convolution.float(), activation="silu"
        ).squeeze(2)
        conv_states[self.rows] = before.transpose(1, 2).to(conv_states.dtype)
        q, k, v = x.unsqueeze(1).split(sizes, dim=2)
        out, after = torch_recurrent_gated_delta_rule(
            q.unflatten(2, (-1, key_dim)),
            k.unflatten(2, (-1, key_dim)),
            v.unflatten(2, (-1, value_dim)),
            g=(-self.log_rate.exp() * functional.softplus(self.a.float() + self.step_bias)).unsqueeze(1),
            beta=self.b.float().sigmoid().unsqueeze(1),
            initial_state=states[self.rows],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        states[self.rows] = after
        return out.flatten(1), states, conv_states


def make(dtype, *, key_heads, group, key_dim, value_dim, requests, kernel=4):
    """States are a part of longer rows, as a run may have them."""
    heads, num_states = key_heads * group, requests + 2
    channels = 2 * key_heads * key_dim + heads * value_dim
    memory = torch.randn(num_states, heads * key_dim * value_dim + 5)
    conv_memory = torch.randn(num_states, (kernel - 1) * channels + 3).to(dtype)
    return Case(
        key_heads,
        torch.randn(requests, channels + 4).to(dtype)[:, 2:-2],
        torch.randn(channels, kernel).to(dtype),
        conv_memory[:, 3:].unflatten(1, (kernel - 1, channels)),
        memory[:, 5:].unflatten(1, (heads, key_dim, value_dim)),
        torch.randn(requests, 2 * heads).to(dtype)[:, heads:] * 3,
        torch.randn(requests, heads).to(dtype),
        torch.rand(heads) * 16,
        torch.randn(heads),
        torch.randperm(num_states)[:requests].tolist(),
    )


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_equals_transformers(path, dtype, data):
    case = make(
        dtype,
        key_heads=data.draw(st.integers(1, 3), "key heads"),
        group=data.draw(st.integers(1, 3), "value heads of each"),
        key_dim=data.draw(st.integers(1, 70), "key_dim"),
        value_dim=data.draw(st.sampled_from([1, 8, 16, 37, 64, 150, 256]), "value_dim"),
        requests=data.draw(st.integers(1, 10), "requests"),
        kernel=data.draw(st.integers(2, 5), "kernel"),
    )
    case.log_rate -= data.draw(st.sampled_from([0.0, 8.0]), "slower decay")
    (out, states, conv_states), (exact, exact_states, exact_conv) = case.run(path), case.exact()
    assert_same(out, exact)
    assert_same(states, exact_states)
    assert torch.equal(conv_states, exact_conv)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_neither_neighbours_nor_threads_change_a_result(path, dtype):
    case = make(dtype, key_heads=4, group=2, key_dim=128, value_dim=128, requests=11)
    together = on_threads(1, lambda: case.run(path))
    for threads in (2, 5):
        for ours, theirs in zip(on_threads(threads, lambda: case.run(path)), together, strict=True):
            assert torch.equal(ours, theirs)
    for r in (0, 7, 10):
        out, states, conv_states = case.run(path, requests=slice(r, r + 1))
        row = case.rows[r]
        assert torch.equal(out[0], together[0][r])
        assert torch.equal(states[row], together[1][row])
        assert torch.equal(conv_states[row], together[2][row])
        others = [other for other in range(len(states)) if other != row]
        assert torch.equal(states[others], case.states[others])


@pytest.mark.parametrize("path", PATHS)
def test_rows_that_are_not_there_or_not_ones_own_are_refused(path):
    case = make(torch.float32, key_heads=1, group=2, key_dim=8, value_dim=8, requests=2)
    for rows, rule in (([0, 4], "among those given"), ([-1, 0], "among those given"), ([1, 1], "of its own")):
        with pytest.raises(IndexError, match=rule):
            replace(case, rows=rows).run(path)


@pytest.mark.parametrize("path", PATHS)
def test_what_cannot_be_computed_is_left_to_torch(path):
    case = make(torch.float32, key_heads=1, group=2, key_dim=8, value_dim=8, requests=2)
    out = torch.zeros(2, 16)

    def takes(**how):
        it = replace(case, **how)
        step = DeltaStep(it.qkv, it.convolution, it.conv_states, it.states, it.a, it.b, it.log_rate, it.step_bias)
        return native.Kernels(path).takes_gated_delta(step, out)

    assert takes()
    assert not takes(states=case.states.bfloat16())
    assert not takes(states=case.states.transpose(2, 3))
    assert not takes(convolution=case.convolution.T.contiguous().T)
    assert not takes(qkv=case.qkv.bfloat16())
    assert not takes(log_rate=case.log_rate.double())
