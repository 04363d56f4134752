"""Prompt lengths with a mean and a maximum, and the spread of samples."""

from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrm.numeric import Spread
from hrm.workload import WORKLOADS, Workload


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_named_workloads_have_their_mean_and_maximum(workload):
    lengths = workload.prompt_lengths(2000)
    assert lengths == sorted(lengths)
    assert fmean(lengths) == pytest.approx(workload.prompt_len, rel=0.002)
    assert max(lengths) == pytest.approx(workload.max_prompt_len, rel=0.02)
    assert max(lengths) <= workload.max_prompt_len


@given(st.integers(2, 5000), st.floats(0.02, 1.0), st.integers(1, 50))
def test_any_lengths_stay_within_the_maximum(longest, share, count):
    mean = max(1.0, share * longest)
    workload = Workload(name="any", prompt_len=mean, max_prompt_len=longest, gen_len=1)
    lengths = workload.prompt_lengths(count)
    assert len(lengths) == count
    assert 1 <= min(lengths) <= max(lengths) <= longest


def test_equal_lengths_are_all_alike():
    workload = Workload(name="one", prompt_len=64, max_prompt_len=64, gen_len=1)
    assert workload.prompt_lengths(3) == [64, 64, 64]


def test_spread_is_of_the_samples_whatever_their_order():
    assert Spread.of([5, 1, 2, 4, 3, 6]) == Spread(6, 3.5, 2.0, 5.0)
    assert Spread.of([7]) == Spread(1, 7, 7, 7)
    assert Spread.of([]) == Spread()
