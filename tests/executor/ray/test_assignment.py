"""Requests shared out over workers that die at random, or of one request."""

import random

import pytest

from executor.batching import Request
from executor.ray.assignment import Assignment
from executor.sampling import SamplingParams


def requests(count):
    return [Request(f"r{i}", (1, 2), SamplingParams()) for i in range(count)]


def drive(count, most, kills, *, seed=0, accidents=0.0):
    """Answer all with workers that die over `kills`, or by accident; (answered, given up, deaths)."""
    rng, answered, given_up, deaths = random.Random(seed), [], [], 0
    assignment = Assignment(iter(requests(count)))
    while (share := assignment.next(most)) is not None:
        assert len(share.left) <= most
        names = list(share.left)
        accident = rng.random() < accidents
        if accident or kills & share.left.keys():
            deaths += 1
            for name in rng.sample(names, rng.randrange(len(names))):  # ended before
                if name not in kills:
                    assert share.done(name)
                    answered.append(name)
            lost = assignment.lost(share)
            given_up += [lost.name] if lost else []
            continue
        answered += [name for name in names if share.done(name)]
        assert not share.left
    return answered, given_up, deaths


@pytest.mark.parametrize("most", [1, 3, 8, 64])
@pytest.mark.parametrize("kills", [set(), {"r0"}, {"r5", "r6", "r30"}])
def test_what_kills_engines_is_left_out_and_all_else_is_answered_once(most, kills):
    answered, given_up, deaths = drive(40, most, kills)
    assert sorted(given_up) == sorted(kills)
    assert sorted(answered) == sorted({r.name for r in requests(40)} - kills)
    assert deaths <= len(kills) * (2 + most.bit_length())


@pytest.mark.parametrize("seed", range(20))
def test_workers_that_die_by_accident_cost_no_answer_where_shares_are_large(seed):
    answered, given_up, _ = drive(200, 32, set(), seed=seed, accidents=0.1)
    assert len(answered) == len(set(answered))
    # Only one that was twice there by accident, alone at the second, may be given up.
    assert set(answered) | set(given_up) == {r.name for r in requests(200)}
    assert not set(answered) & set(given_up)
    assert len(given_up) <= 4


def test_an_answer_that_comes_twice_or_from_another_share_does_not_count():
    assignment = Assignment(iter(requests(4)))
    first, second = assignment.next(2), assignment.next(2)
    assert first is not None
    assert second is not None
    assert first.done("r0")
    assert not first.done("r0")
    assert not first.done("r2")
    assert list(second.left) == ["r2", "r3"]
    assert assignment.next(2) is None
    assignment.lost(first)
    again = assignment.next(2)
    assert again is not None
    assert list(again.left) == ["r1"]


@pytest.mark.parametrize("seed", range(5))
def test_workers_without_room_get_other_requests_and_those_that_fit_nowhere_are_left(seed):
    rng = random.Random(seed)
    sizes = {request.name: rng.choice([1, 2, 4, 9]) for request in requests(60)}
    assignment, answered = Assignment(iter(requests(60))), []
    rooms = {"small": 1, "middle": 4}
    while shares := {w: s for w, most in rooms.items() if (s := assignment.next(5, lambda r: sizes[r.name] <= most))}:  # noqa: B023
        for worker, share in shares.items():
            assert all(sizes[name] <= rooms[worker] for name in share.left)
            if rng.random() < 0.2 and len(share.left) > 1:
                assignment.lost(share)
                continue
            answered += [name for name in list(share.left) if share.done(name)]
    left = [request.name for request in assignment.rest()]
    assert sorted(left) == sorted(name for name, size in sizes.items() if size == 9)
    assert sorted(answered + left) == sorted(sizes)
    assert assignment.is_empty
