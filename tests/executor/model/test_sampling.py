import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.errors import JobError
from executor.sampling import (
    NO_TOKEN,
    SamplingParams,
    choose,
    choose_of_parts,
    greatest_of_part,
    needs_all_logits,
    uniform,
)
from tests.executor.runtime.device_tensor import DeviceTensor, WithDevice, waits

GREEDY = SamplingParams(temperature=0)
scores = st.lists(
    st.floats(-30, 30, width=32) | st.sampled_from([0.0, 1.0, -math.inf]), min_size=1, max_size=20
).filter(lambda row: max(row) > -math.inf)
sampled = st.builds(
    SamplingParams,
    temperature=st.floats(0.01, 2),
    top_p=st.floats(0.01, 1),
    top_k=st.sampled_from([-1, 0, 1, 2, 5, 30]),
    min_p=st.just(0.0) | st.floats(0, 1),
    seed=st.integers(-(2**70), 2**70),
)


def slow_choice(row, params, step):
    """The definition, one token at a time."""
    top = max(row)
    weights = [math.exp((score - top) / params.temperature) for score in row]
    ranked = sorted(range(len(row)), key=lambda token: -row[token])
    ranked = ranked[: params.top_k] if params.top_k > 0 else ranked
    whole = sum(weights[token] for token in ranked) / sum(weights) if params.top_k > 0 else 1.0
    kept, mass = [], 0.0
    for token in ranked:
        if mass >= params.top_p * whole or weights[token] < params.min_p:
            break
        kept.append(token)
        mass += weights[token] / sum(weights)
    left = uniform(params.seed, step) * mass
    for token in kept:
        left -= weights[token] / sum(weights)
        if left < 0:
            return token, kept
    return kept[-1], kept


def one(row, params, step=0):
    return choose(torch.tensor([row]), [params], [step])[0]


@given(row=scores)
def test_greedy_takes_the_greatest(row):
    assert row[one(row, GREEDY)] == max(row)


def test_greedy_takes_the_first_of_equals():
    assert one([1.0, 3.0, 3.0], GREEDY) == 1


@settings(max_examples=300, deadline=None)
@given(row=scores, params=sampled, step=st.integers(0, 1000))
def test_sampling_follows_the_slow_definition(row, params, step):
    row = torch.tensor(row).tolist()  # as float32 holds them
    token, kept = slow_choice(row, params, step)
    chosen = one(row, params, step)
    assert row[chosen] > -math.inf
    if chosen != token:  # only rounding at a boundary may differ
        ranked = sorted(range(len(row)), key=lambda t: -row[t])
        assert abs(ranked.index(chosen) - ranked.index(token)) == 1
        wider = replace(params, top_p=min(params.top_p * (1 + 1e-9), 1.0), min_p=params.min_p * (1 - 1e-9))
        assert chosen in kept or chosen in slow_choice(row, wider, step)[1]


@settings(max_examples=60, deadline=None)
@given(row=st.lists(st.integers(-400, 400), min_size=1, max_size=12, unique=True), params=sampled)
def test_the_tokens_kept_are_those_of_transformers(row, params):
    from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    left = torch.tensor([[score / 100 for score in row]], dtype=torch.float64)
    warpers = [
        TemperatureLogitsWarper(params.temperature),
        TopPLogitsWarper(params.top_p),
        MinPLogitsWarper(params.min_p),
    ]
    if params.top_k > 0:
        warpers.insert(1, TopKLogitsWarper(params.top_k))
    for warper in warpers:
        left = warper(None, left)
    kept = set(left[0].isfinite().nonzero().flatten().tolist())
    logits = torch.tensor([[score / 100 for score in row]] * 40)
    chosen = set(choose(logits, [replace(params, seed=seed) for seed in range(40)], [0] * 40))
    assert chosen <= kept
    probabilities = left.softmax(-1)[0]
    assert all(token in chosen for token in kept if probabilities[token] > 0.5)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 99), sampled | st.just(GREEDY)), max_size=6))
