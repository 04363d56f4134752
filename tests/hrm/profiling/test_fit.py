"""Latency and bandwidth come back out of times that they were put into."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hrm.profiling.fit import MAX_GROUPS, fit_groups, fit_link
from hrm.profiling.link import transfer_sizes
from hrm.units import MIB

SIZES = transfer_sizes(64 * MIB, quick=False)


@given(latency_s=st.floats(1e-6, 1e-3), bandwidth=st.floats(1e8, 1e12), seed=st.randoms(use_true_random=False))
def test_fit_finds_latency_and_bandwidth(latency_s, bandwidth, seed):
    points = [(size, latency_s + size / bandwidth) for size in SIZES]
    fit = fit_link(points)
    assert fit.bandwidth_bytes_per_s == pytest.approx(bandwidth, rel=1e-3)
    assert fit.latency_s == pytest.approx(latency_s, rel=1e-3)
    assert fit.worst_miss < 1e-6
    noisy = fit_link([(size, t * seed.uniform(0.99, 1.01)) for size, t in points])
    assert noisy.worst_miss < 0.03


@given(
    latency_s=st.floats(1e-5, 5e-5),
    bandwidth=st.floats(1e9, 2e10),
    noise=st.floats(0.0, 0.1),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=30)
def test_fits_of_stretches_hold_what_was_planted(latency_s, bandwidth, noise, seed):
    random = Random(seed)
    samples = {
        size: [(latency_s + size / bandwidth) * (1 + noise * random.expovariate(3)) for _ in range(30)]
        for size in transfer_sizes(64 * MIB, quick=True)
    }
    fits = fit_groups(samples)
    assert len(fits) == MAX_GROUPS
    for fit in fits:  # noise only ever adds: its median is 0.23 of it
        assert fit.bandwidth_bytes_per_s == pytest.approx(bandwidth / (1 + 0.23 * noise), rel=0.12)
        assert fit.latency_s == pytest.approx(latency_s * (1 + 0.23 * noise), rel=0.2)


def test_stretches_follow_a_link_that_gets_slower():
    samples = {size: [size / 2e9] * 10 + [size / 1e9] * 10 for size in (MIB, 4 * MIB, 16 * MIB)}
    rates = [fit.bandwidth_bytes_per_s for fit in fit_groups(samples)]
    assert rates[0] == pytest.approx(2e9)
    assert rates[-1] == pytest.approx(1e9)


def test_as_few_stretches_as_samples():
    assert len(fit_groups({MIB: [1.0, 1.0], 2 * MIB: [2.0, 2.0, 2.0]})) == 2


@pytest.mark.parametrize("factor", [0.05, 20])
@pytest.mark.parametrize("disturbed", range(5))
def test_one_disturbed_size_hardly_moves_the_fit(disturbed, factor):
    sizes = transfer_sizes(16 * MIB, quick=True)
    points = [(size, 20e-6 + size / 1e9) for size in sizes]
    points[disturbed] = (sizes[disturbed], factor * points[disturbed][1])
    fit = fit_link(points)
    assert fit.bandwidth_bytes_per_s == pytest.approx(1e9, rel=0.02)
    assert fit.latency_s == pytest.approx(20e-6, rel=0.05)


def test_latency_is_never_negative():
    points = [(1000.0, 1e-6), (2000.0, 3e-6), (4000.0, 7e-6)]
    fit = fit_link(points)
    assert fit.latency_s == 0
    assert fit.bandwidth_bytes_per_s > 0
