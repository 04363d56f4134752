"""Launch latencies are those of a calm moment, whatever else the machine was kept busy with meanwhile."""

import pytest

from hrm.profiling.launch import launch_latency, operator_round
from hrm.profiling.passes import combine
from hrm.profiling.timing import Latency

CALM_S, DISTURBED_S = 3e-6, 1e-3  # of an operator


def of_pass(disturbed: int) -> Latency:
    """A pass in which ten times so many of a hundred samples were taken beside other load, the calm ones apart."""
    _, operators = operator_round()
    taken = iter(range(10**6))

    def sampler(_call, calls: int) -> float:
        of_operator_s = DISTURBED_S if next(taken) % 10 < disturbed else CALM_S
        return calls * operators * of_operator_s

    return launch_latency(budget_s=1e9, sampler=sampler)


@pytest.mark.parametrize("disturbed", [0, 3, 7])
def test_samples_beside_other_load_leave_a_launch_as_it_is(disturbed):
    figure = of_pass(disturbed).duration()
    assert figure.value == pytest.approx(CALM_S)
    assert figure.is_noisy == (disturbed > 5), "and it is told where most of them were"


def test_passes_beside_other_load_leave_a_launch_as_it_is():
    """Threads that were put on one core stay there for as long as a pass takes: all of its samples are slow."""
    found = combine([of_pass(10)] * 4 + [of_pass(0)] * 3)
    figure = found.duration()
    assert figure.value == pytest.approx(CALM_S)
    assert figure.is_noisy
    assert figure.p20 == pytest.approx(CALM_S), "nothing was quicker"


def test_a_calm_launch_is_what_most_samples_say():
    found = Latency.of([1.0, 1.01, 1.02, 1.02, 1.03, 1.9])
    assert found.duration().value == 1.01
    assert not found.duration().is_noisy
