"""Threads of torch's beside the lanes: none may stay, or they slow the lanes down."""

import time

import psutil
import pytest
import torch

from executor.backends import in_thread_of_its_own
from tests.executor.runtime.support import architecture, generate, generator, make_policy, requests
from tests.executor.tiny_models import MIXTRALS


def in_parallel() -> float:
    torch.set_num_threads(3)
    numbers = torch.ones(1 << 20)
    return float((numbers + numbers).sum())


def threads_now() -> int:
    return psutil.Process().num_threads()


def ends_with(count: int) -> bool:
    """Whether soon there are so few threads: a team ends a moment after its thread."""
    for _ in range(500):
        if threads_now() <= count:
            return True
        time.sleep(0.01)
    return False


def test_no_team_of_threads_is_left():
    before = threads_now()
    during = []

    def work() -> float:
        result = in_parallel()
        during.append(threads_now())
        return result

    assert in_thread_of_its_own(work) == 2 * (1 << 20)
    assert during[0] > before + 1, "it computes in parallel"
    assert ends_with(before)


def test_errors_come_back():
    def fail() -> None:
        raise KeyError("lost")

    with pytest.raises(KeyError, match="lost"):
        in_thread_of_its_own(fail)


def test_generator_leaves_the_cores_to_its_lanes_and_can_be_entered_again(tiny_folders):
    folder = tiny_folders[next(iter(MIXTRALS))]
    policy = make_policy(architecture(folder).spec.num_layers)
    wanted = requests([[5, 6, 7], [8]], max_tokens=4)
    torch.set_num_threads(2)
    try:
        with generator(folder, policy) as made:
            assert torch.get_num_threads() == 1
            first = generate(made, wanted)
        assert torch.get_num_threads() == 2
        with made:
            assert generate(made, wanted) == first
    finally:
        torch.set_num_threads(1)
