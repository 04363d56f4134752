"""Real processes as ranks: what they run together, and that one that goes wrong ends all, named."""

import json
import os

import pytest

from executor.batching import Batch, MicroBatch, Request
from executor.ranks.generator import RankedGenerator, Ranks
from executor.ranks.signs import RankFailedError
from executor.sampling import SamplingParams
from tests.executor.ranks.summing import of_rank
from tests.executor.tiny_models import tiny_arch

pytestmark = pytest.mark.usefixtures("forked_ranks")
MODULE = "tests.executor.ranks.summing"


def batch(count=4):
    micro_batches = tuple(MicroBatch([]) for _ in range(count // 2))
    for number in range(count):
        micro_batches[number // 2].add(Request(str(number), (1, 2, 3), SamplingParams(max_tokens=3)))
    return Batch(micro_batches)


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def run(size=2, batches=1, **told):
    """Results of some batches; no other process is left."""
    message = json.dumps(told).encode()
    pids = []
    try:
        silence_s = 3.0 if told.get("fault") == "SIGSTOP" else 60.0
        with Ranks(size, message, module=MODULE, timeout_s=3.0, silence_s=silence_s) as ranks:
            pids += [process.pid for process in ranks.workers.processes.values()]
            own = of_rank(message, ranks.group)
            ranks.ready(own)
            with RankedGenerator(ranks, own, tiny_arch(num_layers=3)) as generator:
                results = [generator.generate(batch(), index=index) for index in range(batches)]
            assert ranks.reports() == [str(batches).encode()] * (size - 1)
            assert ranks.reports() == [b"0"] * (size - 1)
            return results
    finally:
        assert len(pids) in (0, size - 1)
        assert not any(map(is_alive, pids))


@pytest.mark.parametrize("size", [3])
def test_ranks_run_every_batch_together(size):
    results = run(size, batches=2)
    base = sum(range(size))
    for result in results:
        for completion in result.completions:
            assert completion.tokens == tuple(base + size * index for index in range(len(completion.tokens)))
            assert completion.tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("SIGKILL", "rank 1: its process is <ended by SIGKILL>: must run as long as the others, as the system does"),
        ("SIGSTOP", "<without a sign of life for"),
        ("sleeps", "rank 1: task A1.0 (PRE_ATTENTION) in lane GPU is <not at its end>: must come to where the other"),
    ],
)
def test_a_rank_that_goes_wrong_ends_all_within_seconds_and_is_named_with_its_task(fault, told):
    with pytest.raises(RankFailedError, match=r"^rank 1: ") as caught:
        run(fault=fault, rank=1)
    assert told in str(caught.value)
    assert caught.value.chart is not None
    assert "! is " in caught.value.chart  # where rank 0 waited


def test_the_rank_that_failed_is_told_of_several_that_then_ended():
    with pytest.raises(
        RankFailedError, match=r"^rank 2: task A1.0 \(PRE_ATTENTION\) in lane GPU is <ZeroDivisionError: oh no>"
    ):
        run(size=3, fault="breaks", rank=2)


def test_a_mistake_of_the_users_that_another_rank_finds_is_told_as_one():
    with pytest.raises(
        RankFailedError, match=r"^rank 1: its numbers is <wrong>: must be right; correct them"
    ) as caught:
        run(fault="refuses", rank=1)
    assert caught.value.chart is None


def test_an_interrupt_ends_all():
    with pytest.raises(KeyboardInterrupt):
        run(fault="interrupts", rank=0)
