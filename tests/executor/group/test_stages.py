"""What stages hand on: in order, each tag by itself, and not waited for once that is called off."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from executor.group.processes import ProcessGroup
from executor.group.stages import ProcessStages
from hrm.contract.pacing import CalledOffError


@pytest.fixture
def three():
    """Stages as threads of this process have them."""
    store, size = HashStore(), 3
    with ThreadPoolExecutor(size) as pool:
        groups = list(pool.map(lambda rank: ProcessGroup(store, rank, size), range(size)))
        yield list(pool.map(ProcessStages, groups))
    for group in groups:
        group.close()


def test_tensors_go_around_in_the_order_of_their_tags(three):
    sent = {tag: [torch.arange(5) + 10 * tag + turn for turn in range(3)] for tag in (0, 7)}
    for tag, tensors in sent.items():
        for tensor in tensors:
            for stage in three:
                stage.send(tensor + stage.stage, tag)
            for stage in three:
                before = (stage.stage - 1) % 3
                found = torch.empty(5, dtype=torch.int64)
                stage.receive(found, tag).wait()
                assert found.equal(tensor + before)
    assert [(stage.is_first, stage.is_last) for stage in three] == [(True, False), (False, False), (False, True)]


def test_what_never_comes_is_not_waited_for_once_that_is_called_off(three):
    awaited = three[1].receive(torch.empty(1), 0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(awaited.wait)
        three[1].waits.call_off()
        with pytest.raises(CalledOffError):
            waiting.result(timeout=20)
    three[0].send(torch.ones(1), 0)  # for the thread that waits in gloo
