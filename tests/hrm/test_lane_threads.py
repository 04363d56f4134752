"""Threads of the lanes: enough work for every core, and never more than there are."""

import pytest

from hrm.contract.lane_threads import lane_threads
from hrm.tasks import Lane

CORES = (1, 2, 3, 4, 8, 16, 64)


@pytest.mark.parametrize("cores", CORES)
@pytest.mark.parametrize("accelerator", ["cpu", "emulated", "cuda"])
def test_every_lane_has_a_thread_and_none_more_than_there_are_cores(accelerator, cores):
    for lane in Lane:
        assert 1 <= lane_threads(accelerator, lane, cores) <= cores


@pytest.mark.parametrize("cores", CORES[1:])
def test_an_emulated_gpu_and_the_cpu_share_the_cores(cores):
    assert sum(lane_threads("emulated", lane, cores) for lane in (Lane.GPU, Lane.CPU)) == cores


def test_beside_a_card_most_cores_attend_and_some_stage():
    of_16 = {lane: lane_threads("cuda", lane, 16) for lane in Lane}
    assert of_16 == dict.fromkeys(Lane, 1) | {Lane.CPU: 13, Lane.STAGE: 4}
