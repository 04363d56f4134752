import pytest
import torch

from executor.model.workspace import Workspace
from hrm.contract.temporaries import TEMPORARY_ALIGNMENT_BYTES


def workspace_of(num_bytes):
    return Workspace(torch.zeros(num_bytes, dtype=torch.uint8))


def test_temporaries_do_not_overlap_and_are_aligned():
    workspace = workspace_of(1024)
    a = workspace.take((3, 5), torch.float32).fill_(1)
    b = workspace.take((7,), torch.bfloat16).fill_(2)
    c = workspace.take((2, 1, 3), torch.float32).fill_(3)
    assert (a == 1).all()
    assert (b == 2).all()
    assert (c == 3).all()
    base = workspace._memory.data_ptr()
    assert {(t.data_ptr() - base) % TEMPORARY_ALIGNMENT_BYTES for t in (a, b, c)} == {0}
    assert a.is_contiguous()
    assert c.is_contiguous()


def test_lies_where_its_memory_lies():
    arena = torch.zeros(512, dtype=torch.uint8)
    Workspace(arena[128:256]).take((4,), torch.float32).fill_(-1)
    assert (arena[128:144].view(torch.float32) == -1).all()
    assert arena.count_nonzero() == arena[128:144].count_nonzero()


def test_release_gives_back_what_came_after_the_mark():
    workspace = workspace_of(256)
    workspace.take((8,), torch.float32)
    mark = workspace.mark()
    first = workspace.take((8,), torch.float32)
    workspace.release(mark)
    assert workspace.take((8,), torch.float32).data_ptr() == first.data_ptr()
    assert workspace.high_water_bytes == 64 + 32


def test_reset_keeps_the_high_water_mark():
    workspace = workspace_of(256)
    workspace.take((200,), torch.uint8)
    workspace.reset()
    assert workspace.mark() == 0
    assert workspace.high_water_bytes == 200


def test_exhausted_is_our_mistake():
    with pytest.raises(AssertionError, match="workspace of 64 bytes exhausted"):
        workspace_of(100).take((17,), torch.float32)


def test_nothing_may_be_taken_of_nothing():
    assert workspace_of(0).take((0, 5), torch.float32).shape == (0, 5)
