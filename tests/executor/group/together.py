"""What the tests of processes have ranks do, where these find it without importing what tests need besides."""

import os
import signal
import time

import torch

from executor.group import LostRankError, share_of
from executor.group.shared import PIECE_BYTES

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
SHAPES = ((1,), (3, 5), (64, 257), (70_001,))
ROWS = (0, 1, 3, 4, 9)


def summand(rank, dtype, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1 + rank)).mul(8).to(dtype)


def more_than_a_piece():
    return torch.arange(PIECE_BYTES // 4 + 2).remainder(64).float().view(3, -1)


def all_logits(rows, columns):
    return torch.arange(rows * columns, dtype=torch.float32).view(rows, columns)


def do_all(group):
    sums = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            tensor = summand(group.rank, dtype, shape)
            group.all_reduce(tensor)
            sums[dtype, shape] = tensor
    many = more_than_a_piece() + group.rank
    group.all_reduce(many)
    shares, gathered = {}, {}
    for rows in ROWS:
        columns = slice(7 * group.rank, 7 * (group.rank + 1))
        shares[rows] = group.exchange_rows(all_logits(rows, 7 * group.size)[:, columns])
        own = share_of(group.rank, group.size, rows)
        gathered[rows] = [group.gather(torch.arange(rows).to(kind)[own], rows) for kind in (torch.int64, torch.float64)]
    agreed = [group.agree(step if group.rank == 0 else 99) for step in (0, 1, 2)]
    told = [group.broadcast(text if group.rank == 0 else None) for text in (b"", b"batch", bytes(range(256)) * 999)]
    is_sum = torch.equal(many, group.size * more_than_a_piece() + sum(range(group.size)))
    return sums, is_sum, shares, gathered, agreed, told, group.collect(b"x" * group.rank)


def lose(group, how):
    """Sum up until another rank is lost, and tell what comes out."""
    group.all_reduce(torch.ones(3))
    if group.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(3)
        return None
    told = []
    for call in (lambda: group.all_reduce(torch.ones(3)), lambda: group.agree(1), lambda: group.broadcast(b"")):
        try:
            call()
        except LostRankError as error:
            told.append(str(error))
    return told