def test_choices_do_not_depend_on_neighbours(rows):
    logits = torch.randn(100, 50, generator=torch.Generator().manual_seed(0)) * 3
    params, steps = [p for _, p in rows], [seed % 7 for seed, _ in rows]
    batch = choose(logits[[seed for seed, _ in rows]], params, steps)
    alone = [choose(logits[seed : seed + 1], [p], [step])[0] for (seed, p), step in zip(rows, steps, strict=True)]
    assert batch == alone


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([-math.inf, -1.5, 0.0, 2.0, 7.25, math.nan, math.inf]), min_size=9, max_size=9),
        min_size=1,
        max_size=5,
    ),
    cuts=st.sets(st.integers(1, 8), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_greatest_of_each_part_are_enough_for_greedy_choices(rows, cuts, dtype):
    logits, ends = torch.tensor(rows, dtype=dtype), [0, *sorted(cuts), 9]
    params = [replace(GREEDY, forced=(4,) * (index % 2)) for index in range(len(rows))]
    parts = [greatest_of_part(logits[:, first:end], first) for first, end in pairwise(ends)]
    steps = [0] * len(rows)
    assert choose_of_parts(torch.stack(parts), params, steps) == choose(logits, params, steps)
    assert not any(map(needs_all_logits, params, steps))
    assert needs_all_logits(replace(GREEDY, logprobs=True), 0)
    assert needs_all_logits(SamplingParams(), 0)


def test_logits_are_left_alone():
    logits = torch.randn(3, 9)
    before = logits.clone()
    choose(logits, [GREEDY, SamplingParams(), SamplingParams(top_p=0.5)], [0, 0, 0])
    assert torch.equal(logits, before)


def test_equal_seeds_give_equal_tokens_and_others_do_not():
    row = [0.0] * 1000
    tokens = [[one(row, SamplingParams(seed=s), step) for step in range(8)] for s in (1, 1, 2)]
    assert tokens[0] == tokens[1]
    assert tokens[0] != tokens[2]
    assert len(set(tokens[0])) > 4


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, (0.5, 0.3, 0.2)),
        ({"top_p": 0.7}, (0.625, 0.375, 0.0)),
        ({"top_k": 2}, (0.625, 0.375, 0.0)),
        ({"top_k": 2, "top_p": 0.62}, (1.0, 0.0, 0.0)),  # of the two that are left
        ({"min_p": 0.5}, (0.625, 0.375, 0.0)),
        ({"min_p": 0.5, "top_k": 1}, (1.0, 0.0, 0.0)),
    ],
)
def test_frequencies_are_the_probabilities(limits, expected):
    row, count = [math.log(p) for p in (0.5, 0.3, 0.2)], 4000
    logits = torch.tensor([row]).expand(count, 3)
    params = [SamplingParams(seed=s, **limits) for s in range(count)]
    chosen = torch.tensor(choose(logits, params, [3] * count)).bincount(minlength=3)
    assert (chosen / count).tolist() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
def test_low_temperatures_are_greedy(temperature):
    row = torch.randn(200).tolist()
    for step in range(20):
        params = SamplingParams(temperature=temperature, seed=step)
        assert one(row, params, step) == one(row, GREEDY)


def test_small_top_p_is_greedy():
    row = [0.1, 0.4, 0.2]
    assert {one(row, SamplingParams(top_p=1e-6, seed=s)) for s in range(20)} == {1}


@given(seed=st.integers(), step=st.integers(0, 10**6))
def test_uniform_is_below_one(seed, step):
    assert 0 <= uniform(seed, step) < 1


def test_uniform_never_changes():
    assert (uniform(0, 0), uniform(-3, 17)) == (0.6400741756716787, 0.3692784708872616)


@pytest.mark.parametrize("bad", [[math.nan, 0.0], [0.0, math.inf], [-math.inf, -math.inf]])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(seed=3)], ids=["greedy", "sampled"])
def test_logits_that_are_no_numbers_cost_their_own_row(bad, params):
    good = [[0.5, 1.0], [2.0, -1.0], [0.0, 0.0]]
    alone = choose(torch.tensor(good), [params] * 3, [0, 1, 2])
    rows = torch.tensor([good[0], bad, *good[1:]])
    assert choose(rows, [params] * 4, [0, 7, 1, 2]) == [alone[0], NO_TOKEN, *alone[1:]]


def test_the_host_waits_once_for_greedy_tokens_and_their_check():
    waits.clear()
    with torch.no_grad(), WithDevice():
        logits = DeviceTensor(torch.tensor([[0.0, 1.0], [math.nan, 0.0], [3.0, 0.0]]))
        assert choose(logits, [GREEDY] * 3, [0] * 3) == [1, NO_TOKEN, 0]
    assert [wait.function for wait in waits] == ["_most_probable"]
    waits.clear()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", 1.1),
        ("min_p", False),
        ("temperature", math.nan),
        ("temperature", 2.5),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("seed", "x"),
        ("seed", 1.5),
        ("stop", ("",)),
        ("stop", (1,)),
        ("stop_token_ids", ("a",)),
        ("ignore_eos", 1),
    ],
)
def test_impossible_parameters(field, value):
    with pytest.raises(JobError, match=f"body: {field} is "):
        SamplingParams(**{field: value})
