"""Cores that ranks share out."""

import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from executor.group.cores import own_cores
from hrm.contract.cores import cores_in_proportion


@given(shares=st.lists(st.integers(1, 60), min_size=1, max_size=9), cores=st.integers(1, 200))
def test_every_core_is_somebodys_and_parts_are_as_near_to_their_share_as_whole_cores_are(shares, cores):
    parts = cores_in_proportion(shares, cores)
    assert {core for part in parts for core in part} == set(range(cores))
    for share, part in zip(shares, parts, strict=True):
        assert len(part) >= 1
        assert abs(len(part) - share / sum(shares) * cores) <= 1 + 1e-9
    if cores >= 2 * sum(shares):  # then no part has to share a core
        assert sum(map(len, parts)) == cores


@pytest.mark.parametrize(
    ("shares", "cores", "counts"),
    [([1, 1], 2, [1, 1]), ([5, 3], 16, [10, 6]), ([1, 1, 1, 1], 2, [1, 1, 1, 1]), ([7, 1], 4, [4, 1]), ([1], 3, [3])],
)
def test_cores_of_parts(shares, cores, counts):
    assert [len(part) for part in cores_in_proportion(shares, cores)] == counts


def test_a_rank_keeps_to_its_cores_and_torch_to_as_many_threads(monkeypatch):
    given, kept = set(range(16)), list[set[int]]()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: given)
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cpus: kept.append(set(cpus)))
    monkeypatch.setattr("executor.group.cores.environment.usable_cores", lambda: 16)
    before = torch.get_num_threads()
    torch.set_num_threads(16)
    try:
        with own_cores(1, [10, 6]) as cpus:
            assert cpus == given
            assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)
    assert kept == [set(range(10, 16)), given]
