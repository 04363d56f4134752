"""Native choices of experts and tokens, and rows put into a cache, against torch."""

from math import inf, nan

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor import native
from executor.model import FeedForward, Router, RouterWeights, Routing, Scores
from executor.sampling import NO_TOKEN
from tests.executor.model.tolerances import DTYPES
from tests.executor.native.support import PATHS, on_threads


def logits_apart(tokens, experts, dtype):
    """Logits of which no two of a token are equal, in any of the dtypes; nor are sums of two sigmoids."""
    order = torch.stack([torch.randperm(experts) for _ in range(tokens)])
    return (order.to(dtype) - experts) / 16


def routing(path, router, chosen, logits, correction=None):
    """Of a router whose matrix is the unit matrix; torch's where there is no path."""
    ffn = FeedForward(experts_per_token=chosen, router=router)
    experts = logits.shape[1]
    weights = RouterWeights(torch.ones(experts), torch.eye(experts, dtype=logits.dtype), score_correction=correction)
    with native.using(path and native.Kernels(path)):
        found = ffn.route(logits, weights)
    return found.weights_TK, found.experts_TK


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 20),
    groups=st.sampled_from([1, 2, 4]),
    of_group=st.integers(3, 20),
    scores=st.sampled_from([Scores.SOFTMAX, Scores.SIGMOID]),
    norm=st.sampled_from([None, 1.0]),
    best=st.integers(1, 2),
    corrected=st.booleans(),
    data=st.data(),
)
def test_experts_are_chosen_as_torch_does(path, dtype, tokens, groups, of_group, scores, norm, best, corrected, data):
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    experts, chosen_groups = groups * of_group, data.draw(st.integers(1, groups))
    chosen = data.draw(st.integers(1, min(of_group * chosen_groups, 8)))
    router = Router(scores=scores, norm=norm, groups=groups, chosen_groups=chosen_groups, best_of_group=best, scale=2.5)
    logits = logits_apart(tokens, experts, dtype)
    # Far apart, as a sum of scores that is about another's may be rounded to either side of it.
    correction = (torch.randperm(experts) - experts // 2).to(dtype) if corrected else None
    weights, indices = routing(path, router, chosen, logits, correction)
    their_weights, their_indices = routing(None, router, chosen, logits, correction)
    assert torch.equal(indices, their_indices)
    torch.testing.assert_close(weights, their_weights, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("path", PATHS)
def test_each_expert_is_chosen_once_whatever_logits_are(path):
    """Of equals the first; no number is chosen first, and makes weights that are none."""
    logits = torch.zeros(4, 6)
    logits[1, 4] = nan
    logits[2] = nan
    logits[3, 2] = inf
    weights, indices = torch.empty(4, 3), torch.empty(4, 3, dtype=torch.int64)
    native.Kernels(path).choose_experts(logits, Routing(weights, indices), Router())
    assert indices[0].tolist() == indices[2].tolist() == [0, 1, 2]
    assert indices[1, 0] == 4
    assert indices[3, 0] == 2
    assert all(len(set(row)) == 3 for row in indices.tolist())
    assert weights[0].tolist() == pytest.approx([1 / 3] * 3)
    assert weights[1:].isnan().all()


@pytest.mark.parametrize("path", PATHS)
def test_a_choice_out_of_bounds_is_refused(path):
    out = Routing(torch.empty(2, 5), torch.empty(2, 5, dtype=torch.int64))
    for experts, groups in ((4, 1), (12, 3), (10, 3)):
        with pytest.raises(IndexError):
            native.Kernels(path).choose_experts(torch.rand(2, experts), out, Router(groups=groups))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", PATHS)
@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 20),
    width=st.integers(1, 900),
    levels=st.sampled_from([2, 50]),
    spoiled=st.sampled_from([None, nan, inf, -inf]),
    seed=st.integers(0, 2**32),
)
def test_the_greatest_is_the_first_of_equals(path, dtype, rows, width, levels, spoiled, seed):
    torch.manual_seed(seed)
    x = torch.randint(-levels, levels, (rows, width + 5)).to(dtype)[:, 2:-3]
    if spoiled is not None:
        x[torch.rand(x.shape) < 0.01] = spoiled
    found = on_threads(2, lambda: native.Kernels(path).greatest(x))
    for row, place in zip(x.double().tolist(), found, strict=True):
        finite = all(value < inf for value in row) and max(row) > -inf
        assert place == (row.index(max(row)) if finite else NO_TOKEN)


@pytest.mark.parametrize("path", PATHS)
def test_rows_go_to_their_places(path):
    kernels, cache, rows = native.Kernels(path), torch.zeros(9, 6), torch.rand(3, 8)
    places = torch.tensor([7, 0, 4])
    assert kernels.takes_append(cache, rows[:, 2:], places)
    kernels.append(cache, rows[:, 2:], places)
    assert torch.equal(cache, torch.zeros(9, 6).index_copy_(0, places, rows[:, 2:]))
    with pytest.raises(IndexError):
        kernels.append(cache, rows[:, 2:], torch.tensor([0, 1, 9]))
    assert not kernels.takes_append(cache, rows[:, 2:].bfloat16(), places)
    assert not kernels.takes_append(cache, rows[:, ::2], places)
